//! Every architecture, as a folder and as a GGUF file, against what transformers and llama.cpp
//! compute with it (fixtures/architectures/README.md).

use std::fs;
use std::path::{Path, PathBuf};

use refusal_patch::arch::{Role, Writer};
use refusal_patch::edit::{Edit, RankOne};
use refusal_patch::encoding::Encoding;
use refusal_patch::forward::{Compute, Fork, Head, Row, Runner, Site, Tap};
use refusal_patch::model::{Model, Part, Replacement};
use refusal_patch::num::dot;
use refusal_patch::progress::Silent;
use serde_json::Value;

const MEMORY: usize = 1 << 30;
/// Their activation is GELU, which llama.cpp looks up in a table of 16-bit floats.
const WITH_GELU: [&str; 5] = ["gemma", "gemma2", "gemma3", "gemma4", "gemma4-moe"];
const ALL: [&str; 24] = [
    "gemma",
    "gemma2",
    "gemma3",
    "gemma4",
    "gemma4-moe",
    "phi3",
    "llama-fused",
    "llama-yarn",
    "mistral3",
    "olmo2",
    "olmo3",
    "olmoe",
    "granite",
    "minicpm",
    "smollm3",
    "ernie4_5",
    "exaone4",
    "glm4",
    "glm4v",
    "qwen3vl",
    "qwen35",
    "qwen35moe",
    "gpt-oss",
    "glm4moe",
];
/// Without a GGUF file.
const FOLDERS: [&str; 2] = ["exaone4-windows", "gpt-oss-mxfp4"];
/// A norm or a factor follows their writers.
const BEHIND: [&str; 8] =
    ["gemma2", "gemma3", "gemma4", "gemma4-moe", "olmo2", "granite", "exaone4", "glm4"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name)
}

fn both(name: &str) -> [Model; 2] {
    [fixture(name), fixture(&format!("{name}.gguf"))].map(|path| Model::open(&path).unwrap())
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(&format!("{name}.json"))).unwrap()).unwrap()
}

fn list(v: &Value) -> &[Value] {
    v.as_array().unwrap()
}

fn sequences(golden: &Value) -> Vec<Vec<u32>> {
    let ids = |s: &Value| list(s).iter().map(|t| t.as_u64().unwrap() as u32).collect::<Vec<_>>();
    list(&golden["sequences"]).iter().map(ids).collect()
}

fn every_position(sequences: &[Vec<u32>]) -> Vec<(usize, usize)> {
    let of = |(i, s): (usize, &Vec<u32>)| (0..s.len()).map(move |p| (i, p)).collect();
    sequences.iter().enumerate().flat_map(|s| -> Vec<(usize, usize)> { of(s) }).collect()
}

