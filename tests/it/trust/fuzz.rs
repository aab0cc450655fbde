//! The fuzz targets on their seeds, on what was found before, and on seeded mutations of both.
//!
//! `FUZZ_ROUNDS` and `FUZZ_SEED` make longer runs of other mutations:
//! `FUZZ_ROUNDS=100000 cargo test --test it fuzz`.

#[path = "../../../fuzz/targets/mod.rs"]
#[allow(dead_code)] // The fuzz crate uses the rest.
mod targets;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::random::Random;
use targets::{root, Target, TARGETS};

/// Mutations of each target: with thirteen targets a few thousand in a few seconds.
const ROUNDS: u64 = 250;
/// Longest run of a target on one input, on a busy machine. Templates that run into their deadline
/// have one of their own.
const LONGEST: Duration = Duration::from_secs(30);

const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    16,
    31,
    32,
    255,
    256,
    65_535,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];
const WORDS: [&str; 40] = [
    "null",
    "true",
    "-1",
    "0",
    "1e308",
    "-0.0",
    "NaN",
    "4294967296",
    "18446744073709551616",
    "\"\"",
    "[]",
    "{}",
    "[[[[[[[[",
    "\"a\":",
    ",",
    "\u{feff}",
    "é",
    "\0",
    "\n",
    "{{ ",
    " }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if ",
    "{% endif %}",
    "{% raw %}",
    "{%- ",
    "messages",
    " ~ ",
    "range(9)",
    " | tojson",
    " * 99",
    "namespace(a=1)",
    "loop.index0",
    "Sequence",
    "Regex",
    "llama",
    "gemma3",
    "qwen3moe",
    "(?=a)*",
];

/// A few small damages, most of them near the beginning, where headers are.
fn mutate(bytes: &mut Vec<u8>, others: &[Vec<u8>], r: &mut Random) {
    for _ in 0..=r.below(4) {
        let len = bytes.len();
        let within = if r.below(4) > 0 { len.min(4096) } else { len };
        let at = r.below(within + 1).min(len);
        let span = at..(at + 1 + r.below(16)).min(len);
        match r.below(10) {
            0 if at < len => bytes[at] ^= 1 << r.below(8),
            1 if at < len => bytes[at] = r.next() as u8,
            2 | 3 => {
                let number = match r.below(2) {
                    0 => *r.of(&NUMBERS),
                    _ => r.next() >> r.below(64),
                };
                let size = *r.of(&[1, 2, 4, 8]);
                let number = &number.to_le_bytes()[..size];
                if let Some(to) = bytes.get_mut(at..at + size) {
                    to.copy_from_slice(number);
                }
            }
            4 => drop(bytes.splice(span, [])),
            5 => {
                let copy = bytes[span].to_vec();
                let n = 1 + r.below(8);
                bytes.splice(at..at, copy.repeat(n));
            }
            6 => drop(bytes.splice(at..at, r.of(&WORDS).bytes())),
            7 => drop(bytes.splice(span, r.of(&WORDS).bytes())),
            8 if r.below(4) == 0 => bytes.truncate(at),
            9 if r.below(4) == 0 => {
                let other = r.of(others);
                let from = r.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            _ if at < len => bytes[at] = bytes[at].wrapping_add(1),
            _ => bytes.push(r.next() as u8),
        }
    }
    bytes.truncate(1 << 20);
}

/// Runs a target on one input; what makes it fail is kept in a file.
#[track_caller]
fn run(target: &Target, bytes: &[u8], what: &str) {
    let begun = Instant::now();
    let ran = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    if ran.is_err() || begun.elapsed() > LONGEST {
        let name = format!("fuzz-{}-{}", target.name, what.replace(' ', "-"));
        let kept = std::env::temp_dir().join(name);
        std::fs::write(&kept, bytes).unwrap();
        let took = begun.elapsed();
        panic!("{} failed on {what} after {took:?}; kept as {}", target.name, kept.display());
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn smoke(name: &str) {
    let target = TARGETS.iter().find(|t| t.name == name).expect("a target");
    let mut corpus = (target.seeds)();
    let own = root().join("fuzz/corpus").join(name);
    let mut files: Vec<_> =
        std::fs::read_dir(&own).into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.sort();
    corpus.extend(files.iter().map(|path| std::fs::read(path).unwrap()));
    assert!(!corpus.is_empty(), "{name} has no seeds");
    for (i, bytes) in corpus.iter().enumerate() {
        run(target, bytes, &format!("seed {i}"));
    }
    let rounds = number("FUZZ_ROUNDS").unwrap_or(ROUNDS);
    let first = number("FUZZ_SEED").unwrap_or(1) << 32;
    let begun = Instant::now();
    for round in 0..rounds {
        let mut r = Random(first + round);
        let mut bytes = r.of(&corpus).clone();
        mutate(&mut bytes, &corpus, &mut r);
        run(target, &bytes, &format!("round {round} of seed {}", first >> 32));
    }
    println!("{name}: {} seeds, {rounds} mutations, {:?}", corpus.len(), begun.elapsed());
}

macro_rules! smoke {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            smoke(stringify!($name));
        })*

        #[test]
        fn libfuzzer_runs_every_target_too() {
            for name in [$(stringify!($name)),*] {
                let file = root().join(format!("fuzz/fuzz_targets/{name}.rs"));
                assert!(Path::new(&file).exists(), "{}", file.display());
            }
        }
    };
}

targets::for_targets!(smoke);
