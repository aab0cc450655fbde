//! Ctrl-C while the output is written.

use crate::common::gguf::*;
use crate::common::split::split;
use refusal_patch::checkpoint::Gguf;
use refusal_patch::output::{write, Plan};
use refusal_patch::progress::{Cancel, Progress};
use refusal_patch::{Error, Result};

#[derive(Default)]
struct CtrlC(Cancel);

impl Progress for CtrlC {
    fn advance(&self, _: u64) {
        self.0.cancel();
    }
    fn check(&self) -> Result<()> {
        self.0.check()
    }
}

#[test]
fn an_interrupt_leaves_nothing_behind_and_ends_only_its_own_run() {
    let (dir, path) = saved(&model(3));
    let (source, out) = (Gguf::open(&path).unwrap(), dir.path().join("out.gguf"));
    let shards = split(&source, dir.path(), "s", &[3, 2]);
    let before = listing(dir.path());
    for source in [&source, &Gguf::open(&shards[0]).unwrap()] {
        let result = write(&Plan::new(source), &out, false, &CtrlC::default());
        assert!(matches!(result, Err(Error::Interrupted)), "{result:?}");
        assert_eq!(listing(dir.path()), before);
    }
    write(&Plan::new(&source), &out, false, &refusal_patch::progress::Silent).unwrap();
    assert!(listing(dir.path()).contains(&"out.gguf".to_string()));
}