fn states(model: &Model, edit: Option<&Edit>, sequences: &[Vec<u32>]) -> Vec<f32> {
    let compute = Compute::cpu();
    let runner = Runner::new(model, &compute, edit, MEMORY, &Silent);
    runner.run(sequences, &[], &every_position(sequences), &mut ()).unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The largest difference from a reference's log-probabilities of its ten likeliest tokens, over
/// all positions.
fn apart(model: &Model, golden: &Value, reference: &str) -> f32 {
    let sequences = sequences(golden);
    let hidden = states(model, None, &sequences);
    let expected: Vec<&[Value]> =
        list(&golden[reference]).iter().flat_map(list).map(list).collect();
    let id = |t: &Value| t[0].as_u64().unwrap() as u32;
    let ids: Vec<Vec<u32>> = expected.iter().map(|p| p.iter().map(id).collect()).collect();
    let compute = Compute::cpu();
    let reads = Head::new(model, &compute).unwrap().read(&hidden, 1, |i| &ids[i]).unwrap();
    let mut worst = 0.0f32;
    for (read, expected) in reads.iter().zip(&expected) {
        for (found, t) in read.asked.iter().zip(*expected) {
            worst = worst.max((found - t[1].as_f64().unwrap() as f32).abs());
        }
    }
    worst
}

#[test]
fn folders_and_files_agree_with_transformers_and_llama_cpp() {
    for name in ALL {
        let golden = golden(name);
        let rounded = WITH_GELU.contains(&name);
        for (model, what) in both(name).iter().zip(["folder", "GGUF"]) {
            let torch = apart(model, &golden, "transformers");
            let llama = apart(model, &golden, "llama_cpp_f32");
            println!("{name} as {what}: transformers {torch:.1e}, llama.cpp {llama:.1e}");
            assert!(torch < 1e-4, "{name} as {what}: {torch}");
            assert!(llama < if rounded { 1e-2 } else { 1e-4 }, "{name} as {what}: {llama}");
        }
    }
}

#[test]
fn a_tensor_that_the_decoder_has_no_place_for_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let bytes = fs::read(fixture("gemma2.gguf")).unwrap();
    for (known, odd) in [
        ("blk.1.post_attention_norm.weight", "blk.1.attn_sinks_norm_123.weight"),
        ("blk.2.attn_q.weight", "blk.2.attn_z.weight"),
    ] {
        let at = bytes.windows(known.len()).position(|w| w == known.as_bytes()).unwrap();
        let mut new = bytes.clone();
        new[at..at + odd.len()].copy_from_slice(odd.as_bytes());
        fs::write(&path, new).unwrap();
        let e = Model::open(&path).map(drop).unwrap_err().to_string();
        assert!(
            e.contains(&format!("tensor {odd} can't be applied")) && e.contains("gemma2"),
            "{e}"
        );
        assert_eq!(e.lines().count(), 1);
    }
    // The name of the architecture decides: a tensor that another architecture has is refused, too.
    let text = fs::read_to_string(fixture("olmo2").join("config.json")).unwrap();
    fs::write(dir.path().join("config.json"), text.replace("olmo2", "qwen2")).unwrap();
    fs::copy(fixture("olmo2/model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let e = Model::open(dir.path()).map(drop).unwrap_err().to_string();
    assert!(e.contains("can't be applied") && e.contains("norm.weight"), "{e}");
}

#[test]
fn an_architecture_that_is_not_known_says_what_it_is_and_what_can_be_done() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let mut bytes = fs::read(fixture("gemma2.gguf")).unwrap();
    let at = bytes.windows(6).position(|w| w == b"gemma2").unwrap();
    for (name, saying) in [(b"gptoss", "Ollama's own layout"), (b"llama4", "attention is chunked")]
    {
        bytes[at..at + 6].copy_from_slice(name);
        fs::write(&path, &bytes).unwrap();
        let e = Model::open(&path).map(drop).unwrap_err().to_string();
        let name = format!("architecture {}", name.escape_ascii());
        let all = [&name, saying, "supported: llama,"];
        assert!(all.iter().all(|part| e.contains(part)) && e.lines().count() == 1, "{e}");
    }
}

/// Rope in blocks with a window only; experts in MXFP4 and a range of YaRN that is not rounded.
#[test]
fn what_llama_cpp_does_not_run_agrees_with_transformers() {
    for name in FOLDERS {
        let model = Model::open(&fixture(name)).unwrap();
        let torch = apart(&model, &golden(name), "transformers");
        println!("{name}: {torch:.1e}");
        assert!(torch < 1e-4, "{name}: {torch}");
    }
}

fn wave(n: usize, f: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * f).sin() * 0.3).collect()
}

fn edit(model: &Model, layer: usize, writer: Writer) -> Edit {
    let (u, v) = (wave(model.spec.hidden, 0.7), wave(model.spec.columns(layer, writer), 1.3));
    vec![RankOne { layer, writer, u, v }]
}

/// The writers of a block that hold one matrix.
fn writers(model: &Model, layer: usize) -> Vec<Writer> {
    let mut all = model.spec.writers(layer).to_vec();
    all.retain(|w| *w != Writer::Experts);
    all
}

