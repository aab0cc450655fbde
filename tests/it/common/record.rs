//! A provenance for tests that don't look at it.

use refusal_patch::output::Provenance;

pub fn record() -> Provenance {
    Provenance {
        version: "0.1.0".into(),
        source_sha256: "ab".repeat(32),
        method: "gated".into(),
        layers: vec![0],
        strength: 1.0,
        before: "{}".into(),
        after: "{}".into(),
        edits: Vec::new(),
    }
}
