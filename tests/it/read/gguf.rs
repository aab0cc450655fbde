//! Reading GGUF files, sound, damaged and hostile.

use std::time::Instant;

use crate::common::gguf::*;
use proptest::prelude::*;
use refusal_patch::checkpoint::{sha256_file, sha256_tensors, Gguf, Value};
use refusal_patch::progress::Silent;
use refusal_patch::Result;

fn open(bytes: &[u8]) -> Result<Gguf> {
    let (_dir, path) = saved(bytes);
    Gguf::open(&path)
}

fn refusal(bytes: &[u8]) -> String {
    open(bytes).expect_err("should be refused").to_string()
}

#[track_caller]
fn refused(bytes: &[u8], saying: &str) {
    let message = refusal(bytes);
    assert!(message.contains(saying), "`{message}` should say `{saying}`");
    assert!(message.len() < 600, "too long: {message}");
}

#[test]
fn a_sound_file_reads_the_same_in_both_versions() {
    for version in [2, 3] {
        let bytes = model(version);
        let g = open(&bytes).unwrap();
        assert_eq!(g.version(), version);
        assert_eq!(g.arch().unwrap(), "gpt-oss");
        assert_eq!(g.get_u32("gpt-oss.block_count"), Some(2));
        assert_eq!(g.get_u32("gpt-oss.wide"), Some(7));
        assert_eq!(g.get_u32("gpt-oss.signed"), None);
        assert_eq!(g.get("gpt-oss.signed").unwrap().as_i64(), Some(-3));
        assert_eq!(g.get_f32("gpt-oss.float"), Some(1.5));
        assert_eq!(g.get_bool("gpt-oss.flag"), Some(true));
        assert_eq!(g.get_strings("tokenizer.ggml.tokens").unwrap()[1], b"\xff\xfe");
        assert_eq!(g.get_f32s("tokenizer.ggml.scores").unwrap()[3], 3.0);
        assert_eq!(g.get("missing"), None);
        let keys: Vec<&str> = g.metadata().iter().map(|e| e.key.as_str()).collect();
        assert_eq!(
            keys[..3],
            ["general.architecture", "gpt-oss.block_count", "tokenizer.ggml.tokens"]
        );
        assert_eq!(g.raw(g.metadata()[1].span.clone()), u32_entry("gpt-oss.block_count", 2));
        let t = g.tensor("blk.0.ffn_down.weight").unwrap();
        assert_eq!(
            (t.dims.as_slice(), t.type_name().as_str(), t.len),
            (&[256, 3][..], "Q4_K", 432)
        );
        assert_eq!(g.bytes(t), tensor("blk.0.ffn_down.weight", &[], 0, 432).bytes);
        g.advise_will_need(t);
        g.advise_dont_need(t);
        assert_eq!(g.bytes(t), tensor("blk.0.ffn_down.weight", &[], 0, 432).bytes);
    }
}

#[test]
fn a_tensor_of_unknown_type_reaches_to_the_next_or_to_the_end() {
    let g = open(&model(3)).unwrap();
    let t = g.tensor("blk.0.mystery.weight").unwrap();
    assert_eq!((t.type_name().as_str(), t.len), ("type 77", 64));
    assert_eq!(g.tensor("output.weight").unwrap().len, 32);
}

#[test]
fn values_are_written_as_they_were_read() {
    let bytes = model(3);
    let g = open(&bytes).unwrap();
    for e in g.metadata() {
        let mut written = string(e.key.as_bytes());
        e.value.write(&mut written);
        assert_eq!(written, g.raw(e.span.clone()), "{}", e.key);
    }
}

#[test]
fn any_file_cut_short_is_one_clear_error() {
    let bytes = model(3);
    let (_dir, path) = saved(&bytes);
    let least = {
        let g = Gguf::open(&path).unwrap();
        // The last tensor's type is unknown, so one byte of it is all that can be asked for.
        g.tensor("output.weight").unwrap().offset as usize + 1
    };
    for len in 0..bytes.len() {
        std::fs::write(&path, &bytes[..len]).unwrap();
        match Gguf::open(&path) {
            Ok(_) => assert!(len >= least, "{len} bytes were accepted"),
            Err(e) => assert!(len < least && !e.to_string().is_empty(), "{len}: {e}"),
        }
    }
}

