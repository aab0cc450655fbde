//! The layer-streamed decoder against transformers and llama.cpp on random-weight models of odd
//! shapes (tests/data/forward/README.md).

use std::path::{Path, PathBuf};

use refusal_patch::arch::Writer;
use refusal_patch::edit::{Edit, RankOne};
use refusal_patch::forward::{Compute, Fork, Head, Row, Runner, Tap};
use refusal_patch::model::Model;
use refusal_patch::num::dot;
use refusal_patch::progress::Silent;
use serde_json::Value;

const MEMORY: usize = 1 << 30;
/// Mixtral, a shared expert, 2 of 8 experts used.
const WITH_EXPERTS: [&str; 3] = ["mixtral", "qwen2moe", "qwen3moe"];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/forward").join(name)
}

fn golden(name: &str) -> (Model, Value) {
    let model = Model::open(&data(&format!("{name}.gguf"))).unwrap();
    let json =
        serde_json::from_str(&std::fs::read_to_string(data(&format!("{name}.json"))).unwrap())
            .unwrap();
    (model, json)
}

fn sequences(json: &Value) -> Vec<Vec<u32>> {
    let ids = |s: &Value| {
        s.as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect::<Vec<_>>()
    };
    json["sequences"].as_array().unwrap().iter().map(ids).collect()
}

fn every_position(sequences: &[Vec<u32>]) -> Vec<(usize, usize)> {
    sequences.iter().enumerate().flat_map(|(i, s)| (0..s.len()).map(move |p| (i, p))).collect()
}

fn states(model: &Model, edit: Option<&Edit>, sequences: &[Vec<u32>], memory: usize) -> Vec<f32> {
    let compute = Compute::cpu();
    let runner = Runner::new(model, &compute, edit, memory, &Silent);
    runner.run(sequences, &[], &every_position(sequences), &mut ()).unwrap()
}

/// Largest difference of log-probabilities to a reference over its ten top tokens at every
/// position, and how often the likeliest token differs where the reference's first two are apart.
fn compare(name: &str, reference: &str) -> (f32, usize) {
    let (model, json) = golden(name);
    let sequences = sequences(&json);
    let hidden = states(&model, None, &sequences, MEMORY);
    let expected: Vec<Vec<(u32, f32)>> = json[reference]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|s| s.as_array().unwrap())
        .map(|p| {
            p.as_array()
                .unwrap()
                .iter()
                .map(|t| (t[0].as_u64().unwrap() as u32, t[1].as_f64().unwrap() as f32))
                .collect()
        })
        .collect();
    let ids: Vec<Vec<u32>> = expected.iter().map(|p| p.iter().map(|t| t.0).collect()).collect();
    let compute = Compute::cpu();
    let reads = Head::new(&model, &compute).unwrap().read(&hidden, 2, |i| &ids[i]).unwrap();
    let mut worst = 0.0f32;
    let mut wrong = 0;
    for (read, expected) in reads.iter().zip(&expected) {
        for (found, (_, lp)) in read.asked.iter().zip(expected) {
            worst = worst.max((found - lp).abs());
        }
        wrong +=
            usize::from(expected[0].1 - expected[1].1 > 0.05 && read.top[0].0 != expected[0].0);
    }
    println!("{name} against {reference}: max |difference of log-probability| {worst:.2e}");
    (worst, wrong)
}

#[test]
fn every_architecture_agrees_with_transformers() {
    let dense =
        ["llama3", "llama-linear", "mistral", "qwen2", "qwen3", "llama-q8_0", "llama-k-quants"];
    for name in dense.into_iter().chain(WITH_EXPERTS) {
        let (worst, wrong) = compare(name, "transformers");
        assert!(worst < 1e-3, "{name}: {worst}");
        assert_eq!(wrong, 0, "{name}");
    }
}

#[test]
fn f16_models_agree_with_llama_cpp() {
    for name in
        ["llama3", "llama-linear", "mistral", "qwen2", "qwen3"].into_iter().chain(WITH_EXPERTS)
    {
        let (worst, wrong) = compare(name, "llama_cpp");
        // Of the two with qk norms llama.cpp itself is 0.021 away from transformers at most.
        assert!(worst < 0.025, "{name}: {worst}");
        assert_eq!(wrong, 0, "{name}");
        // The same weights as F32, where llama.cpp does not round activations.
        assert!(compare(name, "llama_cpp_f32").0 < 1e-3, "{name}");
    }
}