/// A writer's tensors with an edit added.
fn folded(model: &Model, term: &RankOne) -> Vec<Replacement> {
    let new = |part: Part| {
        let (mut bytes, mut row) = (Vec::new(), vec![0.0f32; part.stack.shape().1]);
        for (w, v) in part.stack.iter().zip(part.gate(&term.v).chunks_exact(row.len())) {
            for (i, u) in term.u.iter().enumerate() {
                w.decode_row(i, &mut row);
                bytes.extend(row.iter().zip(v).flat_map(|(x, v)| (x + u * v).to_le_bytes()));
            }
        }
        Replacement { tensor: part.tensor, encoding: Some(Encoding::F32), bytes }
    };
    model.parts(term.layer, term.writer).unwrap().into_iter().map(new).collect()
}

#[test]
fn an_edit_equals_the_edited_weights_under_norms_and_biases_and_of_experts() {
    for name in ALL {
        let tokens = sequences(&golden(name));
        for mut model in both(name) {
            let layers = [0, 1, model.spec.layers - 1];
            let all = layers.map(|l| model.spec.writers(l).iter().map(move |w| (l, *w)));
            for (layer, writer) in all.into_iter().flatten() {
                let edit = edit(&model, layer, writer);
                let found = states(&model, Some(&edit), &tokens);
                let plain = states(&model, None, &tokens);
                model.replaced = folded(&model, &edit[0]);
                let expected = states(&model, None, &tokens);
                model.replaced.clear();
                let (off, moved) = (worst(&found, &expected), worst(&plain, &expected));
                assert!(off < 1e-3 && moved > 0.05, "{name} {layer} {writer:?}: {off}, {moved}");
            }
        }
    }
}

/// The input of a writer of a block, what its norms read, and the residual stream after the block,
/// at one token.
struct Watch {
    at: (usize, Writer),
    pos: usize,
    read: Vec<f32>,
    normed: Vec<(Role, Vec<f32>)>,
    stream: Vec<f32>,
}

impl Tap for Watch {
    fn writer_input(&mut self, site: Site, rows: &[Row], x: &[f32], width: usize) {
        if (site.layer, site.writer) == self.at {
            let i = rows.iter().position(|r| r.pos == self.pos).unwrap();
            self.read = x[i * width..(i + 1) * width].to_vec();
        }
    }
    fn norm_behind(&mut self, layer: usize, norm: Role, rows: &[Row], y: &[f32]) {
        if layer == self.at.0 {
            let i = rows.iter().position(|r| r.pos == self.pos).unwrap();
            self.normed.push((norm, y.chunks_exact(y.len() / rows.len()).nth(i).unwrap().to_vec()));
        }
    }
    fn residual(&mut self, layer: usize, rows: &[Row], x: &[f32], width: usize) {
        if layer == self.at.0 {
            let i = rows.iter().position(|r| r.pos == self.pos).unwrap();
            self.stream = x[i * width..(i + 1) * width].to_vec();
        }
    }
}

