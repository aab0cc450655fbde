//! `diff`.

use refusal_patch::checkpoint::Checkpoint;
use refusal_patch::diff::{diff, Difference};
use refusal_patch::pair::Pair;
use refusal_patch::Result;

use super::args::DiffArgs;
use super::progress::Bars;
use super::session::{open, prompts};
use super::table::{cells, percent, table};

pub fn run(args: DiffArgs) -> Result<u8> {
    let (before, after) = (Checkpoint::open(&args.before)?, Checkpoint::open(&args.after)?);
    let bars = Bars::new(args.run.quiet || args.run.json);
    let prompts = prompts(&args.run)?;
    let session = open(&args.before, &args.run);
    let difference = diff(&before, &after, session.as_ref().ok(), &prompts, &bars)?;
    if let Err(e) = &session {
        super::note(&format!("the off-direction change was not measured: {e}"));
    }
    if args.run.json {
        super::print_json(super::json(&difference)?);
        return Ok(0);
    }
    let Difference { identical, changed, added, metadata } = &difference;
    let mut out = format!("{identical} tensors identical (sha256), {} changed\n", changed.len());
    if !changed.is_empty() {
        let mut rows = vec![cells![
            "tensor",
            "encoding",
            "asked",
            "achieved",
            "residue",
            "off direction",
            "worst row",
            "codes moved",
            "zeros",
            "bytes changed"
        ]];
        let number =
            |x: Option<f64>, digits: usize| x.map_or("-".to_string(), |x| format!("{x:.digits$}"));
        for c in changed {
            let off = c.off_direction_energy.as_ref();
            rows.push(cells![
                c.tensor,
                if c.encoding.before == c.encoding.after {
                    c.encoding.before.clone()
                } else {
                    format!("{} -> {}", c.encoding.before, c.encoding.after)
                },
                number(c.asked, 4),
                number(c.achieved, 4),
                number(c.residue, 4),
                off.map_or("-".to_string(), |o| percent(o.overall)),
                off.map_or("-".to_string(), |o| percent(o.worst_row)),
                c.codes_moved.map_or("-".to_string(), |n| n.to_string()),
                c.sparsity.map_or("-".to_string(), |Pair { before, after }| format!(
                    "{} -> {}",
                    percent(before),
                    percent(after)
                )),
                c.bytes_changed
            ]);
        }
        out += &format!("\n{}", table(&rows));
    }
    if !added.is_empty() {
        out += &format!("\nadded: {}\n", added.join(", "));
    }
    out += &format!(
        "\nmetadata: {} {} added, {} removed, {} changed\n",
        if after.folder().is_some() { "files" } else { "keys" },
        metadata.added.len(),
        metadata.removed.len(),
        metadata.changed.len()
    );
    super::print(&out);
    Ok(0)
}