#[test]
fn many_small_batches_give_the_same_states_as_one() {
    for name in ["qwen2", "qwen2moe"] {
        let (model, json) = golden(name);
        let sequences = sequences(&json);
        let one = states(&model, None, &sequences, MEMORY);
        let many = states(&model, None, &sequences, 1);
        let worst = one.iter().zip(&many).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{name}: {worst}");
    }
}

#[test]
fn generation_with_a_cache_equals_running_the_whole_text_again() {
    for name in ["llama3", "qwen3", "mixtral"] {
        let (model, json) = golden(name);
        let sequences = sequences(&json);
        let compute = Compute::cpu();
        let runner = Runner::new(&model, &compute, None, MEMORY, &Silent);
        let head = Head::new(&model, &compute).unwrap();
        let generated = runner.generate(&sequences, 12, &|_| false).unwrap();
        for (s, g) in sequences.iter().zip(&generated) {
            assert_eq!(g.tokens.len(), 12);
            let mut text = s.clone();
            for &next in &g.tokens {
                let hidden =
                    runner.run(&[text.clone()], &[], &[(0, text.len() - 1)], &mut ()).unwrap();
                let top = &head.read(&hidden, 2, |_| &[]).unwrap()[0].top;
                assert!(next == top[0].0 || top[0].1 - top[1].1 < 1e-3, "{name}");
                text.push(next);
            }
        }
        // An answer stops before the token that ends it.
        let end = generated[1].tokens[3];
        let stopped = runner.generate(&sequences[1..2], 12, &|t| t == end).unwrap();
        assert_eq!(stopped[0].end, Some(end));
        assert!(stopped[0].tokens.len() <= 3);
    }
}

fn edit(model: &Model, layer: usize, writer: Writer) -> Edit {
    let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin() * 0.3).collect::<Vec<f32>>();
    vec![RankOne {
        layer,
        writer,
        u: wave(model.spec.hidden, 0.7),
        v: wave(model.spec.columns(layer, writer), 1.3),
    }]
}

#[test]
fn an_edit_of_a_sequence_equals_the_edited_weights() {
    use refusal_patch::encoding::Encoding;
    use refusal_patch::model::Replacement;
    for (name, writer) in [
        ("llama3", Writer::Ffn),
        ("qwen2", Writer::Attention),
        ("mixtral", Writer::Attention),
        ("mixtral", Writer::Experts),
        ("qwen2moe", Writer::Shared),
        ("qwen2moe", Writer::Experts),
    ] {
        let (mut model, json) = golden(name);
        let edit = edit(&model, 1, writer);
        let plain = sequences(&json);
        let found = states(&model, Some(&edit), &plain, MEMORY);
        let term = &edit[0];
        let parts = model.parts(1, writer).unwrap();
        let mut bytes = Vec::new();
        for (w, v) in parts[0].stack.iter().zip(term.v.chunks(parts[0].stack.shape().1)) {
            let mut row = vec![0.0f32; w.cols];
            for i in 0..w.rows {
                w.decode_row(i, &mut row);
                row.iter()
                    .zip(v)
                    .for_each(|(x, v)| bytes.extend((x + term.u[i] * v).to_le_bytes()));
            }
        }
        let tensor = parts[0].tensor.clone();
        model.replaced.push(Replacement { tensor, encoding: Some(Encoding::F32), bytes });
        let expected = states(&model, None, &plain, MEMORY);
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let plain = states(&model.with(Vec::new()).unwrap(), None, &plain, MEMORY);
        let moved = plain.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-3 && moved > 0.1, "{name} {writer:?}: {worst}, moved {moved}");
    }
}