#[test]
fn the_vector_written_for_a_direction_adds_it_after_the_norm() {
    // In the other model per-layer embeddings read what was written, and write after it.
    for name in BEHIND.into_iter().filter(|name| *name != "gemma4") {
        let tokens = sequences(&golden(name))[1].clone();
        let [model, _] = both(name);
        let compute = Compute::cpu();
        // The last writer of the block: nothing else of the block moves.
        let (layer, writer) = (1, Writer::Ffn);
        let run = |edit: Option<&Edit>| {
            let (read, normed, stream) = (Vec::new(), Vec::new(), Vec::new());
            let mut watch = Watch { at: (layer, writer), pos: 9, read, normed, stream };
            let runner = Runner::new(&model, &compute, edit, MEMORY, &Silent);
            runner.run(std::slice::from_ref(&tokens), &[], &[], &mut watch).unwrap();
            watch
        };
        let before = run(None);
        let post_norm = model.post_norm(layer, writer).unwrap().unwrap();
        let (_, w) = model.writer(layer, writer).unwrap();
        let y = compute.matmul(&before.read, 1, &w).unwrap();
        // What the norms divide by, and directions that change it.
        let (mut rms, mut inner) = (1.0, vec![1.0; y.len()]);
        let mut backs: Vec<Vec<f32>> = Vec::new();
        let norms = model.spec.post_norms(layer, writer);
        for norm in norms {
            let (_, read) = before.normed.iter().find(|(role, _)| role == norm).unwrap();
            rms *= (dot(read, read) / read.len() as f32).sqrt();
            let weighed: Vec<f32> = read.iter().zip(&inner).map(|(x, w)| x * w).collect();
            backs.push(post_norm.write_direction(&weighed, 1.0));
            inner = model.norm(*norm, layer).unwrap();
        }
        // A direction that keeps these lengths; else the norms take a share back.
        let mut unit = wave(y.len(), 0.7);
        for _ in 0..20 {
            for back in &backs {
                let share = dot(&unit, back) / dot(back, back);
                unit.iter_mut().zip(back).for_each(|(u, b)| *u -= share * b);
            }
        }
        let small: Vec<f32> = unit.iter().map(|u| 0.01 * u).collect();
        let open = dot(&before.read, &before.read);
        let v: Vec<f32> = before.read.iter().map(|x| x / open).collect();
        let u = post_norm.write_direction(&small, f64::from(rms));
        let after = run(Some(&vec![RankOne { layer, writer, u, v }]));
        let added: Vec<f32> =
            after.stream.iter().zip(&before.stream).map(|(a, b)| (a - b) / 0.01).collect();
        let (off, length) = (worst(&added, &unit), dot(&unit, &unit).sqrt());
        assert!(off < 0.05 * length, "{name}: {off} of {length}");
        // `read_direction` gives the share of a direction of the stream in the product. Without the
        // product a second norm would divide by something else.
        if norms.len() > 1 {
            continue;
        }
        let seen = dot(&post_norm.read_direction(&unit), &y)
            / if post_norm.has_norm() { rms } else { 1.0 };
        let zero = vec![RankOne {
            layer,
            writer,
            u: y,
            v: before.read.iter().map(|x| -x / open).collect(),
        }];
        let without = run(Some(&zero));
        let share: Vec<f32> =
            before.stream.iter().zip(&without.stream).map(|(a, b)| a - b).collect();
        assert!((dot(&share, &unit) - seen).abs() < 1e-3 * length, "{name}: {seen}");
    }
}

#[test]
fn a_constant_is_added_after_the_norm() {
    for name in BEHIND {
        let tokens = sequences(&golden(name));
        let [model, _] = both(name);
        let last = model.spec.layers - 1;
        // So large that a norm or a factor applied to it would show.
        let u: Vec<f32> = wave(model.spec.hidden, 0.7).iter().map(|x| x * 1e6).collect();
        let edit = vec![RankOne { layer: last, writer: Writer::Ffn, u: u.clone(), v: Vec::new() }];
        let found = states(&model, Some(&edit), &tokens);
        // Nothing but the constant is left of the state.
        let mean = u.iter().map(|x| x * x).sum::<f32>() / u.len() as f32;
        let weight = model.output_norm().unwrap();
        let expected: Vec<f32> = u.iter().zip(&weight).map(|(x, w)| x / mean.sqrt() * w).collect();
        let off = found.chunks_exact(u.len()).map(|x| worst(x, &expected)).fold(0.0, f32::max);
        assert!(off < 1e-3, "{name}: {off}");
    }
}

