//! Folding into a tensor's matrices, one after the other: a plain matrix, or a block's experts.

use super::fold::{fold, fold_pruned, recode};
use crate::encoding::Encoding;
use crate::error::Result;
use crate::weights::pruned::is_pruned;
use crate::weights::Stack;

/// The tensor's bytes with `u vᵀ` folded in; `v`: the matrices' gates side by side. A matrix whose
/// gate is zero keeps its bytes. `masks`: zeros of a pruned matrix stay zeros.
///
/// # Errors
/// As of [`fold`].
pub fn fold_all(stack: &Stack, u: &[f32], v: &[f32], masks: bool) -> Result<Vec<u8>> {
    let (_, cols) = stack.shape();
    let mut out = Vec::new();
    for (w, v) in stack.iter().zip(v.chunks_exact(cols)) {
        if v.iter().all(|x| *x == 0.0) {
            out.extend_from_slice(w.bytes);
        } else if masks && is_pruned(&w) {
            out.extend(fold_pruned(&w, u, v)?);
        } else {
            out.extend(fold(&w, u, v)?);
        }
    }
    Ok(out)
}

/// The tensor in another encoding, with an edit added before it is quantized.
pub fn recode_all(stack: &Stack, encoding: Encoding, edit: Option<(&[f32], &[f32])>) -> Vec<u8> {
    let (_, cols) = stack.shape();
    let one = |i: usize| {
        let edit = edit.map(|(u, v)| (u, &v[i * cols..(i + 1) * cols]));
        recode(&stack.get(i), encoding, edit)
    };
    (0..stack.len()).flat_map(one).collect()
}