#[test]
fn a_fork_costs_a_row_and_equals_the_sequence_whose_edit_fires_there_only() {
    // An edit of the last layer changes no keys that a later layer reads: a fork at the last
    // position is exact.
    for (name, ffn) in [("llama3", Writer::Ffn), ("mixtral", Writer::Experts)] {
        let (model, json) = golden(name);
        let last = model.spec.layers - 1;
        let edits = [edit(&model, last, Writer::Attention), edit(&model, last, ffn)];
        let plain = sequences(&json);
        let forks: Vec<Fork> = (0..plain.len())
            .flat_map(|seq| edits.iter().map(move |e| (seq, e)))
            .map(|(seq, edit)| Fork { seq, pos: plain[seq].len() - 1, edit })
            .collect();
        let compute = Compute::cpu();
        let under = |edit| Runner::new(&model, &compute, edit, MEMORY, &Silent);
        let found = under(None).run(&plain, &forks, &[], &mut ()).unwrap();
        let d = model.spec.hidden;
        for (i, f) in forks.iter().enumerate() {
            let s = plain[f.seq].clone();
            let expected = under(Some(f.edit)).run(&[s], &[], &[(0, f.pos)], &mut ()).unwrap();
            let worst = found[i * d..(i + 1) * d]
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst < 1e-4, "fork {i}: {worst}");
            assert!(dot(&expected, &expected) > 0.0);
        }
    }
}

#[test]
fn a_token_outside_of_the_vocabulary_is_an_error() {
    let (model, _) = golden("llama3");
    let compute = Compute::cpu();
    let runner = Runner::new(&model, &compute, None, MEMORY, &Silent);
    let e = runner.run(&[vec![1, 999_999]], &[], &[(0, 0)], &mut ()).unwrap_err();
    assert!(e.to_string().contains("999999"), "{e}");
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The golden sequences after one common beginning, and their last positions.
fn alike(json: &Value) -> (Vec<Vec<u32>>, Vec<(usize, usize)>) {
    let plain = sequences(json);
    let begin = plain[0].clone();
    let all: Vec<Vec<u32>> = plain.iter().map(|s| [&begin[..], s].concat()).collect();
    let last = all.iter().enumerate().map(|(i, s)| (i, s.len() - 1)).collect();
    (all, last)
}

#[test]
fn a_common_beginning_runs_once_and_changes_no_state() {
    /// Sees every token of every sequence.
    struct Everything(usize);
    impl Tap for Everything {
        fn residual(&mut self, layer: usize, rows: &[Row], _x: &[f32], _width: usize) {
            self.0 += if layer == 0 { rows.len() } else { 0 };
        }
    }
    /// Sees the tokens that are run.
    struct Once(usize);
    impl Tap for Once {
        fn residual(&mut self, layer: usize, rows: &[Row], _x: &[f32], _width: usize) {
            self.0 += if layer == 0 { rows.len() } else { 0 };
        }
        fn shared(&self) -> usize {
            usize::MAX
        }
    }
    for name in ["llama3", "qwen3moe"] {
        let (model, json) = golden(name);
        let compute = Compute::cpu();
        let runner = Runner::new(&model, &compute, None, MEMORY, &Silent);
        let (all, last) = alike(&json);
        let (mut everything, mut once) = (Everything(0), Once(0));
        let apart = runner.run(&all, &[], &last, &mut everything).unwrap();
        let together = runner.run(&all, &[], &last, &mut once).unwrap();
        assert!(worst(&apart, &together) < 1e-4, "{name}: {}", worst(&apart, &together));
        let shared = sequences(&json)[0].len();
        assert!(
            once.0 + (all.len() - 1) * shared <= everything.0,
            "{} of {}",
            once.0,
            everything.0
        );
    }
}

#[test]
fn a_run_resumed_at_a_block_ends_like_a_whole_one() {
    for name in ["llama3", "mixtral"] {
        let (model, json) = golden(name);
        let layer = model.spec.layers - 1;
        let edit = edit(&model, layer, Writer::Attention);
        let compute = Compute::cpu();
        let (all, last) = alike(&json);
        for memory in [MEMORY, 1 << 16] {
            let under = |edit| Runner::new(&model, &compute, edit, memory, &Silent);
            let begun = under(None).begin(all.clone(), layer).unwrap();
            assert_eq!(begun.layer(), layer);
            for edit in [None, Some(&edit)] {
                let runner = under(edit);
                let whole = runner.run(&all, &[], &last, &mut ()).unwrap();
                let resumed = runner.resume(&begun, &last).unwrap();
                assert!(worst(&whole, &resumed) < 1e-4, "{name}: {}", worst(&whole, &resumed));
            }
            // A position that all sequences share can be asked for, too.
            let runner = under(Some(&edit));
            let (first, same) =
                (runner.resume(&begun, &[(0, 0)]), runner.resume(&begun, &[(1, 0)]));
            if memory == MEMORY {
                assert_eq!(first.unwrap(), same.unwrap());
            }
        }
    }
}
