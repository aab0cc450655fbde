//! Merges neighbouring spans of text: the core of both byte-pair encoding and SentencePiece.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// A span of the text, in a doubly linked list. A span that was merged into its left neighbour is
/// empty.
struct Span {
    start: usize,
    end: usize,
    prev: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

/// Merges the characters of a text into spans. Each step merges the pair of neighbours with the
/// lowest `rank`, the leftmost pair first among equals, until `rank` is `None` for every pair.
pub(super) fn merge<K: Ord>(
    text: &str,
    mut rank: impl FnMut(Range<usize>, Range<usize>) -> Option<K>,
) -> Vec<Range<usize>> {
    let mut spans: Vec<Span> = text
        .char_indices()
        .enumerate()
        .map(|(i, (start, c))| Span {
            start,
            end: start + c.len_utf8(),
            prev: i.wrapping_sub(1),
            next: i + 1,
        })
        .collect();
    let Some(last) = spans.last_mut() else { return Vec::new() };
    last.next = NONE;
    let mut queue = BinaryHeap::new();
    let mut offer = |spans: &[Span], queue: &mut BinaryHeap<_>, left: usize, right: usize| {
        if left != NONE && right != NONE {
            let (l, r) = (&spans[left], &spans[right]);
            if let Some(key) = rank(l.start..l.end, r.start..r.end) {
                queue.push(Reverse((key, left, l.end, r.end)));
            }
        }
    };
    for right in 1..spans.len() {
        offer(&spans, &mut queue, right - 1, right);
    }
    while let Some(Reverse((_, left, middle, end))) = queue.pop() {
        let right = spans[left].next;
        // Skip a pair if one of its spans was merged after the pair was queued.
        if spans[left].end != middle || right == NONE || spans[right].end != end {
            continue;
        }
        let after = spans[right].next;
        spans[left].end = end;
        spans[left].next = after;
        spans[right].end = spans[right].start;
        if after != NONE {
            spans[after].prev = left;
        }
        offer(&spans, &mut queue, spans[left].prev, left);
        offer(&spans, &mut queue, left, after);
    }
    spans.iter().filter(|s| s.start < s.end).map(|s| s.start..s.end).collect()
}
