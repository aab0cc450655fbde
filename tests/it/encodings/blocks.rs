//! Every encoding against llama.cpp (fixtures/codecs, see make.py there) and against its own
//! contract.

use half::f16;
use proptest::prelude::*;
use refusal_patch::encoding::{Encoding, Params};
use std::path::{Path, PathBuf};

const QUANTIZED: [Encoding; 14] = {
    use Encoding::*;
    [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K, IQ4NL, IQ4XS, MXFP4, NVFP4]
};

/// The encodings whose elements have codes of their own.
const CODED: [Encoding; 17] = {
    use Encoding::*;
    [
        F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K, IQ4NL, IQ4XS, MXFP4,
        NVFP4,
    ]
};

fn fixture(name: &str) -> Vec<u8> {
    let folder =
        std::env::var("REFUSAL_PATCH_CODECS").map_or("fixtures/codecs".into(), PathBuf::from);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(name: &str) -> Vec<f32> {
    fixture(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The stored bytes and llama.cpp's decoded values; F32 is its own reference.
fn reference(e: Encoding) -> (Vec<u8>, Vec<f32>) {
    if e == Encoding::F32 {
        return (fixture("values.f32"), floats("values.f32"));
    }
    (fixture(&format!("{}.bin", e.name())), floats(&format!("{}.f32", e.name())))
}

fn decode(e: Encoding, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / e.block_bytes() * e.block_len()];
    e.decode(bytes, &mut out);
    out
}

fn unpack(e: Encoding, bytes: &[u8]) -> (Vec<i32>, Vec<Params>) {
    let n = bytes.len() / e.block_bytes() * e.block_len();
    let (mut codes, mut params) = (vec![0; n], vec![Params::default(); n]);
    e.unpack(bytes, &mut codes, &mut params);
    (codes, params)
}

fn encode(e: Encoding, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0; e.bytes_for(values.len())];
    e.encode(values, &mut out);
    out
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

#[track_caller]
fn assert_same(e: Encoding, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{e:?}");
    for (i, (&a, &b)) in got.iter().zip(expected).enumerate() {
        assert!(same(a, b), "{e:?} element {i}: {a:e} for {b:e}");
    }
}

#[test]
fn every_encoding_decodes_bit_for_bit_as_llama_cpp() {
    for e in Encoding::ALL {
        let (bytes, expected) = reference(e);
        assert_same(e, &decode(e, &bytes), &expected);
    }
}

#[test]
fn lattices_have_no_codes_of_single_elements() {
    for e in Encoding::ALL {
        assert_eq!(e.has_codes(), CODED.contains(&e), "{e:?}");
    }
}

#[test]
fn decoding_does_not_need_aligned_bytes() {
    for e in Encoding::ALL {
        let (bytes, expected) = reference(e);
        let shifted = [&[0][..], &bytes].concat();
        assert_same(e, &decode(e, &shifted[1..]), &expected);
    }
}

#[test]
fn floats_and_q8_0_are_encoded_exactly_as_llama_cpp_does() {
    use Encoding::*;
    let values = floats("values.f32");
    for e in [F32, F16, BF16, Q8_0, MXFP4, NVFP4] {
        let ours = encode(e, &values);
        assert_eq!(ours, reference(e).0[..ours.len()], "{e:?}");
    }
}

#[test]
fn the_other_encoders_are_as_good_as_llama_cpp() {
    let values = floats("values.f32");
    for e in QUANTIZED {
        let ours = encode(e, &values);
        let theirs = &reference(e).0[..ours.len()];
        // The first three rows are Gaussian weights, which quantizers are made for.
        let error = |bytes: &[u8]| {
            let pairs = decode(e, bytes).into_iter().zip(&values).take(768);
            pairs.map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
        };
        let ratio = error(&ours) / error(theirs);
        assert!(ratio < 1.05, "{e:?}: error {ratio} of llama.cpp's");
    }
}

#[test]
fn encoding_not_a_number_or_an_infinity_does_not_panic() {
    for e in CODED {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE] {
            let mut values = vec![0.01; 256];
            values[7] = odd;
            decode(e, &encode(e, &values));
            decode(e, &encode(e, &[odd; 256]));
        }
    }
}

#[test]
fn zeros_stay_zero() {
    for e in CODED {
        assert!(decode(e, &encode(e, &[0.0; 256])).iter().all(|&x| x == 0.0), "{e:?}");
    }
}

#[test]
fn ids_names_and_sizes_are_those_of_gguf() {
    let expected = [
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (30, "BF16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (20, "IQ4_NL", 32, 18),
        (23, "IQ4_XS", 256, 136),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (19, "IQ1_S", 256, 50),
        (29, "IQ1_M", 256, 56),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (22, "IQ2_S", 256, 82),
        (18, "IQ3_XXS", 256, 98),
        (21, "IQ3_S", 256, 110),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
    ];
    let found = Encoding::ALL.map(|e| (e.ggml_id(), e.name(), e.block_len(), e.block_bytes()));
    assert_eq!(found, expected);
    for e in Encoding::ALL {
        assert_eq!(Encoding::from_ggml(e.ggml_id()), Some(e));
        assert_eq!(e.bytes_for(512), 512 / e.block_len() * e.block_bytes());
    }
    for unknown_or_removed in [4, 9, 15, 31, 36, 41, u32::MAX] {
        assert_eq!(Encoding::from_ggml(unknown_or_removed), None);
    }
}

#[test]
fn every_code_in_range_survives_a_block_and_no_other_exists() {
    for e in QUANTIZED {
        let (low, high) = e.code_range();
        for code in low..=high {
            let mut bytes = vec![0; e.block_bytes()];
            e.pack(&mut bytes, &vec![code; e.block_len()]);
            assert_eq!(unpack(e, &bytes).0, vec![code; e.block_len()], "{e:?}");
        }
        let (codes, _) = unpack(e, &reference(e).0);
        assert!(codes.iter().all(|c| (low..=high).contains(c)), "{e:?}");
    }
}

#[test]
fn every_half_has_its_place_in_the_order_of_codes() {
    for e in [Encoding::F16, Encoding::BF16] {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let (codes, params) = unpack(e, &bytes);
        let mut back = vec![0; bytes.len()];
        e.pack(&mut back, &codes);
        assert_eq!(back, bytes, "{e:?}");
        let (low, high) = e.code_range();
        for (&code, (&p, y)) in codes.iter().zip(params.iter().zip(decode(e, &bytes))) {
            assert!(same(e.value(p, code), y));
            assert_eq!((low..=high).contains(&code), y.is_finite(), "{e:?} {y:e}");
        }
        for code in low..high {
            let (a, b) = (e.value(params[0], code), e.value(params[0], code + 1));
            assert!(a < b || (code == -1 && a == b), "{e:?}: {a:e} before {b:e}");
        }
        assert_eq!((codes[0], codes[0x8000]), (0, -1));
    }
}

#[test]
fn a_half_out_of_range_rounds_to_the_largest_finite_one() {
    for e in [Encoding::F32, Encoding::F16, Encoding::BF16] {
        let (low, high) = e.code_range();
        let p = Params::default();
        assert_eq!((e.nearest(p, f32::NEG_INFINITY), e.nearest(p, f32::INFINITY)), (low, high));
        assert!(e.value(p, e.nearest(p, f32::NAN)).is_finite());
    }
}

/// Bytes of two blocks whose scales are ordinary halves: finite, of either sign, sometimes zero.
fn blocks(e: Encoding) -> impl Strategy<Value = Vec<u8>> {
    let scales: &'static [usize] = match e {
        Encoding::F32 | Encoding::F16 | Encoding::BF16 | Encoding::MXFP4 | Encoding::NVFP4 => &[],
        Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q4K | Encoding::Q5K => &[0, 2],
        Encoding::Q2K => &[80, 82],
        Encoding::Q3K => &[108],
        Encoding::Q6K => &[208],
        _ => &[0],
    };
    let size = e.block_bytes();
    let half =
        prop_oneof![8 => -2.0..2.0_f32, 2 => -1e-4..1e-4_f32, 1 => Just(0.0), 1 => Just(-0.0)];
    let halves = prop::collection::vec(half, 2 * scales.len());
    (prop::collection::vec(any::<u8>(), 2 * size), halves).prop_map(move |(mut bytes, halves)| {
        for (i, x) in halves.into_iter().enumerate() {
            let at = i / scales.len() * size + scales[i % scales.len()];
            bytes[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
        }
        if e == Encoding::MXFP4 {
            // Exponents near those of weights: the largest of all have no finite multiples.
            bytes.iter_mut().step_by(size).for_each(|b| *b = 96 + *b % 64);
        }
        bytes
    })
}

fn any_blocks() -> impl Strategy<Value = (Encoding, Vec<u8>)> {
    prop::sample::select(&CODED[..]).prop_flat_map(|e| (Just(e), blocks(e)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn packing_what_was_unpacked_changes_no_bit(
        (e, bytes) in prop::sample::select(&CODED[..])
            .prop_flat_map(|e| (Just(e), prop::collection::vec(any::<u8>(), 3 * e.block_bytes())))
    ) {
        let mut packed = bytes.clone();
        e.pack(&mut packed, &unpack(e, &bytes).0);
        prop_assert_eq!(packed, bytes);
    }

    #[test]
    fn decoding_is_the_value_of_every_code((e, bytes) in any_blocks()) {
        let (codes, params) = unpack(e, &bytes);
        for ((y, &code), &p) in decode(e, &bytes).into_iter().zip(&codes).zip(&params) {
            let value = e.value(p, code);
            prop_assert!(same(y, value), "{:?}: {:e} for {:e}", e, value, y);
        }
    }

    #[test]
    fn stepping_a_code_changes_that_element_alone(
        (e, bytes) in any_blocks(), at in any::<prop::sample::Index>(), up in any::<bool>()
    ) {
        let (mut codes, params) = unpack(e, &bytes);
        let i = at.index(codes.len());
        let to = codes[i] + if up { 1 } else { -1 };
        let (low, high) = e.code_range();
        prop_assume!((low..=high).contains(&codes[i]) && (low..=high).contains(&to));
        let (before, from) = (decode(e, &bytes), codes[i]);
        codes[i] = to;
        let mut stepped = bytes;
        e.pack(&mut stepped, &codes);
        let after = decode(e, &stepped);
        for (j, (&a, &b)) in before.iter().zip(&after).enumerate() {
            prop_assert!(same(a, b) || i == j, "{:?}: {} moved with {}", e, j, i);
        }
        prop_assert_eq!(after[i] - before[i], e.value(params[i], to) - e.value(params[i], from));
        let (scale, unpacked) = (params, unpack(e, &stepped).1);
        prop_assert_eq!(scale, unpacked);
    }

    #[test]
    fn the_nearest_code_is_the_best_of_all(
        (e, bytes) in prop::sample::select(&QUANTIZED[..]).prop_flat_map(|e| (Just(e), blocks(e))),
        at in any::<prop::sample::Index>(), place in -1.5..1.5_f32
    ) {
        let (codes, params) = unpack(e, &bytes);
        let p = params[at.index(codes.len())];
        let (low, high) = e.code_range();
        // From well below the range to well above, ties among them.
        let (a, b) = (e.value(p, low), e.value(p, high));
        for x in [a + (b - a) * (place + 0.5), (a + e.value(p, low + 1)) / 2.0] {
            let error = |code| (e.value(p, code) as f64 - x as f64).abs();
            let nearest = e.nearest(p, x);
            prop_assert!((low..=high).contains(&nearest));
            let best = (low..=high).map(error).fold(f64::INFINITY, f64::min);
            // A minimum far larger than the step swallows the step's last bits: codes are equally
            // good up to the rounding of the minimum.
            let slack = f32::EPSILON as f64 * p.offset.abs() as f64;
            prop_assert!(error(nearest) <= best + slack, "{:?} {:?} {:e}: {}", e, p, x, nearest);
        }
    }

    #[test]
    fn the_nearest_float_is_no_farther_than_its_neighbours(x in any::<f32>()) {
        prop_assume!(x.is_finite());
        for e in [Encoding::F32, Encoding::F16, Encoding::BF16] {
            let (p, (low, high)) = (Params::default(), e.code_range());
            let code = e.nearest(p, x);
            let error = |code| (e.value(p, code) as f64 - x as f64).abs();
            for other in [(code - 1).max(low), (code + 1).min(high)] {
                prop_assert!(error(code) <= error(other), "{:?} {:e}", e, x);
            }
        }
    }

    #[test]
    fn what_was_encoded_decodes_close_by(
        (e, values) in prop::sample::select(&CODED[..])
            .prop_flat_map(|e| (Just(e), prop::collection::vec(-1.0..1.0_f32, 256)))
    ) {
        let (low, high) = e.code_range();
        // Half a step, with room for scales that are themselves quantized.
        let limit = match e {
            // The largest steps are a third of the largest level, and MXFP4's scale can leave a
            // quarter above it.
            Encoding::MXFP4 | Encoding::NVFP4 => 0.26,
            _ if e.block_len() == 1 => 0.005,
            _ => 2.4 / (high - low) as f32,
        };
        for (y, x) in decode(e, &encode(e, &values)).into_iter().zip(values) {
            prop_assert!((y - x).abs() < limit, "{:?}: {} for {}", e, y, x);
        }
    }
}
