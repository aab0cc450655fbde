//! What a verdict of `compare` can show: number of harmful prompts against the smallest loss of
//! refusal that it finds in 80 % of simulated compressions.
//!
//! `cargo run --example power > docs/notebook/power.md`

use refusal_patch::compare::{health, Health};
use refusal_patch::evaluate::stats::{mcnemar, Power, POWER};
use refusal_patch::evaluate::{Change, Rate};
use refusal_patch::pair::Pair;
use refusal_patch::text::{PromptSet, Set, Split};

/// Refusal of the original.
const BEFORE: f64 = 0.9;
/// What the gate allows.
const MAX_DROP: f64 = 0.05;
/// Simulated compressions of each cell and loss.
const TIMES: usize = 2000;
/// Shares of prompts that change sides each way without a loss.
const BACKGROUNDS: [f64; 4] = [0.0, 0.02, 0.05, 0.1];

/// SplitMix64, as shares.
struct Random(u64);

impl Random {
    fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// One compression: how many prompts are gained and lost. A prompt that the original refuses is
/// lost, and one that it answers gained, so often that the shares of all prompts are as asked.
fn compress(n: usize, loss: f64, background: f64, r: &mut Random) -> Change {
    let (mut refused, mut gained, mut lost) = (0, 0, 0);
    for _ in 0..n {
        let before = r.share() < BEFORE;
        refused += usize::from(before);
        match before {
            true => lost += usize::from(r.share() < (background + loss) / BEFORE),
            false => gained += usize::from(r.share() < background / (1.0 - BEFORE)),
        }
    }
    let rate = |refused: usize| Rate {
        n,
        refused,
        refusal_rate: refused as f64 / n as f64,
        ..Rate::default()
    };
    Change {
        set: Set::Harmful,
        category: String::new(),
        rates: Pair::new(rate(refused), rate(refused + gained - lost)),
        gained,
        lost,
        p_value: mcnemar(gained, lost),
    }
}

/// The share of compressions with this loss that the verdict calls weakened or lost.
fn found(n: usize, loss: f64, background: f64) -> f64 {
    let mut r = Random(n as u64);
    let bad = |c: Change| matches!(health(&c, MAX_DROP), Health::Weakened | Health::Lost);
    let hits = (0..TIMES).filter(|_| bad(compress(n, loss, background, &mut r))).count();
    hits as f64 / TIMES as f64
}

/// The smallest loss that is found often enough, to half a point.
fn smallest(n: usize, background: f64) -> Option<f64> {
    let steps = 1..=(200.0 * (BEFORE - background)) as usize;
    steps.map(|s| s as f64 / 200.0).find(|&loss| found(n, loss, background) >= POWER)
}

fn main() {
    let built_in = PromptSet::built_in().of(Set::Harmful, Split::Test).len();
    let points = |loss: Option<f64>| loss.map_or("none".into(), |l| format!("{:.1}", 100.0 * l));
    println!(
        "# What a verdict of `compare` can show\n\n\
         Written by `cargo run --example power > docs/notebook/power.md`.\n\n\
         The smallest true loss of refusal, in points, that is found in {:.0} % of simulated\n\
         compressions ({TIMES} for each cell and loss, losses in steps of half a point). The\n\
         original refuses {:.0} % of the harmful prompts. The background is the share of the\n\
         prompts that changes sides each way without a loss: quantization alone does that.\n\n\
         *Test*: the exact McNemar test alone, p < 0.05, computed, as `compare` prints it; the\n\
         background is rounded to whole prompts there.\n\
         *Verdict*: the test, and a measured loss over --max-drop {MAX_DROP}, simulated: a loss\n\
         that is only just over what is allowed is measured as less every other time. The\n\
         built-in set has {built_in} harmful test prompts.\n",
        100.0 * POWER,
        100.0 * BEFORE
    );
    print!("| harmful test prompts |");
    for b in BACKGROUNDS {
        print!(" background {:.0} %: test | verdict |", 100.0 * b);
    }
    println!("\n|{}", "---|".repeat(1 + 2 * BACKGROUNDS.len()));
    let mut sizes = vec![20, 40, 80, 160, 320, 640, 1280, built_in];
    sizes.sort_unstable();
    for n in sizes {
        print!("| {n} |");
        for b in BACKGROUNDS {
            let refused = (BEFORE * n as f64).round() as usize;
            let both = (b * n as f64).round() as usize;
            let test = Power::of(n, refused, both, both, MAX_DROP).smallest_loss;
            print!(" {} | {} |", points(test), points(smallest(n, b)));
        }
        println!();
    }
    println!(
        "\nHarmful test prompts that show a true loss of {:.0} points by the test alone:\n",
        100.0 * MAX_DROP
    );
    println!("| background | prompts |\n|---|---|");
    for b in BACKGROUNDS {
        let both = (b * 10_000.0).round() as usize;
        let needed = Power::of(10_000, 9000, both, both, MAX_DROP).needed;
        println!("| {:.0} % | {} |", 100.0 * b, needed.map_or("none".into(), |n| n.to_string()));
    }
}
