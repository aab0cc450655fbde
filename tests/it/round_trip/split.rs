//! Split models, read and written as one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::gguf::*;
use crate::common::record::record;
use crate::common::split::{shard, shards, split};
use refusal_patch::checkpoint::{sha256_checkpoint, sha256_file, Checkpoint, Gguf};
use refusal_patch::output::{
    clear_leftovers, preflight_beside, preflight_checkpoint, stage, write, Added, Emit, Patch,
    Plan, Provenance, Staged,
};
use refusal_patch::progress::{Progress, Silent};

/// Tensors of `common::model` in its three shards.
const COUNTS: [usize; 3] = [2, 2, 1];
/// In the first shard.
const DOWN: &str = "blk.0.ffn_down.weight";
/// In the second shard.
const OUTPUT: &str = "blk.0.attn_output.weight";

/// A folder with the model whole, as `in.gguf`, and split, as `s-0000*-of-00003.gguf`.
fn both() -> (tempfile::TempDir, Gguf, Vec<PathBuf>) {
    let (dir, path) = saved(&model(3));
    let whole = Gguf::open(&path).unwrap();
    let paths = split(&whole, dir.path(), "s", &COUNTS);
    (dir, whole, paths)
}

fn read(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    paths.iter().map(|p| fs::read(p).unwrap()).collect()
}

/// The names of the shards of `name`.
fn named(dir: &Path, name: &str) -> Vec<PathBuf> {
    (1..=3).map(|i| shard(dir, name, i, 3)).collect()
}

/// The same tensors with the same bytes in the same order.
#[track_caller]
fn same_tensors(a: &Gguf, b: &Gguf) {
    assert_eq!(a.tensors().len(), b.tensors().len());
    for (x, y) in a.tensors().iter().zip(b.tensors()) {
        assert_eq!((&x.name, &x.dims, x.type_id), (&y.name, &y.dims, y.type_id));
        assert!(a.bytes(x) == b.bytes(y), "{}", x.name);
        assert_eq!(a.tensor(&x.name).map(|t| &t.dims), b.tensor(&x.name).map(|t| &t.dims));
    }
}

#[test]
fn any_shard_opens_the_whole_model() {
    let (_dir, whole, paths) = both();
    for path in &paths {
        let model = Gguf::open(path).unwrap();
        assert_eq!(model.path(), paths[0]);
        assert_eq!(model.shards().len(), 3);
        same_tensors(&whole, &model);
        assert_eq!(model.arch().unwrap(), "gpt-oss");
        assert_eq!(model.get_u32("gpt-oss.block_count"), Some(2));
        let sizes = read(&paths).iter().map(|b| b.len() as u64).sum::<u64>();
        assert_eq!(model.file_len(), sizes);
        let files: Vec<usize> = model.tensors().iter().map(|t| t.file).collect();
        assert_eq!(files, [0, 0, 1, 1, 2]);
    }
}

#[test]
fn a_first_shard_without_tensors_and_an_alignment_of_its_own_is_read() {
    let entries = [u32_entry("general.alignment", 64), text("general.architecture", "llama")];
    let tensors = [tensor("a", &[5], 0, 20), tensor("b", &[64, 4], 0, 1024)];
    let (dir, path) = saved(&file(3, 64, &entries, &tensors));
    let whole = Gguf::open(&path).unwrap();
    let paths = split(&whole, dir.path(), "s", &[0, 1, 1]);
    let model = Gguf::open(&paths[0]).unwrap();
    same_tensors(&whole, &model);
    let out = dir.path().join("out.gguf");
    let mut plan = Plan::new(&model);
    record().apply(&mut plan);
    let written = write(&plan, &out, false, &Silent).unwrap();
    let again = Gguf::open(&written.path).unwrap();
    same_tensors(&whole, &again);
    assert_eq!(Provenance::read(&again).unwrap(), Some(record()));
}

#[test]
fn the_hash_of_a_split_model_is_that_of_its_shards_one_after_the_other() {
    let (dir, _, paths) = both();
    let joined = dir.path().join("joined");
    fs::write(&joined, read(&paths).concat()).unwrap();
    let expected = sha256_file(&joined, &Silent).unwrap();
    let hash = |path: &Path| sha256_checkpoint(&Checkpoint::open(path).unwrap(), &Silent).unwrap();
    assert_eq!(hash(&paths[2]), expected);
    // Whatever the name.
    let other = named(dir.path(), "renamed");
    paths.iter().zip(&other).for_each(|(from, to)| fs::rename(from, to).unwrap());
    assert_eq!(hash(&other[0]), expected);
}

