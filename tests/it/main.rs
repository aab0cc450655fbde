//! The fast tests: a module for each promise. `cargo test --test it read::` runs one module.
//!
//! All tests share one process and run side by side. A test that changes the process, such as its
//! current folder, calls `common::alone` first.

mod common;

/// Files, folders and packings are read as their own libraries read them. A damaged, hostile or
/// unsuitable one is one clear error.
mod read {
    mod faults;
    mod folder;
    mod gguf;
    mod packings;
    mod tokenizer;
    mod uneven;
}

/// What is written is whole or absent, differs from the input only where it was patched, and never
/// replaces the input.
mod write {
    #[cfg(unix)]
    mod cut_off;
    mod folder;
    #[cfg(target_os = "linux")]
    mod full_disk;
    mod gguf;
    mod interrupt;
    mod two_at_once;
    mod wrapped;
}

/// Every encoding decodes as in llama.cpp and stores the edit that was asked for.
mod encodings {
    mod blocks;
    mod fold;
    mod four_bits;
    mod lattice;
}

/// The forward pass agrees with transformers and llama.cpp.
mod forward {
    mod architectures;
    mod models;
    mod rounded;
}

/// Answers, thoughts and verdicts are those of greedy generation and of people.
mod evaluate {
    mod drafts;
    mod judge;
    mod thinking;
}

/// A written edit does, read again here or in llama.cpp, what was asked.
mod round_trip {
    mod experts;
    mod packings;
    mod sidecar;
    mod split;
}

/// The main job brings refusal back inside its limits, or says why it writes nothing.
mod job {
    mod folder;
    mod main_job;
    mod reference;
    mod report;
    mod session;
    mod split;
}

/// The command line keeps its contract: exit codes, messages, JSON.
mod cli {
    mod commands;
    mod compare;
    mod renders;
}

/// Files from strangers can't harm, and the source holds what docs/SECURITY.md says of it.
mod trust {
    mod documents;
    mod fuzz;
    mod source;
}
