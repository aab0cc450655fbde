//! 4-bit floats whose scales can't be read. tests/slow/four_bits.rs repairs such models.

use crate::common::organism::broken;
use refusal_patch::encoding::Encoding;
use refusal_patch::model::Model;
use refusal_patch::output::{stage, Plan};
use refusal_patch::progress::Silent;

#[test]
fn scales_of_whole_tensors_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let [plain, scaled] = ["plain.gguf", "scaled.gguf"].map(|n| dir.path().join(n));
    broken(Encoding::NVFP4, &plain);
    let model = Model::open(&plain).unwrap();
    let mut plan = Plan::new(model.file.gguf().unwrap());
    plan.added.push(refusal_patch::output::Added {
        name: "blk.0.ffn_down.scale".into(),
        dims: vec![1],
        type_id: 0,
        bytes: 0.5f32.to_le_bytes().to_vec(),
    });
    stage(&plan, &scaled, false, &Silent).unwrap().commit().unwrap();
    let e = Model::open(&scaled).map(drop).unwrap_err().to_string();
    assert!(e.contains("blk.0.ffn_down.scale") && e.contains("no scale of their own"), "{e}");
}