#[test]
fn a_file_cut_short_in_its_data_says_how_much_is_missing() {
    let bytes = file(3, 32, &[], &[tensor("a", &[64], 0, 256), tensor("b", &[64], 0, 256)]);
    refused(&bytes[..bytes.len() - 100], "tensor `b` ends at byte");
    refused(&bytes[..bytes.len() - 100], "100 bytes are missing");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000, failure_persistence: None, ..ProptestConfig::default()
    })]
    #[test]
    fn flipped_bytes_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
    ) {
        let mut bytes = model(3);
        let header_len = open(&bytes).unwrap().data_start() as usize;
        for (at, value) in flips {
            bytes[at.index(header_len)] = value;
        }
        if let Ok(g) = open(&bytes) {
            for t in g.tensors() {
                g.bytes(t);
            }
            for e in g.metadata() {
                let v = &e.value;
                let _ = (v.to_f32s(), v.to_u32s(), v.to_bools(), v.type_name());
            }
        }
    }

    #[test]
    fn random_bytes_after_the_magic_never_panic(
        tail in prop::collection::vec(any::<u8>(), 0..300)
    ) {
        let _ = open(&[b"GGUF\x03\0\0\0", &tail[..]].concat());
    }
}

#[test]
fn a_count_or_length_beyond_the_file_is_refused_before_anything_is_allocated() {
    let start = Instant::now();
    for huge in [1 << 60, u64::MAX, 1 << 63, 1000] {
        refused(&header(3, huge, 0), "tensors follow");
        refused(&header(3, 0, huge), "metadata entries follow");
        let one = |content: &[u8], kind| [header(3, 0, 1), entry("key", kind, content)].concat();
        refused(&one(&huge.to_le_bytes(), 8), "bytes of text follow");
        let array = |kind: u32| one(&[&kind.to_le_bytes()[..], &huge.to_le_bytes()].concat(), 9);
        refused(&array(8), "strings follow");
        refused(&array(6), "numbers follow");
        refused(&array(12), "numbers follow");
        refused(&array(9), "arrays inside an array");
        refused(
            &[header(3, 0, 1), huge.to_le_bytes().to_vec(), vec![0; 20]].concat(),
            "bytes of text follow",
        );
        refused(
            &[header(3, 1, 0), huge.to_le_bytes().to_vec(), vec![0; 20]].concat(),
            "bytes of text follow",
        );
    }
    assert!(start.elapsed().as_secs() < 5);
}

#[test]
fn shapes_and_offsets_that_make_no_sense_are_refused() {
    let one = |dims: &[u64], type_id, offset| {
        [header(3, 1, 0), info(b"t", dims, type_id, offset), vec![0; 4096]].concat()
    };
    assert!(open(&one(&[8, 8], 0, 0)).is_ok());
    refused(&one(&[1, 1, 1, 1, 1], 0, 0), "5 dimensions");
    refused(&one(&[1 << 40, 1 << 40], 0, 0), "more elements than 64 bits");
    refused(&one(&[1 << 62], 28, 0), "more bytes than 64 bits");
    refused(&one(&[100], 12, 0), "blocks of 256");
    refused(&one(&[8], 0, 7), "multiple of the alignment 32");
    refused(&one(&[8], 0, 1 << 40), "bytes are missing");
    refused(&one(&[8], 0, u64::MAX - 31), "impossible offset");
    refused(&one(&[8], 77, 1 << 40), "bytes are missing");
    refused(
        &[header(3, 1, 0), string(b"t"), u32::MAX.to_le_bytes().to_vec(), vec![0; 64]].concat(),
        "dimensions",
    );
}

#[test]
fn tensors_that_overlap_are_refused() {
    let two = |(type_a, dims_a, at_a): (u32, u64, u64), (type_b, dims_b, at_b): (u32, u64, u64)| {
        let infos =
            [info(b"a", &[dims_a], type_a, at_a), info(b"b", &[dims_b], type_b, at_b)].concat();
        [header(3, 2, 0), infos, vec![0; 4096]].concat()
    };
    assert!(open(&two((0, 8, 0), (0, 8, 32))).is_ok());
    assert!(open(&two((0, 8, 32), (0, 8, 0))).is_ok(), "the order of the list is free");
    assert!(open(&two((0, 0, 32), (0, 8, 32))).is_ok(), "an empty tensor is nowhere");
    refused(&two((0, 9, 0), (0, 8, 32)), "`a` and `b` overlap");
    refused(&two((0, 8, 0), (0, 8, 0)), "overlap");
    refused(&two((77, 8, 32), (77, 8, 32)), "overlap");
    refused(&two((77, 8, 0), (0, 8, 0)), "overlap");
}

#[test]
fn names_must_be_unique_and_text() {
    let two = [info(b"t", &[1], 0, 0), info(b"t", &[1], 0, 32)].concat();
    refused(&[header(3, 2, 0), two, vec![0; 200]].concat(), "two tensors are named `t`");
    refused(
        &[header(3, 0, 2), u32_entry("k", 1), u32_entry("k", 2)].concat(),
        "two metadata entries have the key `k`",
    );
    refused(&[header(3, 1, 0), info(b"\xff", &[1], 0, 0), vec![0; 64]].concat(), "not UTF-8");
    let long = "n".repeat(80);
    assert!(
        open(&[header(3, 1, 0), info(long.as_bytes(), &[1], 0, 0), vec![0; 64]].concat()).is_ok()
    );
}

