//! Ctrl-C while the output is written.

use crate::common::alone;
use crate::common::gguf::*;
use refusal_patch::checkpoint::Gguf;
use refusal_patch::output::{write, Plan};
use refusal_patch::progress::{interrupt, Progress};
use refusal_patch::Error;

struct CtrlC;
impl Progress for CtrlC {
    fn advance(&self, _: u64) {
        interrupt();
    }
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    // An interrupt ends every run of its process.
    if !alone(an_interrupt_leaves_nothing_behind) {
        return;
    }
    let (dir, path) = saved(&model(3));
    let source = Gguf::open(&path).unwrap();
    let result = write(&Plan::new(&source), &dir.path().join("out.gguf"), false, &CtrlC);
    assert!(matches!(result, Err(Error::Interrupted)), "{result:?}");
    assert_eq!(listing(dir.path()), ["in.gguf"]);
}