#[test]
fn a_row_says_the_same_alone_after_a_shared_prefix_as_a_fork_and_half_way() {
    for name in ALL {
        let golden = sequences(&golden(name));
        let with = |rest: &[u32]| [&golden[1][..], rest].concat();
        let texts = [with(&golden[0]), with(&golden[2][..9]), with(&golden[2][3..4])];
        let [model, _] = both(name);
        let compute = Compute::cpu();
        let runner = Runner::new(&model, &compute, None, MEMORY, &Silent);
        let last: Vec<(usize, usize)> = (0..3).map(|i| (i, texts[i].len() - 1)).collect();
        let alone: Vec<f32> = (0..3)
            .flat_map(|i| runner.run(&texts[i..=i], &[], &[(0, last[i].1)], &mut ()).unwrap())
            .collect();
        // An edit of nothing, from the first block on.
        let writer = writers(&model, 0)[0];
        let (u, v) = (vec![0.0; model.spec.hidden], vec![0.0; model.spec.columns(0, writer)]);
        let nothing = vec![RankOne { layer: 0, writer, u, v }];
        let forks: Vec<Fork> =
            last.iter().map(|&(seq, pos)| Fork { seq, pos, edit: &nothing }).collect();
        let both = runner.run(&texts, &forks, &last, &mut ()).unwrap();
        let (together, forked) = both.split_at(alone.len());
        for (what, found) in [("together", together), ("fork", forked)] {
            let off = worst(found, &alone);
            assert!(off < 1e-4, "{name}, {what}: {off}");
        }
        for layer in 1..model.spec.layers {
            let begun = runner.begin(texts.to_vec(), layer).unwrap();
            let off = worst(&runner.resume(&begun, &last).unwrap(), &alone);
            assert!(off < 1e-4, "{name}, from {layer}: {off}");
            let at_once = runner.resume(&begun, &last).unwrap();
            for further in layer + 1..model.spec.layers {
                let later = runner.advance(&begun, further).unwrap();
                let found = runner.resume(&later, &last).unwrap();
                assert_eq!(found, at_once, "{name}, from {layer}, then {further}");
            }
        }
        let many = runner.generate(&texts, 12, &|_| false).unwrap();
        for (text, of_many) in texts.iter().zip(&many) {
            let one = runner.generate(std::slice::from_ref(text), 12, &|_| false).unwrap();
            assert_eq!(one[0].tokens, of_many.tokens, "{name}");
        }
    }
}

#[test]
fn windows_hold_for_forks_and_while_answering() {
    for name in ALL {
        let tokens = sequences(&golden(name));
        let [model, _] = both(name);
        let compute = Compute::cpu();
        let last = model.spec.layers - 1;
        let edit = edit(&model, last, *model.spec.writers(last).last().unwrap());
        let under = |edit| Runner::new(&model, &compute, edit, MEMORY, &Silent);
        let runner = under(None);
        // Forks that join at the first block go along with those that join at the last.
        let writer = writers(&model, 0)[0];
        let (u, v) = (vec![0.0; model.spec.hidden], vec![0.0; model.spec.columns(0, writer)]);
        let nothing = vec![RankOne { layer: 0, writer, u, v }];
        let forks: Vec<Fork> = (0..3)
            .flat_map(|seq| [(seq, &edit), (seq, &nothing)])
            .map(|(seq, edit)| Fork { seq, pos: tokens[seq].len() - 1, edit })
            .collect();
        let found = runner.run(&tokens, &forks, &[], &mut ()).unwrap();
        for (f, found) in forks.iter().zip(found.chunks_exact(model.spec.hidden)) {
            let whole = tokens[f.seq].clone();
            let expected = under(Some(f.edit)).run(&[whole], &[], &[(0, f.pos)], &mut ()).unwrap();
            assert!(worst(found, &expected) < 1e-4, "{name}: {}", worst(found, &expected));
        }
        let head = Head::new(&model, &compute).unwrap();
        let generated = runner.generate(&tokens[..1], 20, &|_| false).unwrap();
        let mut text = tokens[0].clone();
        for &next in &generated[0].tokens {
            let at = (0, text.len() - 1);
            let hidden = runner.run(&[text.clone()], &[], &[at], &mut ()).unwrap();
            let top = &head.read(&hidden, 2, |_| &[]).unwrap()[0].top;
            assert!(next == top[0].0 || top[0].1 - top[1].1 < 1e-3, "{name}");
            text.push(next);
        }
    }
}
