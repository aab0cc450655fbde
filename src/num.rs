//! Vector arithmetic, and random vectors.

/// Euclidean norm, summed in f64.
pub fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// Dot product Σ aᵢ·bᵢ. It keeps eight running sums, so that the compiler can vectorize the loop.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (ca, cb) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in ca.zip(cb) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Rounds to whole multiples of a scale, at most 127 of them in size; returns the scale. A number
/// that isn't finite makes the scale NaN.
pub fn round_to_i8(x: &[f32], codes: &mut [i8]) -> f32 {
    /// Added to a small float, it leaves the nearest whole number in the low bits; ties go to the
    /// even one.
    const SHIFT: f32 = 12_582_912.0;
    // As bits, so that NaN is larger than all others.
    let largest = x.iter().fold(0, |a, x| (x.to_bits() & 0x7fff_ffff).max(a));
    let largest = f32::from_bits(largest);
    let inverse = 127.0 / largest;
    if !largest.is_finite() || !inverse.is_finite() {
        codes.fill(0);
        return if largest.is_finite() { 0.0 } else { f32::NAN };
    }
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (x * inverse + SHIFT).to_bits() as i8;
    }
    largest / 127.0
}

/// `a` without its part along `b`.
pub fn without(a: &[f64], b: &[f64]) -> Vec<f64> {
    let along: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>()
        / b.iter().map(|x| x * x).sum::<f64>().max(f64::MIN_POSITIVE);
    a.iter().zip(b).map(|(a, b)| a - along * b).collect()
}

/// Cosine of the angle between two vectors; 0 if one of them is zero.
pub fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
    let norms =
        (a.iter().map(|x| x * x).sum::<f64>() * b.iter().map(|x| x * x).sum::<f64>()).sqrt();
    if norms > 0.0 {
        dot / norms
    } else {
        0.0
    }
}

/// A random unit vector of `n` elements: Gaussian numbers (Box–Muller over SplitMix64), divided by
/// their norm. The same seed gives the same vector.
pub fn random_unit(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) as f64 + 0.5) / (u64::MAX as f64 + 1.0)
    };
    let v: Vec<f32> = (0..n)
        .map(|_| {
            ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32
        })
        .collect();
    let length = norm(&v);
    v.iter().map(|x| (f64::from(*x) / length) as f32).collect()
}
