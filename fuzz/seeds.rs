//! Writes the seeds that are made of fixtures to where libFuzzer looks for them:
//! `cargo run --bin seeds`.

#[allow(dead_code)] // Only the seeds are wanted.
mod targets;

fn main() -> std::io::Result<()> {
    for target in targets::TARGETS {
        let dir = targets::root().join("fuzz/corpus").join(target.name);
        std::fs::create_dir_all(&dir)?;
        for (i, bytes) in (target.seeds)().iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{i}")), bytes)?;
        }
    }
    Ok(())
}
