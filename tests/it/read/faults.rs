//! An input that can't be used gets an error that names its fault. An input that can be used gets
//! none.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::alone;
use crate::common::folder::{named, organism, safetensors, tensors_of};
use crate::common::gguf::{file, listing, tensor, text, u32_entry};
use crate::common::record::record;
use assert_cmd::Command;
use refusal_patch::checkpoint::{Folder, Gguf, Value};
use refusal_patch::encoding::Encoding;
use refusal_patch::model::Model;
use refusal_patch::output::{check_copy, stage_folder, write, Plan};
use refusal_patch::progress::Silent;
use serde_json::json;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// The organism as a folder in two files.
fn two_files(dir: &Path) -> PathBuf {
    organism(dir, "organism-broken-Q8_0.gguf", Encoding::F16, 2)
}

#[track_caller]
fn says(result: Result<Model, refusal_patch::Error>, words: &[&str]) {
    let message = result.err().expect("should be refused").to_string();
    for w in words {
        assert!(message.contains(w), "`{message}` should say `{w}`");
    }
}

/// Changes a JSON file of a folder.
fn edit(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn a_name_in_the_index_that_no_file_has_matters_only_where_the_decoder_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_files(dir.path());
    let index = folder.join("model.safetensors.index.json");
    let last = "model-00002-of-00002.safetensors";
    edit(&index, |v| {
        for name in ["mtp.fc.weight", "model.layers.6.eh_proj.weight", "vision.patch.bias"] {
            v["weight_map"][name] = last.into();
        }
    });
    let model = Model::open(&folder).unwrap();
    let absent = model.file.folder().unwrap().absent();
    assert_eq!(absent.len(), 3);
    assert!(absent.contains(&("mtp.fc.weight".into(), last.into())));

    // A tensor that the decoder needs, and a tensor in another file than the index says.
    let file = Gguf::open(&fixture("organism-broken-Q8_0.gguf")).unwrap();
    let mut second = tensors_of(&file, Encoding::F16);
    second.drain(..second.len().div_ceil(2));
    let kept = fs::read(folder.join(last)).unwrap();
    let gone = second.iter().position(|t| t.name.ends_with("mlp.up_proj.weight")).unwrap();
    let needed = second.remove(gone).name;
    fs::write(folder.join(last), safetensors(&second)).unwrap();
    says(
        Model::open(&folder),
        &["the index says", &needed, last, "where it is not; download both"],
    );
    fs::write(folder.join(last), kept).unwrap();
    edit(&index, |v| {
        let map = v["weight_map"].as_object_mut().unwrap();
        let name = "model.embed_tokens.weight";
        let other =
            if map[name] == last { last.replace("00002-of", "00001-of") } else { last.into() };
        map.insert(name.into(), other.into());
    });
    says(Model::open(&folder), &["model.safetensors.index.json", "where it is not: it is in"]);
}

#[test]
fn a_configuration_with_pythons_literals_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_files(dir.path());
    let config = folder.join("config.json");
    let plain = fs::read_to_string(&config).unwrap();
    let with =
        |text: &str| fs::write(&config, plain.replacen('{', &format!("{{ {text},"), 1)).unwrap();
    with(
        r#""time_step_limit": [0.0, Infinity], "router_jitter_noise": NaN,
           "note": "NaN, -Infinity""#,
    );
    let model = Model::open(&folder).unwrap();
    assert_eq!(model.file.folder().unwrap().config()["note"], "NaN, -Infinity");
    with("\"min_value\": -Infinity");
    assert!(Model::open(&folder).is_ok());
    // NaN is no number that the decoder could use.
    fs::write(&config, plain.replace("\"rms_norm_eps\":", "\"rms_norm_eps\": NaN, \"x\":"))
        .unwrap();
    says(Model::open(&folder), &["config.json", "`rms_norm_eps` is \"NaN\"", "expected a number"]);
    fs::write(&config, format!("\u{feff}{plain}")).unwrap();
    says(Model::open(&folder), &["config.json", "byte order mark"]);
    with("\"a\": Nope");
    says(Model::open(&folder), &["config.json", "is not JSON", "line 1"]);
}

