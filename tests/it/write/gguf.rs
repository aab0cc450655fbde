//! Writing a patched checkpoint.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use crate::common::gguf::*;
use gguf_rs_lib::format::MetadataValue;
use gguf_rs_lib::reader::GGUFFileReader;
use refusal_patch::checkpoint::{sha256_file, sha256_tensors, Gguf, Value};
use refusal_patch::output::{preflight, stage, write, Patch, Plan, Provenance, TensorEdit};
use refusal_patch::progress::{Progress, Silent};

const PATCHED: &str = "blk.0.ffn_down.weight";

fn patch(type_id: u32, len: usize) -> Patch {
    Patch { tensor: PATCHED.to_string(), bytes: vec![0xAB; len], type_id }
}

fn provenance() -> Provenance {
    Provenance {
        version: "0.1.0".into(),
        source_sha256: "ab".repeat(32),
        method: "amplify".into(),
        layers: vec![3, 4],
        strength: 0.5,
        before: r#"{"refusal":0.6}"#.into(),
        after: r#"{"refusal":0.9}"#.into(),
        edits: vec![TensorEdit {
            tensor: PATCHED.into(),
            u: vec![1.0, -0.0, 0.1],
            v: vec![f32::MIN_POSITIVE; 256],
        }],
    }
}

/// `name -> hash` of every tensor.
fn hashes(g: &Gguf) -> Vec<(String, [u8; 32])> {
    let names = g.tensors().iter().map(|t| t.name.clone());
    names.zip(sha256_tensors(g, &Silent).unwrap()).collect()
}

#[test]
fn only_the_patched_tensor_and_the_header_change() {
    for version in [2, 3] {
        let before = model(version);
        let (dir, path) = saved(&before);
        let source = Gguf::open(&path).unwrap();
        let mut plan = Plan::new(&source);
        plan.patches.push(patch(12, 432));
        provenance().apply(&mut plan);
        let out = dir.path().join("out.gguf");
        let written = write(&plan, &out, false, &Silent).unwrap();

        let g = Gguf::open(&out).unwrap();
        assert_eq!((g.version(), g.file_len()), (version, written.bytes));
        assert_eq!(written.sha256, sha256_file(&out, &Silent).unwrap());
        for (old, new) in hashes(&source).into_iter().zip(hashes(&g)) {
            assert_eq!(old.0, new.0);
            assert_eq!(old.1 == new.1, old.0 != PATCHED, "{}", old.0);
        }
        assert!(g.bytes(g.tensor(PATCHED).unwrap()).iter().all(|&b| b == 0xAB));
        let growth = g.data_start() - source.data_start();
        assert_eq!(g.file_len() - source.file_len(), growth, "the file grows by its header only");
        assert_eq!(growth % 4096, 0);
        assert_eq!(g.raw(g.tensor_infos_span()), source.raw(source.tensor_infos_span()));
        // The old entries are the same bytes in the same order, but for the tags.
        for (old, new) in source.metadata().iter().zip(g.metadata()) {
            assert_eq!(old.key, new.key);
            let same = source.raw(old.span.clone()) == g.raw(new.span.clone());
            assert_eq!(same, old.key != "general.tags", "{}", old.key);
        }
        assert_eq!(
            g.get_strings("general.tags").unwrap(),
            [b"chat".to_vec(), b"refusal-patch".to_vec()]
        );
        assert_eq!(Provenance::read(&g).unwrap(), Some(provenance()));
        assert_eq!(Provenance::read(&source).unwrap(), None);
        assert_eq!(fs::read(&path).unwrap(), before, "the input is untouched");
        assert_eq!(listing(dir.path()), ["in.gguf", "out.gguf"]);
    }
}

#[test]
fn a_plan_without_changes_gives_the_same_file() {
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let out = dir.path().join("out.gguf");
    write(&Plan::new(&source), &out, false, &Silent).unwrap();
    assert_eq!(fs::read(&out).unwrap(), fs::read(&path).unwrap());
}