/// The model can't be opened by any of these shards, in one line that names a file and says what
/// was found.
#[track_caller]
fn refused(paths: &[PathBuf], names: &str, words: &[&str]) {
    for path in paths {
        let message = Checkpoint::open(path).unwrap_err().to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
        let at = message.split(": ").next().unwrap();
        assert!(at.ends_with(names), "`{message}` should name {names}");
        for word in words {
            assert!(message.contains(word), "`{message}` should say `{word}`");
        }
    }
}

#[test]
fn a_shard_that_is_missing_is_named() {
    let (_dir, _, paths) = both();
    fs::remove_file(&paths[1]).unwrap();
    for i in [0, 2] {
        let own = paths[i].file_name().unwrap().to_str().unwrap();
        let words = ["one of 3 shards", "1 is missing: s-00002-of-00003.gguf", "download"];
        refused(&paths[i..=i], own, &words);
    }
}

#[test]
fn a_shard_of_another_model_is_named() {
    let (dir, whole, paths) = both();
    let good = read(&paths);
    let second = "s-00002-of-00003.gguf";
    let others = |without: usize| -> Vec<PathBuf> {
        (0..3).filter(|i| *i != without).map(|i| paths[i].clone()).collect()
    };
    // As the bytes of an integer of 16 bits follow the key.
    let with = |i: usize, key: &str, value: u8| {
        let mut bytes = good[i].clone();
        let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap();
        bytes[at + key.len() + 4] = value;
        bytes
    };

    fs::write(&paths[1], with(1, "split.count", 4)).unwrap();
    refused(&others(1), second, &["split.count is 4, expected 3", "download it again"]);
    fs::write(&paths[1], with(1, "split.count", 1)).unwrap();
    refused(&others(1), second, &["split.count is 1, expected 3"]);
    fs::write(&paths[1], model(3)).unwrap();
    refused(&others(1), second, &["split.count is missing, expected 3"]);

    // The third one under the second one's name, asked for by either.
    fs::write(&paths[1], &good[2]).unwrap();
    refused(&others(1), second, &["split.no is 2, expected 1 by its name", "download it again"]);
    refused(&paths[1..2], second, &["is shard 3 of 3", "must end in -00003-of-00003.gguf"]);

    fs::write(&paths[1], with(1, "split.tensors.count", 9)).unwrap();
    refused(&paths, second, &["split.tensors.count is 9, expected 5", "s-00001-of-00003.gguf"]);

    // Of another architecture, where the shard names one.
    let mut foreign = header(3, 0, 3);
    foreign.extend(text("general.architecture", "qwen2"));
    foreign.extend(entry("split.no", 2, &1u16.to_le_bytes()));
    foreign.extend(entry("split.count", 2, &3u16.to_le_bytes()));
    fs::write(&paths[1], foreign).unwrap();
    refused(&paths, second, &["general.architecture is qwen2, expected gpt-oss"]);

    // Of the same model in other shards: a tensor twice, or none at all.
    fs::write(&paths[1], &shards(&whole, &[1, 3, 1])[1]).unwrap();
    refused(&paths, second, &[DOWN, "is also in s-00001-of-00003.gguf", "download both"]);
    fs::write(&paths[1], &shards(&whole, &[3, 1, 1])[1]).unwrap();
    refused(&paths, "s-00001-of-00003.gguf", &["split.tensors.count is 5", "hold 4 tensors"]);

    fs::write(&paths[1], &good[1][..good[1].len() - 40]).unwrap();
    refused(&paths, second, &["is cut short", "download it again"]);
    fs::write(&paths[1], &good[1]).unwrap();
    assert!(Gguf::open(&paths[1]).is_ok());
    drop(dir);
}