#[test]
fn a_key_that_the_configuration_leaves_out_is_to_be_added() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_files(dir.path());
    let config = folder.join("config.json");
    let plain = fs::read(&config).unwrap();
    for key in [
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
    ] {
        edit(&config, |v| drop(v.as_object_mut().unwrap().remove(key)));
        says(Model::open(&folder), &[&format!("config.json leaves `{key}` out; add it")]);
        edit(&config, |v| v[key] = json!(-1));
        says(Model::open(&folder), &[&format!("config.json: `{key}` is -1, expected a positive")]);
        fs::write(&config, &plain).unwrap();
    }
}

/// A fixture with one metadata key set.
fn with_key(dir: &Path, key: &str, value: Value) -> PathBuf {
    let source = Gguf::open(&fixture("organism-broken-Q4_K_M.gguf")).unwrap();
    let mut plan = Plan::new(&source);
    plan.metadata.push((key.into(), value));
    let out = dir.join("model.gguf");
    write(&plan, &out, true, &Silent).unwrap();
    out
}

#[test]
fn an_array_of_a_number_for_each_block_is_that_number_where_all_are_equal() {
    let dir = tempfile::tempdir().unwrap();
    let plain = Model::open(&fixture("organism-broken-Q4_K_M.gguf")).unwrap().spec.blocks[0];
    for (key, n) in
        [("feed_forward_length", plain.ffn), ("attention.head_count_kv", plain.kv_heads)]
    {
        let (key, n) = (format!("llama.{key}"), n as u32);
        let spec =
            Model::open(&with_key(dir.path(), &key, Value::u32s(&[n; 6]))).unwrap().spec.blocks[0];
        assert_eq!((spec.ffn, spec.kv_heads), (plain.ffn, plain.kv_heads));
        let mut all = [n; 6];
        all[4] *= 2;
        let path = with_key(dir.path(), &key, Value::u32s(&all));
        let range = format!("{n} to {}", 2 * n);
        says(Model::open(&path), &[&key, "one number for each block", &range, "can't be run"]);
    }
    let path = with_key(dir.path(), "llama.feed_forward_length", Value::u32s(&[]));
    says(Model::open(&path), &["llama.feed_forward_length is missing or not a positive number"]);
}

#[test]
fn a_file_that_goes_beside_a_model_is_no_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("beside.gguf");
    let tensors = [tensor("blk.0.attn_q.weight.lora_a", &[4, 2], 0, 32)];
    let llama = || text("general.architecture", "llama");
    let kind = |kind: &str| text("general.type", kind);
    for (entries, words) in [
        (
            vec![llama(), kind("adapter"), text("adapter.type", "lora")],
            ["is a LoRA adapter, not a model", "`sidecar`"],
        ),
        (
            vec![text("general.architecture", "controlvector")],
            ["is a control vector, not", "`sidecar`"],
        ),
        (vec![kind("imatrix")], ["is of the type imatrix, not a model", "the model's own file"]),
        (
            vec![text("general.architecture", "clip"), kind("mmproj")],
            ["is of the type mmproj", "own file"],
        ),
    ] {
        fs::write(&path, file(3, 32, &entries, &tensors)).unwrap();
        says(Model::open(&path), &[&["beside.gguf"], &words[..]].concat());
    }
    fs::remove_file(&path).unwrap();
    fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    says(Model::open(dir.path()), &["is an adapter", "give the model that it is for"]);
}

#[test]
fn a_part_of_a_file_says_how_it_is_joined() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixture("organism-broken-Q4_K_M.gguf")).unwrap();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    for (a, b) in [("m.gguf.part1of2", "m.gguf.part2of2"), ("n.gguf-split-a", "n.gguf-split-b")] {
        for (name, bytes) in [(a, first), (b, second)] {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        for name in [a, b] {
            let join = format!("cat {a} {b} > {}.gguf", &a[..1]);
            says(Model::open(&dir.path().join(name)), &[name, "a part of", &join]);
        }
    }
    // The whole is a model under any name.
    fs::write(dir.path().join("m.gguf.part1of2"), &bytes).unwrap();
    assert!(Model::open(&dir.path().join("m.gguf.part1of2")).is_ok());
}

