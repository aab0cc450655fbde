//! Packed checkpoints are read as their own libraries read them (tests/data/packings/make.py).

use std::fs;
use std::path::Path;

use crate::common::folder::*;
use crate::common::packings::*;
use refusal_patch::arch::Writer;
use refusal_patch::checkpoint::Checkpoint;
use refusal_patch::edit::fold::{achieved, fold};
use refusal_patch::encoding::Encoding;
use refusal_patch::model::Model;
use refusal_patch::packing::packed_experts;
use refusal_patch::weights::Matrix;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

#[test]
fn every_packing_is_read_as_its_own_library_reads_it() {
    for (name, most) in PACKINGS {
        let model = Model::open(&data(name)).unwrap();
        let bytes = fs::read(data(name).join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        for writer in [Writer::Attention, Writer::Ffn] {
            let (tensor, w) = model.writer(0, writer).unwrap();
            let t = expected.tensor(&tensor).unwrap();
            let encoding = match t.dtype() {
                Dtype::BF16 => Encoding::BF16,
                Dtype::F16 => Encoding::F16,
                _ => Encoding::F32,
            };
            let mut values = vec![0.0; w.rows * w.cols];
            encoding.decode(t.data(), &mut values);
            let off = |(a, b): (&f32, &f32)| (a - b).abs() / b.abs().max(1e-6);
            let worst = decoded(&w).iter().zip(&values).map(off).fold(0.0, f32::max);
            println!("{name} {tensor}: {worst:.1e} as {}", w.encoding.name());
            assert!(worst <= most, "{name} {tensor}: {worst}");
            assert!(values.iter().any(|x| *x != 0.0));
        }
    }
}

#[test]
fn inspect_knows_the_packing_and_what_a_patch_could_touch() {
    for (name, packing, tensor) in [
        ("gptq-4", "GPTQ 4-bit", "qweight"),
        ("ct-nvfp4", "NVFP4 (compressed-tensors)", "weight_packed"),
        ("ct-sparse-24", "BF16, sparse (compressed-tensors)", "compressed"),
        ("ao-fp8", "FP8 (torchao)", "_weight_qdata"),
    ] {
        let mut command = assert_cmd::Command::cargo_bin("refusal-patch").unwrap();
        let o = command.arg("inspect").arg(data(name)).arg("--json").output().unwrap();
        let report: Value = serde_json::from_slice(&o.stdout).unwrap();
        let touched = report["could_touch"].as_array().unwrap();
        assert_eq!(touched.len(), 2, "{name}: {touched:?}");
        for t in touched {
            assert_eq!((&t["packing"], &t["steppable"]), (&packing.into(), &true.into()), "{t}");
            assert!(t["tensor"].as_str().unwrap().ends_with(tensor), "{t}");
        }
    }
}

#[test]
fn experts_of_gpt_oss_are_read_as_transformers_reads_them_and_hold_an_edit() {
    let file = Checkpoint::open(&data("gpt-oss")).unwrap();
    let folder = file.folder().unwrap();
    let e = Model::open(&data("gpt-oss")).map(drop).unwrap_err().to_string();
    assert!(e.contains("leaves `num_local_experts` out"), "{e}");
    let bytes = fs::read(data("gpt-oss").join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    for name in ["gate_up_proj", "down_proj"].map(|n| format!("model.layers.0.mlp.experts.{n}")) {
        let t = expected.tensor(&name).unwrap();
        let (stack, codes) = packed_experts(folder, &name).unwrap().unwrap();
        assert_eq!(codes.name, format!("{name}_blocks"));
        // In transformers' matrices the inputs are rows.
        let (rows, cols) = stack.shape();
        assert_eq!(t.shape(), [stack.len(), cols, rows]);
        for (expert, w) in stack.iter().enumerate() {
            assert_eq!(w.encoding.name(), "MXFP4");
            let n = w.rows * w.cols;
            let mut values = vec![0.0; n];
            Encoding::BF16.decode(&t.data()[2 * n * expert..][..2 * n], &mut values);
            let ours = decoded(&w);
            for (i, x) in ours.iter().enumerate() {
                assert_eq!(*x, values[i % w.cols * w.rows + i / w.cols], "{name} {expert} {i}");
            }
            let (u, v) = edit(&w);
            let folded = fold(&w, &u, &v).unwrap();
            let stored = achieved(&w, &Matrix { bytes: &folded, ..w }, &u, &v);
            println!("{name} {expert}: {:.4} stored", stored.gain);
            assert!((0.98..=1.02).contains(&stored.gain), "{name} {expert}: {stored:?}");
        }
    }
    assert!(packed_experts(folder, "model.layers.1.mlp.experts.down_proj").unwrap().is_none());
}

#[test]
fn experts_of_gpt_oss_whose_tensors_do_not_fit_are_one_clear_error() {
    let at = "model.layers.0.mlp.experts.down_proj";
    let zeros = |part: &str, dtype, shape: &[usize]| {
        named(&format!("{at}_{part}"), dtype, shape, vec![0; shape.iter().product()])
    };
    let shapes = "expected [experts, rows, groups, 16]";
    for (dtype, codes, scales, saying) in [
        ("U8", vec![2, 64, 3, 16], None, "down_proj_scales is missing"),
        ("U8", vec![2, 64, 3, 16], Some(vec![2, 64, 2]), shapes),
        ("U8", vec![2, 64, 48], Some(vec![2, 64, 3]), shapes),
        ("U8", vec![0, 64, 3, 16], Some(vec![0, 64, 3]), shapes),
        ("U8", vec![2, 0, 1 << 50, 16], Some(vec![2, 0, 1 << 50]), shapes),
        ("I8", vec![2, 64, 3, 16], Some(vec![2, 64, 3]), "expected U8"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut all = vec![zeros("blocks", dtype, &codes)];
        all.extend(scales.map(|shape| zeros("scales", "U8", &shape)));
        fs::copy(data("gpt-oss").join("config.json"), dir.path().join("config.json")).unwrap();
        write_weights(dir.path(), &all, 1);
        let file = Checkpoint::open(dir.path()).unwrap();
        let e = packed_experts(file.folder().unwrap(), at).map(drop).unwrap_err().to_string();
        assert!(e.contains(saying) && e.contains(at) && e.lines().count() == 1, "{e}");
    }
}

/// Opens a copy of a packing's folder after a change of its tensors and `quantization_config`.
fn opened(
    dir: &Path,
    packing: &str,
    change: impl FnOnce(&mut Vec<Named>, &mut Value),
) -> Result<(), String> {
    let from = Checkpoint::open(&data(packing)).unwrap();
    let named_as = |t: &refusal_patch::checkpoint::Tensor| {
        let dtype = Box::leak(t.type_name().into_boxed_str());
        let shape: Vec<usize> = t.dims.iter().rev().map(|&d| d as usize).collect();
        named(&t.name, dtype, &shape, from.bytes(t).to_vec())
    };
    let mut tensors: Vec<Named> = from.tensors().iter().map(named_as).collect();
    let mut config: Value =
        serde_json::from_slice(&fs::read(data(packing).join("config.json")).unwrap()).unwrap();
    change(&mut tensors, &mut config["quantization_config"]);
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write_weights(dir, &tensors, 1);
    Model::open(dir).map(drop).map_err(|e| e.to_string())
}

const DOWN: &str = "model.layers.0.mlp.down_proj";

/// Opens a copy of a packing's folder in which one tensor is replaced or missing.
fn changed(dir: &Path, packing: &str, part: &str, new: Option<Named>) -> Result<(), String> {
    let wanted = format!("{DOWN}.{part}");
    opened(dir, packing, |tensors, _| {
        let before = tensors.len();
        tensors.retain(|t| t.name != wanted);
        assert_eq!(tensors.len() + 1, before, "{wanted}");
        tensors.extend(new.map(|n| Named { name: wanted, ..n }));
    })
}

#[test]
fn packings_that_cannot_be_read_are_named_with_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let set = |key: &'static str, value: &'static str| {
        move |_: &mut Vec<Named>, config: &mut Value| config[key] = value.into()
    };
    let errors = [
        (opened(dir.path(), "awq", set("version", "gemv")), "AWQ of 4 bits, version gemv"),
        (
            opened(dir.path(), "gptq-3", set("checkpoint_format", "gptq_p")),
            "GPTQ, checkpoint_format gptq_p",
        ),
        (
            opened(dir.path(), "ct-mxfp4", set("format", "mxfp6-pack-quantized")),
            "format mxfp6-pack-quantized",
        ),
        (
            opened(dir.path(), "ct-w4a16", |tensors, config| {
                config["format"] = "marlin-24".into();
                for t in tensors.iter_mut().filter(|t| t.name.ends_with("weight_scale")) {
                    t.name = t.name.replace("weight_scale", "scale_packed");
                }
            }),
            "I32 codes, format marlin-24",
        ),
        (
            opened(dir.path(), "modelopt-nvfp4", |tensors, _| {
                tensors.push(named(
                    &format!("{DOWN}.pre_quant_scale"),
                    "BF16",
                    &[128],
                    vec![0; 256],
                ));
            }),
            "NVFP4_AWQ",
        ),
        (
            opened(dir.path(), "ct-nvfp4", |tensors, _| {
                tensors.push(named(
                    &format!("{DOWN}.weight_zero_point"),
                    "I8",
                    &[64, 8],
                    vec![0; 512],
                ));
            }),
            "4-bit floats with zero points",
        ),
        (
            opened(dir.path(), "ao-int4-unpacked", |tensors, _| {
                for t in tensors.iter_mut().filter(|t| t.name.ends_with("qdata")) {
                    (t.dtype, t.shape) = ("I32", vec![t.shape[0], t.shape[1] / 4]);
                }
            }),
            "torchao, codes in I32",
        ),
    ];
    for (opened, saying) in errors {
        let e = opened.unwrap_err();
        assert!(e.contains(saying) && e.contains("model.layers.0."), "`{e}` should say `{saying}`");
        assert!(e.contains("another packing"), "no way out: {e}");
    }
}

#[test]
fn bits_and_groups_of_gptq_may_differ_by_module() {
    let dir = tempfile::tempdir().unwrap();
    let eight = Model::open(&data("gptq-8")).unwrap();
    let mixed = |config: Value| {
        opened(dir.path(), "gptq-4", |tensors, quantization| {
            for t in tensors.iter_mut().filter(|t| t.name.starts_with(DOWN)) {
                let other = eight.file.tensor(&t.name).unwrap();
                t.shape = other.dims.iter().rev().map(|&d| d as usize).collect();
                t.bytes = eight.file.bytes(other).to_vec();
            }
            quantization["dynamic"] = config;
        })
    };
    mixed(serde_json::json!({ "+:.*down_proj.*": { "bits": 8, "group_size": 64 } })).unwrap();
    let (model, four) = (Model::open(dir.path()).unwrap(), Model::open(&data("gptq-4")).unwrap());
    for (writer, from, name) in
        [(Writer::Ffn, &eight, "GPTQ 8-bit"), (Writer::Attention, &four, "GPTQ 4-bit")]
    {
        let ((_, w), (_, expected)) =
            (model.writer(0, writer).unwrap(), from.writer(0, writer).unwrap());
        assert_eq!((w.encoding.name(), decoded(&w)), (name, decoded(&expected)));
    }
    // Without the rules the shapes contradict the configuration.
    assert!(mixed(Value::Null).unwrap_err().contains(DOWN));
}

#[test]
fn parts_of_a_packing_that_do_not_fit_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let i32s = |n: i32, len: usize| n.to_le_bytes().repeat(len);
    for (packing, part, new, saying) in [
        ("gptq-4-act", "g_idx", Some(named("", "I32", &[128], i32s(4, 128))), "expected 0 to 3"),
        ("gptq-4", "g_idx", Some(named("", "I32", &[127], i32s(0, 127))), "g_idx is I32 [127]"),
        (
            "gptq-4",
            "scales",
            Some(named("", "F16", &[1, 64], vec![0; 128])),
            "expected I32 of 8 elements",
        ),
        ("gptq-4", "qzeros", None, "down_proj.qzeros is missing"),
        ("gptq-3", "qweight", Some(named("", "I32", &[7, 64], vec![0; 1792])), "3 bits don't fit"),
        ("awq", "qzeros", Some(named("", "I32", &[1, 8], vec![0; 32])), "qzeros is I32 [1, 8]"),
        ("ct-w4a16", "weight_shape", Some(named("", "I64", &[2], vec![0xff; 16])), "does not fit"),
        (
            "ct-w4a16",
            "weight_scale",
            Some(named("", "BF16", &[63, 4], vec![0; 504])),
            "weight_scale is BF16",
        ),
        (
            "fp8-block",
            "weight_scale_inv",
            Some(named("", "F32", &[3, 3], vec![0; 36])),
            "weights of 64 x 128",
        ),
        ("fp8-block", "weight_scale_inv", None, "FP8 without weight_scale"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", None, "can't be read (U8)"),
        ("nf4", "weight.absmax", Some(named("", "F32", &[1], vec![0; 4])), "absmax is F32 [1]"),
        (
            "ct-w4a16",
            "weight_packed",
            Some(named("", "U8", &[64, 64], vec![0; 4096])),
            "U8 codes, BF16 scales",
        ),
        (
            "ct-nvfp4",
            "weight_scale",
            Some(named("", "F8_E4M3", &[64, 7], vec![0; 448])),
            "expected F8_E4M3 of 512",
        ),
        (
            "ct-nvfp4",
            "weight_global_scale",
            None,
            "U8 codes, F8_E4M3 scales, format nvfp4-pack-quantized",
        ),
        (
            "ct-nvfp4",
            "weight_global_scale",
            Some(named("", "F32", &[1], vec![0; 4])),
            "expected a positive number",
        ),
        ("ct-mxfp4", "weight_scale", None, "down_proj.weight_scale is missing"),
        (
            "ct-mxfp8",
            "weight_scale",
            Some(named("", "U8", &[64, 3], vec![0; 192])),
            "weights of 64 x 128",
        ),
        ("modelopt-nvfp4", "weight_scale_2", None, "can't be read (U8)"),
        (
            "ct-sparse",
            "bitmask",
            Some(named("", "U8", &[64, 16], vec![1; 1024])),
            "keeps other elements",
        ),
        (
            "ct-sparse",
            "row_offsets",
            Some(named("", "I64", &[64], vec![0xff; 512])),
            "keeps other elements",
        ),
        ("ct-sparse-24", "bitmask", None, "down_proj.bitmask is missing"),
        (
            "ct-sparse-24",
            "shape",
            Some(named("", "I64", &[2], vec![0x7f; 16])),
            "keeps other elements",
        ),
        (
            "ct-sparse-24",
            "compressed",
            Some(named("", "U8", &[64, 64], vec![0; 4096])),
            "a sparse matrix of U8",
        ),
        ("ct-sparse-24-fp8", "weight_scale", None, "down_proj.weight_scale is missing"),
        (
            "ct-w4a16",
            "weight_packed",
            Some(named("", "I16", &[64, 16], vec![0; 2048])),
            "I16 codes",
        ),
        ("ao-int8", "_weight_scale", None, "down_proj._weight_scale is missing"),
        (
            "ao-int8",
            "_weight_qdata",
            Some(named("", "U8", &[64, 64], vec![0; 4096])),
            "torchao, codes in U8",
        ),
        (
            "ct-w4a16",
            "weight_packed",
            None,
            "packed in a way that can't be read (found: weight_scale",
        ),
    ] {
        let e = changed(dir.path(), packing, part, new).unwrap_err();
        assert!(e.contains(saying) && e.contains("down_proj"), "`{e}` should say `{saying}`");
        assert!(e.len() < 600, "too long: {e}");
    }
}
