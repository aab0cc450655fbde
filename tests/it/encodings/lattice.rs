//! Tensors of GGUF's fewest bits (IQ1 to IQ3, TQ) run, and an edit raises them to more bits.

use std::path::Path;

use crate::common::organism::*;
use half::f16;
use refusal_patch::checkpoint::{sha256_tensors, Gguf, Tensor};
use refusal_patch::edit::fold::fold;
use refusal_patch::encoding::Encoding;
use refusal_patch::error::Error;
use refusal_patch::forward::{Compute, Runner};
use refusal_patch::model::{Model, Replacement};
use refusal_patch::output::{write, Patch, Plan};
use refusal_patch::progress::Silent;
use refusal_patch::weights::Matrix;

fn lattices() -> impl Iterator<Item = Encoding> {
    Encoding::ALL.into_iter().filter(|e| !e.has_codes())
}

/// Random blocks with values as large as weights.
fn random_blocks(e: Encoding, elements: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut byte = || {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (state >> 56) as u8
    };
    let mut bytes: Vec<u8> = (0..e.bytes_for(elements)).map(|_| byte()).collect();
    let (scale, at) = match e {
        Encoding::IQ1S => (0.004, 0),
        Encoding::IQ1M => (0.004, 48),
        Encoding::TQ1_0 => (0.03, 52),
        Encoding::TQ2_0 => (0.03, 64),
        _ => (0.0005, 0),
    };
    let bits = f16::from_f32(scale).to_bits();
    for block in bytes.chunks_exact_mut(e.block_bytes()) {
        if e == Encoding::IQ1M {
            let nibble = |i: usize| (bits >> (4 * i)) as u8 & 15;
            for i in 0..4 {
                let byte = &mut block[at + 2 * i + 1];
                *byte = *byte & 15 | nibble(i) << 4;
            }
        } else {
            block[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        }
    }
    bytes
}

#[test]
fn lattice_tensors_run_as_the_values_that_they_stand_for() {
    let mut model = Model::open(&first().file("broken-Q8_0")).unwrap();
    let mut plain = Model::open(&first().file("broken-Q8_0")).unwrap();
    let in_blocks = |t: &&Tensor| t.name.starts_with("blk") && t.dims.len() == 2;
    let matrices: Vec<Tensor> = model.file.tensors().iter().filter(in_blocks).cloned().collect();
    let types: Vec<Encoding> = lattices().collect();
    for (i, t) in matrices.into_iter().enumerate() {
        let (tensor, n) = (t.name.clone(), t.elements() as usize);
        let e = types[i % types.len()];
        let bytes = random_blocks(e, n, i as u64);
        let mut values = vec![0.0; n];
        e.decode(&bytes, &mut values);
        let floats = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        model.replaced.push(Replacement { tensor: tensor.clone(), encoding: Some(e), bytes });
        plain.replaced.push(Replacement { tensor, encoding: Some(Encoding::F32), bytes: floats });
    }
    let states = |model: &Model| {
        let sequences = [vec![0, 17, 93, 1200, 7], vec![0, 4000, 250]];
        let compute = Compute::cpu();
        let runner = Runner::new(model, &compute, None, 1 << 30, &Silent);
        runner.run(&sequences, &[], &[(0, 2), (0, 4), (1, 2)], &mut ()).unwrap()
    };
    let (found, expected) = (states(&model), states(&plain));
    assert!(expected.iter().all(|x| x.is_finite()) && expected.iter().any(|x| x.abs() > 0.1));
    assert_eq!(found, expected);
}

#[test]
fn no_edit_is_folded_into_a_lattice() {
    for e in lattices() {
        let bytes = random_blocks(e, 2 * 256, 1);
        let w = Matrix { rows: 2, cols: 256, encoding: e.into(), bytes: &bytes };
        let failed = fold(&w, &[1.0, 1.0], &[0.1; 256]);
        assert!(matches!(&failed, Err(Error::Unsupported { what, .. }) if what.contains(e.name())));
    }
}

/// Encodes weights as IQ3_S: every four take the nearest point, and the scale of 32 nearly reaches
/// the largest of them.
fn iq3_s(values: &[f32]) -> Vec<u8> {
    let e = Encoding::IQ3S;
    // All 512 points, decoded from blocks that hold them in order with a scale of one.
    let points: Vec<f32> = (0..8u16)
        .flat_map(|b| {
            let mut block = vec![0u8; e.block_bytes()];
            block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
            (0..64).for_each(|i| block[2 + i] = (64 * b) as u8 + i as u8);
            block[66..74].fill(if b < 4 { 0 } else { 255 });
            let mut out = vec![0.0; 256];
            e.decode(&block, &mut out);
            out
        })
        .collect();
    let mut bytes = vec![0u8; e.bytes_for(values.len())];
    for (x, block) in values.chunks_exact(256).zip(bytes.chunks_exact_mut(e.block_bytes())) {
        let peak = |x: &[f32]| x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        let d = f16::from_f32(peak(x) / 15.0 / 31.0);
        block[..2].copy_from_slice(&d.to_le_bytes());
        for (g, x) in x.chunks_exact(32).enumerate() {
            let most = peak(x) / 13.0 / d.to_f32().max(1e-9);
            let scale = ((most - 1.0) / 2.0).round().clamp(0.0, 15.0);
            block[106 + g / 2] |= (scale as u8) << (4 * (g % 2));
            let step = d.to_f32() * (1.0 + 2.0 * scale);
            for (i, x) in x.chunks_exact(4).enumerate() {
                let error = |p: &[f32]| -> f32 {
                    let off = p.iter().zip(x).map(|(p, x)| p * step - x.abs());
                    off.map(|e| e * e).sum()
                };
                let errors = points.chunks_exact(4).map(error).enumerate();
                let nearest = errors.min_by(|a, b| a.1.total_cmp(&b.1));
                let index = nearest.unwrap().0;
                block[2 + 8 * g + i] = index as u8;
                block[66 + g] |= ((index >> 8) as u8) << i;
                for (j, x) in x.iter().enumerate() {
                    block[74 + 4 * g + i / 2] |= u8::from(*x < 0.0) << (4 * (i % 2) + j);
                }
            }
        }
    }
    bytes
}

/// The broken organism with every matrix that a patch may touch in IQ3_S.
fn with_lattice_writers(out: &Path) {
    let source = Gguf::open(&first().file("broken-Q8_0")).unwrap();
    let mut plan = Plan::new(&source);
    for t in source.tensors() {
        if !t.name.contains("attn_output.weight") && !t.name.contains("ffn_down.weight") {
            continue;
        }
        let mut values = vec![0.0; t.elements() as usize];
        Encoding::from_ggml(t.type_id).unwrap().decode(source.bytes(t), &mut values);
        let type_id = Encoding::IQ3S.ggml_id();
        plan.patches.push(Patch { tensor: t.name.clone(), bytes: iq3_s(&values), type_id });
    }
    write(&plan, out, false, &Silent).unwrap();
}

#[test]
fn an_edit_raises_the_lattice_tensors_that_it_touches_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (dir.path().join("in.gguf"), dir.path().join("out.gguf"));
    with_lattice_writers(&input);
    let few = few_prompts(dir.path());
    let wide = ["--layers", "3", "--strength", "1", "--max-kl", "1", "--max-over-refusal", "1"];
    let files = [text(&input), text(&out)];
    let job = |more: &[&str]| run(&[&files[..], &wide, &words(&few), more].concat());

    let (code, kept) = job(&["--encoding", "keep"]);
    assert_eq!((code, &kept["outcome"]), (3, &"out-of-limits".into()));
    let why = kept["why"].as_str().unwrap();
    assert!(why.contains("(IQ3_S) stands for several weights"), "{why}");
    assert!(why.contains("use --encoding auto"), "{why}");
    assert!(!out.exists());

    let (code, report) = job(&[]);
    assert_eq!((code, &report["outcome"]), (0, &"patched".into()), "{report}");
    let tensors = report["tensors"].as_array().unwrap();
    assert!(!tensors.is_empty());
    let (a, b) = (Gguf::open(&input).unwrap(), Gguf::open(&out).unwrap());
    let hashes = |g: &Gguf| sha256_tensors(g, &Silent).unwrap();
    for ((t, x), y) in b.tensors().iter().zip(hashes(&a)).zip(hashes(&b)) {
        let touched = tensors.iter().find(|r| r["tensor"] == *t.name);
        assert_eq!(x != y, touched.is_some(), "{}", t.name);
        if let Some(r) = touched {
            println!("{}: {}, {}", t.name, r["encoding"], r["achieved"]);
            assert_eq!(r["encoding"]["before"], "IQ3_S");
            assert!(["Q4_K", "Q5_K", "Q6_K", "Q8_0"].contains(&&t.type_name()[..]), "{r}");
            assert!((0.98..=1.02).contains(&r["achieved"].as_f64().unwrap()), "{r}");
        }
    }
    let (_, before) = run(&["inspect", text(&input)]);
    let could = before["could_touch"].as_array().unwrap();
    assert!(could.iter().all(|t| t["type"] == "IQ3_S" && t["steppable"] == false), "{could:?}");

    for model in [&input, &out] {
        let (_, eval) = run(&[&["eval", text(model)][..], &words(&few)].concat());
        let rate = |set: &str| eval["summary"][set]["refusal_rate"].as_f64().unwrap();
        let Some(theirs) = llama_cpp(model, &eval, dir.path(), &[]) else { return };
        let ours = (rate("harmful"), rate("harmless"));
        println!("{}: here {ours:?}, llama.cpp {theirs:?}", model.display());
        assert!((ours.0 - theirs.0).abs() <= 0.05 && (ours.1 - theirs.1).abs() <= 0.05);
    }
}