#[test]
fn a_shard_under_another_name_says_what_it_must_be_called() {
    let (dir, _, paths) = both();
    let other = dir.path().join("model.gguf");
    fs::copy(&paths[1], &other).unwrap();
    let words = ["is shard 2 of 3 by its metadata", "must end in -00002-of-00003.gguf"];
    refused(std::slice::from_ref(&other), "model.gguf", &words);
    let mut bytes = header(3, 0, 1);
    bytes.extend(entry("split.count", 2, &3u16.to_le_bytes()));
    fs::write(&other, bytes).unwrap();
    refused(&[other], "model.gguf", &["split.no is missing", "download it again"]);
}

/// What is written for the whole model and for the split one is the same, tensor by tensor.
fn written_as_one(change: impl Fn(&mut Plan)) -> (tempfile::TempDir, [Vec<Vec<u8>>; 2], Gguf) {
    let (dir, whole, paths) = both();
    let before = read(&paths);
    let source = Gguf::open(&paths[0]).unwrap();
    let write_of = |source: &Gguf, out: &str| {
        let mut plan = Plan::new(source);
        change(&mut plan);
        record().apply(&mut plan);
        write(&plan, &dir.path().join(out), false, &Silent).unwrap()
    };
    let (one, many) = (write_of(&whole, "one.gguf"), write_of(&source, "many.gguf"));
    let out = named(dir.path(), "many");
    assert_eq!(many.path, out[0]);
    let (a, b) = (Gguf::open(&one.path).unwrap(), Gguf::open(&many.path).unwrap());
    same_tensors(&a, &b);
    assert_eq!(many.bytes, b.file_len());
    let hash = sha256_checkpoint(&Checkpoint::open(&out[1]).unwrap(), &Silent).unwrap();
    assert_eq!(many.sha256, hash);
    // The metadata too, but for those that make it a shard, and in the first one only.
    let keys = |g: &Gguf| {
        let own = |key: &str| !key.starts_with("split.") && key != "refusal_patch.padding";
        let entries = g.metadata().iter().filter(|e| own(&e.key));
        entries.map(|e| (e.key.clone(), format!("{:?}", e.value))).collect::<Vec<_>>()
    };
    assert_eq!(keys(&a), keys(&b));
    assert_eq!(Provenance::read(&b).unwrap(), Some(record()));
    for (i, file) in b.shards().iter().enumerate() {
        let of = |key: &str| file.get(key).and_then(|v| v.as_u64());
        assert_eq!((of("split.no"), of("split.count")), (Some(i as u64), Some(3)));
        assert_eq!(of("split.tensors.count"), Some(b.tensors().len() as u64));
        let ours = file.metadata().iter().any(|e| e.key == "refusal_patch.version");
        assert_eq!(ours, i == 0, "provenance is in the first shard");
        assert_eq!(file.data_start() % 32, 0);
    }
    assert_eq!(read(&paths), before, "the input is untouched");
    let names = [named(dir.path(), "many"), named(dir.path(), "s")].concat();
    let mut expected: Vec<PathBuf> =
        [names, ["in.gguf", "one.gguf"].map(|n| dir.path().join(n)).to_vec()].concat();
    expected.sort();
    let found: Vec<PathBuf> = listing(dir.path()).iter().map(|n| dir.path().join(n)).collect();
    assert_eq!(found, expected);
    let after = read(&out);
    (dir, [before, after], b)
}

fn patch(tensor: &str, type_id: u32, len: usize) -> Patch {
    Patch { tensor: tensor.into(), bytes: vec![0xAB; len], type_id }
}

#[test]
fn only_the_first_shard_and_those_with_a_changed_tensor_change() {
    let (_dir, [before, after], _) = written_as_one(|_| {});
    assert!(before[0] != after[0] && before[1..] == after[1..]);
    let change = |plan: &mut Plan| plan.patches.push(patch(OUTPUT, 8, 68));
    let (_dir, [before, after], written) = written_as_one(change);
    assert!(before[0] != after[0] && before[1] != after[1] && before[2] == after[2]);
    assert_eq!(before[1].len(), after[1].len(), "its header stays as it is");
    assert!(written.bytes(written.tensor(OUTPUT).unwrap()).iter().all(|b| *b == 0xAB));
}

#[test]
fn a_wider_encoding_moves_tensors_of_its_own_shard_only() {
    let change = |plan: &mut Plan| {
        plan.patches.extend([patch(DOWN, 8, 816), patch(OUTPUT, 0, 256)]);
    };
    let (_dir, [before, after], written) = written_as_one(change);
    assert_eq!(before[2], after[2]);
    for file in written.shards() {
        let mut offset = file.data_start();
        for t in file.tensors() {
            assert_eq!(t.offset, offset, "no gaps before {}", t.name);
            offset += t.len.next_multiple_of(file.alignment());
        }
    }
}

