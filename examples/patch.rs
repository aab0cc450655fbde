//! Repairs a model: `cargo run --example patch -- IN OUT`, a GGUF file or a Hugging Face folder.

use refusal_patch::{Options, Outcome, PromptSet, Result, Session, Settings};

fn main() -> Result<()> {
    let paths: Vec<String> = std::env::args().skip(1).collect();
    let [input, out] = &paths[..] else { panic!("usage: patch IN OUT") };
    let session = Session::open(input.as_ref(), &Options::default())?;
    let prompts = PromptSet::built_in();
    match session.patch(out.as_ref(), None, &prompts, &Settings::default())? {
        Outcome::Patched(patched) => {
            let (split, scores) = patched.measured();
            for (set, before) in scores.before.refusal.iter() {
                let after = scores.after.refusal.get(set).refusal_rate;
                let before = before.refusal_rate;
                println!("{} {split} prompts refused: {before:.3} -> {after:.3}", set.name());
            }
        }
        other => println!("nothing was written: {other:?}"),
    }
    Ok(())
}
