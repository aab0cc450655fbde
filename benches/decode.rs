//! Decoding speed of every encoding on one thread: `cargo bench --bench decode [-- NAME]`.

use refusal_patch::encoding::Encoding;
use std::hint::black_box;
use std::time::{Duration, Instant};

fn main() {
    // A tile as the forward pass uses it: its decoded form fits a second-level cache.
    let (columns, rows) = (4096, 32);
    let mut out = vec![0.0; columns * rows];
    println!("{:7} {:>12} {:>12} {:>14}", "", "GB/s stored", "GB/s decoded", "Gelements/s");
    let only = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    for e in Encoding::ALL.into_iter().filter(|e| only.as_ref().is_none_or(|name| name == e.name()))
    {
        let values: Vec<f32> =
            (0..out.len()).map(|i| ((i * 7919 % 2003) as f32 - 1001.0) * 1e-4).collect();
        let mut bytes = vec![0; e.bytes_for(out.len())];
        if e.has_codes() {
            e.encode(&values, &mut bytes);
        } else {
            bytes.iter_mut().zip(0u32..).for_each(|(byte, i)| *byte = (i * 7919 % 251) as u8);
        }
        let mut fastest = f64::INFINITY;
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) {
            let run = Instant::now();
            e.decode(black_box(&bytes), black_box(&mut out));
            fastest = fastest.min(run.elapsed().as_secs_f64());
        }
        let per_second = |n: usize| n as f64 / fastest / 1e9;
        let (stored, decoded) = (per_second(bytes.len()), per_second(4 * out.len()));
        println!("{:7} {stored:12.2} {decoded:12.2} {:14.2}", e.name(), per_second(out.len()));
    }
}