#[test]
fn patching_again_replaces_the_record_of_the_first_patch() {
    let (dir, path) = saved(&model(3));
    let [first, second] = ["1.gguf", "2.gguf"].map(|n| dir.path().join(n));
    let source = Gguf::open(&path).unwrap();
    let mut plan = Plan::new(&source);
    provenance().apply(&mut plan);
    write(&plan, &first, false, &Silent).unwrap();

    let source = Gguf::open(&first).unwrap();
    let mut plan = Plan::new(&source);
    let mut other = provenance();
    other.edits[0].tensor = "blk.0.attn_output.weight".to_string();
    other.edits[0].v.truncate(32);
    other.apply(&mut plan);
    write(&plan, &second, false, &Silent).unwrap();
    let g = Gguf::open(&second).unwrap();
    assert_eq!(Provenance::read(&g).unwrap(), Some(other));
    assert!(!g.metadata().iter().any(|e| e.key.contains(PATCHED)));
    assert_eq!(g.get_strings("general.tags").unwrap().len(), 2);
    assert_eq!(g.data_start() % 4096, source.data_start() % 4096);
}

#[test]
fn a_damaged_record_of_a_patch_is_an_error() {
    let (_dir, path) = saved(&[header(3, 0, 1), text("refusal_patch.version", "0.1.0")].concat());
    let message = Provenance::read(&Gguf::open(&path).unwrap()).unwrap_err().to_string();
    assert!(message.contains("`refusal_patch.source_sha256` is missing"), "{message}");
}

#[test]
fn a_wider_encoding_moves_the_tensors_after_it() {
    for (version, alignment) in [(2, 32), (3, 32), (3, 256)] {
        let entries = [
            u32_entry("general.alignment", alignment as u32),
            text("general.architecture", "llama"),
        ];
        let tensors = [
            tensor("first", &[64, 4], 0, 1024),
            tensor(PATCHED, &[256, 3], 12, 432),
            tensor("unknown", &[11, 3], 77, 41),
            tensor("last", &[5], 0, 20),
        ];
        let (dir, path) = saved(&file(version, alignment, &entries, &tensors));
        let source = Gguf::open(&path).unwrap();
        let mut plan = Plan::new(&source);
        plan.patches.push(patch(8, 816));
        let out = dir.path().join("out.gguf");
        write(&plan, &out, false, &Silent).unwrap();

        let g = Gguf::open(&out).unwrap();
        let mut offset = g.data_start();
        for (old, new) in source.tensors().iter().zip(g.tensors()) {
            assert_eq!((&old.name, &old.dims), (&new.name, &new.dims));
            assert_eq!(new.offset, offset, "no gaps before {}", new.name);
            offset += new.len.next_multiple_of(alignment as u64);
            if old.name == PATCHED {
                assert_eq!((new.type_name().as_str(), new.len), ("Q8_0", 816));
            } else {
                assert_eq!(source.bytes(old), g.bytes(new));
            }
        }
        assert_eq!(offset, g.file_len(), "padded after the last tensor");
    }
}