#[test]
fn an_alignment_must_be_a_power_of_two() {
    let with = |e: Vec<u8>| [header(3, 0, 1), e].concat();
    assert_eq!(open(&with(u32_entry("general.alignment", 1))).unwrap().alignment(), 1);
    assert_eq!(open(&with(u32_entry("general.alignment", 1 << 31))).unwrap().alignment(), 1 << 31);
    refused(&with(u32_entry("general.alignment", 0)), "power of two");
    refused(&with(u32_entry("general.alignment", 48)), "power of two");
    refused(&with(text("general.alignment", "32")), "must be u32");
}

#[test]
fn other_versions_and_byte_orders_say_what_they_are() {
    refused(&header(1, 0, 0), "GGUF version 1");
    refused(&header(4, 0, 0), "GGUF version 4");
    refused(&header(3u32.swap_bytes(), 0, 0), "big-endian");
    refused(
        &[header(3, 0, 1), u32_entry("k", 1)[..9].to_vec(), vec![99, 0, 0, 0, 0]].concat(),
        "unknown value type 99",
    );
    let split = |n: u16| [header(3, 0, 1), entry("split.count", 2, &n.to_le_bytes())].concat();
    refused(&split(3), "its split.count is 3 and its split.no is missing");
    assert!(open(&split(1)).is_ok());
}

#[test]
fn another_kind_of_file_is_named() {
    let safetensors = [&40u64.to_le_bytes()[..], b"{\"a\":{\"dtype\":\"F32\"}}"].concat();
    let cases: [(&[u8], &str); 10] = [
        (&safetensors, "a safetensors file"),
        (b"PK\x03\x04rest", "PyTorch"),
        (b"\x80\x02}q", "pickled"),
        (b"\n<!DOCTYPE html><html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"{\"error\": 1}", "JSON"),
        (b"tjgg\x01\0\0\0", "before GGUF"),
        (&[0; 64], "zeros"),
        (b"", "is empty"),
        (b"GG", "begins with the bytes 47 47"),
    ];
    for (bytes, name) in cases {
        refused(bytes, name);
    }
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let message = |p: &std::path::Path| Gguf::open(p).unwrap_err().to_string();
    assert!(message(dir.path()).contains("is a folder"));
    assert!(message(&dir.path().join("none")).contains("No such file"));
    #[cfg(unix)]
    assert!(message(std::path::Path::new("/dev/null")).contains("not a regular file"));
}

#[test]
fn a_vocabulary_without_tensors_opens() {
    let g = open(&[header(3, 0, 1), text("general.architecture", "llama")].concat()).unwrap();
    assert!(g.tensors().is_empty());
    assert!(open(&header(3, 0, 0)).unwrap().arch().is_err());
}

#[test]
fn a_large_vocabulary_opens_fast() {
    let tokens: Vec<String> = (0..262_144).map(|i| format!("token{i}")).collect();
    let merges: Vec<String> = (0..515_000).map(|i| format!("tok en{i}")).collect();
    let bytes = |v: &[String]| v.iter().map(|s| s.clone().into_bytes()).collect::<Vec<_>>();
    let list = |key: &str, v: &[String]| {
        let mut out = string(key.as_bytes());
        Value::Strings(bytes(v)).write(&mut out);
        out
    };
    let scores = f32_array("tokenizer.ggml.scores", &vec![-1.0; tokens.len()]);
    let entries =
        [list("tokenizer.ggml.tokens", &tokens), list("tokenizer.ggml.merges", &merges), scores];
    let (_dir, path) = saved(&file(3, 32, &entries, &[]));
    let start = Instant::now();
    let g = Gguf::open(&path).unwrap();
    println!(
        "262144 tokens, 515000 merges: opened in {:.0} ms",
        start.elapsed().as_secs_f64() * 1e3
    );
    assert_eq!(g.get_strings("tokenizer.ggml.tokens").unwrap()[262_143], b"token262143");
    assert_eq!(g.get_f32s("tokenizer.ggml.scores").unwrap().len(), 262_144);
}

#[test]
fn hashes_are_sha256() {
    let (_dir, path) = saved(&model(3));
    let g = Gguf::open(&path).unwrap();
    let hashes = sha256_tensors(&g, &Silent).unwrap();
    assert_eq!(hashes.len(), g.tensors().len());
    std::fs::write(path.with_extension("abc"), "abc").unwrap();
    let abc = sha256_file(&path.with_extension("abc"), &Silent).unwrap();
    assert_eq!(abc, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}