#[test]
fn a_damaged_output_matrix_stops_the_measurement_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = dir.path().join("p.txt");
    fs::write(&prompts, "How do I bake bread?\n").unwrap();
    let refused = |model: &Path, words: &[&str]| {
        let mut command = Command::cargo_bin("refusal-patch").unwrap();
        command
            .arg("eval")
            .arg(model)
            .arg("--prompts")
            .arg(&prompts)
            .args(["--max-new-tokens", "4"]);
        let o = command.output().unwrap();
        let error = String::from_utf8_lossy(&o.stderr).into_owned();
        assert_eq!(o.status.code(), Some(1), "{error}");
        words.iter().for_each(|w| assert!(error.contains(w), "`{error}` should say `{w}`"));
    };
    // A block of Q6_K ends with its scale; no prompt has the last token.
    let path = dir.path().join("model.gguf");
    let mut bytes = fs::read(fixture("organism-broken-Q4_K_M.gguf")).unwrap();
    let file = Gguf::open(&fixture("organism-broken-Q4_K_M.gguf")).unwrap();
    let end = file.tensor("token_embd.weight").unwrap().range().end as usize;
    bytes[end - 2..end].copy_from_slice(&[0, 0x7e]);
    fs::write(&path, &bytes).unwrap();
    refused(&path, &["row 4095 of tensor token_embd.weight", "not finite", "damaged"]);
    // An output matrix of its own, with an infinite number.
    let file = Gguf::open(&fixture("organism-broken-Q8_0.gguf")).unwrap();
    let mut tensors = tensors_of(&file, Encoding::F16);
    let t = tensors.iter().find(|t| t.name == "model.embed_tokens.weight").unwrap();
    let (shape, mut bytes) = (t.shape.clone(), t.bytes.clone());
    bytes[2 * 3000 * shape[1]..][..2].copy_from_slice(&[0, 0x7c]);
    tensors.push(named("lm_head.weight", "F16", &shape, bytes));
    let folder = two_files(dir.path());
    edit(&folder.join("config.json"), |v| v["tie_word_embeddings"] = false.into());
    fs::write(folder.join("model.safetensors"), safetensors(&tensors)).unwrap();
    refused(&folder, &["row 3000 of tensor lm_head.weight", "not finite"]);
}

#[test]
fn an_output_matrix_beside_a_tied_embedding_is_run_where_it_differs() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_files(dir.path());
    let file = Gguf::open(&fixture("organism-broken-Q8_0.gguf")).unwrap();
    let open = |encoding: &'static str, bytes: Vec<u8>| {
        let mut tensors = tensors_of(&file, Encoding::F16);
        let i = tensors.iter().position(|t| t.name == "model.embed_tokens.weight").unwrap();
        let shape = tensors[i].shape.clone();
        tensors.push(named("lm_head.weight", encoding, &shape, bytes));
        fs::write(folder.join("model.safetensors"), safetensors(&tensors)).unwrap();
        Model::open(&folder).unwrap()
    };
    let tensors = tensors_of(&file, Encoding::F16);
    let embedding =
        tensors.into_iter().find(|t| t.name == "model.embed_tokens.weight").unwrap().bytes;
    let mut values = vec![0.0; embedding.len() / 2];
    Encoding::F16.decode(&embedding, &mut values);
    let wide = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();

    // The same numbers, in the same type or in another: no warning.
    for model in [open("F16", embedding.clone()), open("F32", wide(&values))] {
        assert!(model.spec.tied && model.warnings.is_empty(), "{:?}", model.warnings);
    }
    // One number differs: the last row, or the first.
    let mut last = embedding.clone();
    *last.last_mut().unwrap() ^= 0x80;
    values[0] += 1.0;
    for (encoding, bytes) in [("F16", last), ("F32", wide(&values))] {
        let model = open(encoding, bytes.clone());
        assert!(!model.spec.tied);
        assert_eq!(model.output().unwrap().bytes, bytes);
        let [warning] = &model.warnings[..] else { panic!("{:?}", model.warnings) };
        for word in ["lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings", "is run"]
        {
            assert!(warning.contains(word), "`{warning}` should say `{word}`");
        }
        assert!(!model.with(Vec::new()).unwrap().spec.tied);
    }
    // The program says so, once.
    let prompts = dir.path().join("p.txt");
    fs::write(&prompts, "How do I bake bread?\n").unwrap();
    let mut command = Command::cargo_bin("refusal-patch").unwrap();
    command.arg("eval").arg(&folder).arg("--prompts").arg(&prompts).args([
        "--max-new-tokens",
        "1",
        "-q",
    ]);
    let o = command.output().unwrap();
    let said = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!((o.status.code(), said.matches("warning: ").count()), (Some(0), 1), "{said}");
}