#[test]
fn an_independent_reader_agrees() {
    let entries = [
        text("general.architecture", "llama"),
        u32_entry("llama.block_count", 1),
        strings("tokenizer.ggml.tokens", &[b"a", b"b"]),
    ];
    let tensors =
        [tensor("token_embd.weight", &[64, 4], 0, 1024), tensor(PATCHED, &[256, 3], 12, 432)];
    let (dir, path) = saved(&file(3, 32, &entries, &tensors));
    let source = Gguf::open(&path).unwrap();
    for (type_id, len) in [(12, 432), (8, 816)] {
        let mut plan = Plan::new(&source);
        plan.patches.push(patch(type_id, len));
        provenance().apply(&mut plan);
        let out = dir.path().join(format!("{type_id}.gguf"));
        write(&plan, &out, false, &Silent).unwrap();

        let mut reader = GGUFFileReader::new(Cursor::new(fs::read(&out).unwrap())).unwrap();
        let metadata = reader.metadata().clone();
        assert_eq!(metadata.get("llama.block_count"), Some(&MetadataValue::U32(1)));
        assert_eq!(metadata.get("refusal_patch.method").unwrap().as_str(), Some("amplify"));
        assert_eq!(metadata.get("refusal_patch.strength"), Some(&MetadataValue::F32(0.5)));
        let Some(MetadataValue::Array(v)) =
            metadata.get(&format!("refusal_patch.edit.{PATCHED}.v"))
        else {
            panic!("the edit is no array")
        };
        assert_eq!(v.len(), 256);
        assert_eq!(reader.get_tensor_info(PATCHED).unwrap().tensor_type() as u32, type_id);
        let data = |r: &mut GGUFFileReader<_>, name: &str| {
            r.load_tensor_data(name).unwrap().unwrap().as_slice().to_vec()
        };
        assert_eq!(data(&mut reader, PATCHED), vec![0xAB; len]);
        assert_eq!(data(&mut reader, "token_embd.weight"), tensors[0].bytes);
    }
}

#[test]
fn set_and_removed_keys_keep_the_others_in_place() {
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let mut plan = Plan::new(&source);
    plan.metadata.push(("gpt-oss.flag".into(), Value::from(false)));
    plan.metadata.push(("new.key".into(), Value::from(9u32)));
    plan.remove.push("gpt-oss.float".into());
    let out = dir.path().join("out.gguf");
    write(&plan, &out, false, &Silent).unwrap();
    let g = Gguf::open(&out).unwrap();
    let mut expected: Vec<&str> = source.metadata().iter().map(|e| e.key.as_str()).collect();
    expected.retain(|k| *k != "gpt-oss.float");
    expected.push("new.key");
    let keys: Vec<&str> = g.metadata().iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys[..expected.len()], expected);
    assert_eq!((g.get_bool("gpt-oss.flag"), g.get_u32("new.key")), (Some(false), Some(9)));
}

/// Writing fails, says `saying`, and leaves nothing new in the folder.
#[track_caller]
fn fails(plan: &Plan, out: &Path, force: bool, saying: &str) {
    let dir = plan.source.path().parent().unwrap();
    let before = listing(dir);
    let message = write(plan, out, force, &Silent).unwrap_err().to_string();
    assert!(message.contains(saying), "`{message}` should say `{saying}`");
    assert_eq!(listing(dir), before);
}

#[test]
fn a_wrong_plan_is_refused_and_leaves_nothing() {
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let out = dir.path().join("out.gguf");
    let with = |patches: Vec<Patch>| Plan { patches, ..Plan::new(&source) };
    fails(&with(vec![patch(12, 431)]), &out, false, "needs 432 bytes as Q4_K and is given 431");
    fails(&with(vec![patch(8, 432)]), &out, false, "needs 816 bytes as Q8_0");
    fails(&with(vec![patch(77, 432)]), &out, false, "the new type is unknown");
    fails(&with(vec![patch(12, 432), patch(12, 432)]), &out, false, "patched twice");
    fails(
        &with(vec![Patch { tensor: "no".into(), ..patch(12, 432) }]),
        &out,
        false,
        "`no` is not in the file",
    );
    let set = |key: &str| (key.to_string(), Value::from(64u32));
    fails(
        &Plan { metadata: vec![set("general.alignment")], ..Plan::new(&source) },
        &out,
        false,
        "alignment",
    );
    fails(
        &Plan { metadata: vec![set("a"), set("a")], ..Plan::new(&source) },
        &out,
        false,
        "set twice",
    );
}

