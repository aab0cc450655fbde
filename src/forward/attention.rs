//! Causal attention of packed rows over keys and values that are kept per sequence.

use rayon::prelude::*;

use crate::arch::{Block, Rope, RopeStyle, Spec};
use crate::num::dot;

/// Keys and values of one layer: `[rows, kv_heads * head_dim]` each, sequences at their own
/// offsets.
#[derive(Clone, Default)]
pub struct Kv {
    /// Keys, rotated.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
}

/// Where a row's keys lie.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// First row of the sequence in [`Kv`].
    pub start: usize,
    /// How many rows it sees there.
    pub seen: usize,
}

/// Rotates the heads of `x` in place. `cos` and `sin`: `[rope.dims / 2]` of the row's position.
pub fn rotate(x: &mut [f32], rope: &Rope, head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = rope.dims / 2;
    for head in x.chunks_exact_mut(head_dim) {
        for i in 0..half {
            let (a, b) = match rope.style {
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                RopeStyle::Neox => (i, i + half),
            };
            let (p, q) = (head[a], head[b]);
            head[a] = p * cos[i] - q * sin[i];
            head[b] = p * sin[i] + q * cos[i];
        }
    }
}

/// softmax(q kᵀ · scale) v for each row. `q`: `[n, heads * head_dim]`; `spans`: what each row sees
/// in `kv`; `own`: rows that see themselves besides (forks, whose keys and values are not in `kv`):
/// `[n, kv_heads * head_dim]` keys and values. `sinks`: a logit of each head, which takes part in
/// the softmax and has no value.
pub fn attend(
    q: &[f32],
    kv: &Kv,
    spans: &[Span],
    own: Option<(&[f32], &[f32])>,
    sinks: Option<&[f32]>,
    spec: &Spec,
    block: &Block,
) -> Vec<f32> {
    let (hd, kvw) = (block.head_dim, block.kv_width());
    let width = spec.heads * hd;
    let group = spec.heads / block.kv_heads;
    let scale = spec.scales.attention;
    let mut out = vec![0.0f32; q.len()];
    out.par_chunks_mut(width).enumerate().for_each_init(
        Vec::new,
        |scores: &mut Vec<f32>, (row, out)| {
            let span = spans[row];
            for h in 0..spec.heads {
                let query = &q[row * width + h * hd..][..hd];
                let at = (h / group) * hd;
                let key = |j: usize| &kv.k[(span.start + j) * kvw + at..][..hd];
                let value = |j: usize| &kv.v[(span.start + j) * kvw + at..][..hd];
                scores.clear();
                scores.extend((0..span.seen).map(|j| dot(query, key(j)) * scale));
                if let Some((k, _)) = own {
                    scores.push(dot(query, &k[row * kvw + at..][..hd]) * scale);
                }
                if let Some(cap) = spec.scales.attention_cap {
                    scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
                }
                scores.extend(sinks.map(|sinks| sinks[h]));
                softmax(scores);
                if sinks.is_some() {
                    scores.pop();
                }
                let out = &mut out[h * hd..][..hd];
                for (j, &p) in scores.iter().enumerate() {
                    let v = match own {
                        Some((_, v)) if j == span.seen => &v[row * kvw + at..][..hd],
                        _ => value(j),
                    };
                    out.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                }
            }
        },
    );
    out
}

fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for s in scores.iter_mut() {
        *s = (*s - max).exp();
        sum += *s;
    }
    scores.iter_mut().for_each(|s| *s /= sum);
}