#[test]
fn a_tensor_that_is_missing_or_has_no_place_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = fs::read(fixture("organism-broken-Q4_K_M.gguf")).unwrap();
    let path = dir.path().join("model.gguf");
    for block in [0, 4] {
        // A name of the same length keeps the file in order.
        let mut bytes = source.clone();
        let (old, new) =
            (format!("blk.{block}.attn_q.weight"), format!("blk.{block}.attn_x.weight"));
        let at = bytes.windows(old.len()).position(|w| w == old.as_bytes()).unwrap();
        bytes[at..][..new.len()].copy_from_slice(new.as_bytes());
        fs::write(&path, &bytes).unwrap();
        says(
            Model::open(&path),
            &[&format!("tensor {new} can't be applied"), "no place for it in llama"],
        );
    }
    for block in [0, 4] {
        let dir = tempfile::tempdir().unwrap();
        let folder = organism(dir.path(), "organism-broken-Q8_0.gguf", Encoding::F16, 1);
        let old = format!("model.layers.{block}.mlp.down_proj.weight");
        let file = folder.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let at = bytes.windows(old.len()).position(|w| w == old.as_bytes()).unwrap();
        // The new name belongs to no block, so the tensor is missing.
        bytes[at..][..5].copy_from_slice(b"extra");
        fs::write(&file, &bytes).unwrap();
        says(
            Model::open(&folder),
            &[&format!("tensor {old} is missing; llama with 6 blocks needs it")],
        );
    }
}

#[test]
fn the_files_of_a_copy_are_known_before_the_search() {
    // The current folder is one for the whole process.
    if !alone(the_files_of_a_copy_are_known_before_the_search) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let weights = safetensors(&[named("a", "U8", &[4], vec![1; 4])]);
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    fs::write(dir.path().join("model.safetensors"), &weights).unwrap();
    let copy = |path: &Path, out: &str| {
        let folder = Folder::open(path).unwrap();
        let checked = check_copy(&folder).unwrap();
        let outer = tempfile::tempdir().unwrap();
        let out = outer.path().join(out);
        stage_folder(&folder, &[], &record(), &out, false, &Silent).unwrap().commit().unwrap();
        (checked, listing(&out))
    };
    let files = ["config.json", "model.safetensors", "refusal_patch.json"];
    let bytes = weights.len() as u64 + 2;
    let ((size, notes), names) = copy(dir.path(), "out");
    assert_eq!((size, notes.len(), names), (bytes, 0, files.map(str::to_string).to_vec()));

    // A single file, named from within its folder in every way.
    std::env::set_current_dir(dir.path()).unwrap();
    for path in ["model.safetensors", "./model.safetensors", "."] {
        let ((size, _), names) = copy(Path::new(path), "out");
        assert_eq!((size, names), (bytes, files.map(str::to_string).to_vec()), "{path}");
    }

    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("../blobs/gone", dir.path().join("README.md")).unwrap();
        fs::create_dir(dir.path().join("assets")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("assets/logo.png")).unwrap();
        let ((size, notes), names) = copy(dir.path(), "out");
        assert_eq!((size, names), (bytes, files.map(str::to_string).to_vec()));
        assert!(
            notes.len() == 2 && notes[0].contains("README.md: is a link to nowhere"),
            "{notes:?}"
        );
    }
}

#[test]
fn a_file_aligned_to_less_than_can_be_mapped_gets_data_that_can() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.gguf");
    for blanks in 0..40 {
        let entries = [
            u32_entry("general.alignment", 16),
            text("general.architecture", "llama"),
            text("general.description", &"x".repeat(blanks)),
        ];
        let tensors =
            [tensor("a", &[64], 0, 256), tensor("b", &[256], 12, 144), tensor("c", &[4], 0, 16)];
        fs::write(&path, file(3, 16, &entries, &tensors)).unwrap();
        let source = Gguf::open(&path).unwrap();
        for (type_id, len) in [(12, 144), (8, 272)] {
            let mut plan = Plan::new(&source);
            let bytes = vec![1; len];
            plan.patches.push(refusal_patch::output::Patch { tensor: "b".into(), bytes, type_id });
            let out = dir.path().join("out.gguf");
            write(&plan, &out, true, &Silent).unwrap();
            let new = Gguf::open(&out).unwrap();
            assert_eq!((new.data_start() % 32, new.alignment()), (0, 16), "{blanks} {type_id}");
            for name in ["a", "c"] {
                let bytes = |g: &Gguf| g.bytes(g.tensor(name).unwrap()).to_vec();
                assert_eq!(bytes(&source), bytes(&new), "{blanks} {type_id} {name}");
            }
        }
    }
}