#[test]
fn the_input_is_never_the_output() {
    let bytes = model(3);
    let (dir, path) = saved(&bytes);
    let source = Gguf::open(&path).unwrap();
    let mut plan = Plan::new(&source);
    plan.patches.push(patch(12, 432));
    for force in [false, true] {
        fails(&plan, &path, force, "is the input itself");
        fails(&plan, &dir.path().join(".").join("in.gguf"), force, "is the input itself");
    }
    #[cfg(unix)]
    {
        let [soft, hard] = ["soft.gguf", "hard.gguf"].map(|n| dir.path().join(n));
        std::os::unix::fs::symlink(&path, &soft).unwrap();
        fs::hard_link(&path, &hard).unwrap();
        fails(&plan, &soft, true, "is the input itself");
        fails(&plan, &hard, true, "is the input itself");
        // The other way round: the input is given by a link, the output is its target.
        let source = Gguf::open(&soft).unwrap();
        fails(&Plan::new(&source), &path, true, "is the input itself");
    }
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn an_existing_file_is_replaced_only_by_force() {
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let plan = Plan::new(&source);
    let out = dir.path().join("out.gguf");
    fs::write(&out, "precious").unwrap();
    fails(&plan, &out, false, "`force`");
    assert!(preflight(source.path(), &out, source.file_len(), false).is_err());
    preflight(source.path(), &out, source.file_len(), true).unwrap();
    assert_eq!(fs::read(&out).unwrap(), b"precious");
    write(&plan, &out, true, &Silent).unwrap();
    assert_eq!(fs::read(&out).unwrap(), fs::read(&path).unwrap());
}

#[test]
fn a_place_that_can_not_be_written_is_refused() {
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let plan = Plan::new(&source);
    fails(&plan, dir.path(), true, "is a folder");
    fails(&plan, &dir.path().join("none/out.gguf"), false, "the folder doesn't exist");
    fails(&plan, &path.join("out.gguf"), false, "is not a folder");
    fails(&plan, Path::new(""), false, "names no file");
    #[cfg(unix)]
    fails(&plan, Path::new("/dev/null"), true, "is not a regular file");
    #[cfg(unix)]
    {
        let dangling = dir.path().join("dangling");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &dangling).unwrap();
        fails(&plan, &dangling, false, "`force`");
    }
}

#[test]
fn a_staged_file_has_no_name_until_it_is_committed() {
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let plan = Plan::new(&source);
    let out = dir.path().join("out.gguf");
    let staged = stage(&plan, &out, false, &Silent).unwrap();
    assert!(!out.exists());
    assert_eq!(Gguf::open(staged.path()).unwrap().tensors().len(), 5);
    drop(staged);
    assert_eq!(listing(dir.path()), ["in.gguf"], "a dropped one is deleted");

    let staged = stage(&plan, &out, false, &Silent).unwrap();
    fs::write(&out, "somebody else's").unwrap();
    assert!(staged.commit().unwrap_err().to_string().contains("has appeared"));
    assert_eq!(listing(dir.path()), ["in.gguf", "out.gguf"]);
    assert_eq!(fs::read(&out).unwrap(), b"somebody else's");
}

#[test]
fn an_input_that_changes_meanwhile_is_noticed() {
    struct Replace(std::path::PathBuf);
    impl Progress for Replace {
        fn start(&self, stage: &str, _: u64, _: &str) {
            if stage == "writing" {
                // A new file of the same name, as a download or a package manager makes it.
                fs::write(self.0.with_extension("new"), model(3)).unwrap();
                fs::rename(self.0.with_extension("new"), &self.0).unwrap();
            }
        }
    }
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let out = dir.path().join("out.gguf");
    let message =
        write(&Plan::new(&source), &out, false, &Replace(path.clone())).unwrap_err().to_string();
    assert!(message.contains("changed or replaced"), "{message}");
    assert_eq!(listing(dir.path()), ["in.gguf"]);
}

#[cfg(unix)]
#[test]
fn the_new_file_has_ordinary_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let out = dir.path().join("out.gguf");
    write(&Plan::new(&source), &out, false, &Silent).unwrap();
    let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode();
    assert_eq!(mode(&out), mode(&path), "those of any new file");
}