#[test]
fn an_added_tensor_goes_to_the_last_shard_and_every_shard_counts_it() {
    let name = "blk.0.ffn_down.bias".to_string();
    let change = |plan: &mut Plan| {
        let bytes = [1.0f32, 2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        plan.added.push(Added { name: name.clone(), dims: vec![3], type_id: 0, bytes });
    };
    let (_dir, [before, after], written) = written_as_one(change);
    assert_eq!(written.tensor(&name).unwrap().file, 2);
    // The second one's number of tensors is all that differs.
    assert_eq!(before[1].len(), after[1].len());
    assert_eq!(before[1].iter().zip(&after[1]).filter(|(a, b)| a != b).count(), 1);
}

#[test]
fn every_name_of_the_output_stands_for_all_shards() {
    let (dir, _, paths) = both();
    let source = Checkpoint::open(&paths[0]).unwrap();
    let gguf = source.gguf().unwrap();
    for (i, out) in
        ["o.gguf", "o", "o-00001-of-00003.gguf", "o-00002-of-00003.gguf"].iter().enumerate()
    {
        let out = dir.path().join(out);
        preflight_checkpoint(&source, Emit::Weights, &out, 1, i > 0).unwrap();
        let written = write(&Plan::new(gguf), &out, i > 0, &Silent).unwrap();
        assert_eq!(written.path, shard(dir.path(), "o", 1, 3));
        assert_eq!(read(&named(dir.path(), "o")), read(&paths));
    }
    let fails = |out: &Path, force: bool, words: &[&str]| {
        let before = listing(dir.path());
        for message in [
            preflight_checkpoint(&source, Emit::Weights, out, 1, force).unwrap_err().to_string(),
            write(&Plan::new(gguf), out, force, &Silent).unwrap_err().to_string(),
        ] {
            for word in words {
                assert!(message.contains(word), "`{message}` should say `{word}`");
            }
        }
        assert_eq!(listing(dir.path()), before);
    };
    let other = ["shard 1 of 5", "has 3 shards", "name it ", "p-00001-of-00003.gguf"];
    fails(&shard(dir.path(), "p", 1, 5), false, &other);
    fails(dir.path(), true, &["is a folder"]);
    fails(&dir.path().join("none/out.gguf"), false, &["the folder doesn't exist"]);
    fails(&dir.path().join("o.gguf"), false, &["o-00001-of-00003.gguf: exists already", "`force`"]);
    for i in 1..3 {
        fs::remove_file(shard(dir.path(), "o", i, 3)).unwrap();
    }
    fails(&dir.path().join("o.gguf"), false, &["o-00003-of-00003.gguf: exists already"]);
}

#[test]
fn no_shard_of_the_input_is_ever_written() {
    let (dir, _, paths) = both();
    let before = read(&paths);
    let source = Checkpoint::open(&paths[0]).unwrap();
    let plan = Plan::new(source.gguf().unwrap());
    for out in ["s.gguf", "s-00001-of-00003.gguf", "s-00002-of-00003.gguf"] {
        let message = write(&plan, &dir.path().join(out), true, &Silent).unwrap_err().to_string();
        assert!(message.contains("is the input itself"), "{message}");
    }
    // Nor by a file beside the model, such as an adapter.
    for path in &paths {
        for message in [
            preflight_beside(&source, path, 1, true).unwrap_err().to_string(),
            preflight_checkpoint(&source, Emit::Lora, path, 1, true).unwrap_err().to_string(),
        ] {
            assert!(message.contains("is the input itself"), "{message}");
        }
    }
    preflight_checkpoint(&source, Emit::Lora, &dir.path().join("lora.gguf"), 1, false).unwrap();
    #[cfg(unix)]
    {
        // Under another number.
        fs::hard_link(&paths[2], shard(dir.path(), "linked", 2, 3)).unwrap();
        let out = dir.path().join("linked.gguf");
        let message = write(&plan, &out, true, &Silent).unwrap_err().to_string();
        assert!(message.contains("linked-00002-of-00003.gguf: is the input itself"), "{message}");
    }
    assert_eq!(read(&paths), before);
}

fn staged(paths: &[PathBuf], out: &Path, force: bool) -> Staged {
    let source = Gguf::open(&paths[0]).unwrap();
    let mut plan = Plan::new(&source);
    record().apply(&mut plan);
    stage(&plan, out, force, &Silent).unwrap()
}

#[test]
fn all_shards_get_their_names_or_none() {
    let (dir, _, paths) = both();
    let out = dir.path().join("o.gguf");
    let before = listing(dir.path());
    let first = staged(&paths, &out, false);
    assert_eq!(Gguf::open(first.path()).unwrap().shards().len(), 3, "it opens before");
    drop(first);
    assert_eq!(listing(dir.path()), before, "a dropped one is deleted");

    // Somebody else's file appears at the place of each shard in turn.
    for there in named(dir.path(), "o") {
        let staged = staged(&paths, &out, false);
        fs::write(&there, "somebody else's").unwrap();
        let message = staged.commit().unwrap_err().to_string();
        assert!(message.starts_with(&format!("{}: has appeared", there.display())), "{message}");
        assert_eq!(fs::read(&there).unwrap(), b"somebody else's");
        fs::remove_file(&there).unwrap();
        assert_eq!(listing(dir.path()), before);
    }
}

#[test]
fn with_force_old_shards_are_replaced_together_or_stay() {
    let (dir, _, paths) = both();
    let (out, targets) = (dir.path().join("o.gguf"), named(dir.path(), "o"));
    for target in [0, 2] {
        fs::write(&targets[target], "old").unwrap();
    }
    let before = listing(dir.path());
    let refused = staged(&paths, &out, true);
    fs::create_dir(&targets[1]).unwrap();
    let message = refused.commit().unwrap_err().to_string();
    assert!(message.contains("o-00002-of-00003.gguf: is a folder"), "{message}");
    fs::remove_dir(&targets[1]).unwrap();
    assert_eq!(listing(dir.path()), before);
    for target in [0, 2] {
        assert_eq!(fs::read(&targets[target]).unwrap(), b"old");
    }

    let written = staged(&paths, &out, true).commit().unwrap();
    assert_eq!(Gguf::open(&written.path).unwrap().shards().len(), 3);
    assert_eq!(clear_leftovers(&out), Vec::<String>::new());
    assert_eq!(listing(dir.path()).len(), before.len() + 1, "nothing but the second shard is new");
}

#[cfg(unix)]
#[test]
fn a_failure_between_two_names_takes_the_first_ones_back() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, _, paths) = both();
    let (out, targets) = (dir.path().join("o.gguf"), named(dir.path(), "o"));
    targets.iter().for_each(|t| fs::write(t, "old").unwrap());
    let before = listing(dir.path());
    let broken = staged(&paths, &out, true);
    // The first shard, which is named last, is gone from the temporary folder.
    fs::remove_file(broken.path()).unwrap();
    assert!(broken.commit().is_err());
    assert_eq!(listing(dir.path()), before);
    targets.iter().for_each(|t| assert_eq!(fs::read(t).unwrap(), b"old"));
    // And the new ones have ordinary permissions.
    let written = staged(&paths, &out, true).commit().unwrap();
    let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode();
    assert_eq!(mode(&written.path), mode(&paths[0]));
}

#[test]
fn a_shard_that_changes_while_another_is_read_is_noticed() {
    struct Replace(PathBuf);
    impl Progress for Replace {
        fn start(&self, stage: &str, _: u64, _: &str) {
            if stage == "writing" {
                fs::copy(&self.0, self.0.with_extension("new")).unwrap();
                fs::rename(self.0.with_extension("new"), &self.0).unwrap();
            }
        }
    }
    for i in 0..3 {
        let (dir, _, paths) = both();
        let before = listing(dir.path());
        let source = Gguf::open(&paths[0]).unwrap();
        let out = dir.path().join("o.gguf");
        let result = write(&Plan::new(&source), &out, false, &Replace(paths[i].clone()));
        let message = result.unwrap_err().to_string();
        let name = paths[i].display();
        assert!(message.contains(&format!("{name}: was changed or replaced")), "{message}");
        assert_eq!(listing(dir.path()), before);
    }
}
