//! A section for a model card, in Markdown.

use super::text::{p_value, percent};
use super::{file_name, RunReport};
use crate::evaluate::Rate;
use crate::output::Emit;
use crate::pair::Pair;
use crate::search::Patched;
use crate::text::Set;

/// The section, ready to paste.
pub fn model_card(p: &Patched, run: &RunReport) -> String {
    let (split, Pair { before: a, after: b }) = p.measured();
    let how = match p.emit {
        Emit::Weights => "folded into its weights",
        Emit::Lora => "as a LoRA adapter beside it",
        Emit::ControlVector => "as a control vector beside it",
    };
    let mut out = format!(
        "## Safety: refusal after compression\n\n\
         Compression can weaken a model's refusal of harmful requests. `{}` was edited by\n\
         refusal-patch {} to strengthen it: along the refusal direction, {how}.\n\n\
         | {split} prompts | before | after | p |\n|---|---|---|---|\n",
        cell(file_name(&run.model)),
        env!("CARGO_PKG_VERSION")
    );
    for set in Set::ALL {
        let change = p.changes.iter().find(|c| c.set == set && c.category.is_empty());
        out += &format!(
            "| {} requests refused | {} | {} | {} |\n",
            set.name(),
            rate(a.refusal.get(set)),
            rate(b.refusal.get(set)),
            change.map_or(String::new(), |c| p_value(c.p_value))
        );
    }
    if let Some(thinking) = &p.thinking {
        for set in Set::ALL {
            out += &format!(
                "| {} requests refused, with thinking | {} | {} | |\n",
                set.name(),
                rate(thinking.before.get(set)),
                rate(thinking.after.get(set))
            );
        }
    }
    out += &format!("| KL on harmless answers, nats | 0 | {:.4} | |\n", b.kl);
    out += &format!(
        "| perplexity of the built-in text | {:.2} | {:.2} | |\n",
        a.perplexity, b.perplexity
    );
    out += &format!("| harmless answers unchanged | | {} | |\n\n", percent(b.same_answers));
    out += "Greedy answers, judged by their openings; in brackets 95 % Wilson intervals, p from\n\
            paired exact McNemar tests. Other prompts, system prompts and languages were not\n\
            measured. Refusal of one request says nothing about attacks that rephrase it.\n\n";
    let tensors: Vec<String> = p.tensors.iter().map(|t| format!("`{}`", cell(&t.tensor))).collect();
    if !tensors.is_empty() {
        out += &format!(
            "- changed tensors: {}; all others are byte for byte those of the base\n",
            tensors.join(", ")
        );
    }
    out += &format!(
        "- edit: {}, strength {:.2}, method {}\n",
        p.chosen.place(),
        p.chosen.strength,
        p.chosen.method.name()
    );
    out += &format!("- base sha256: `{}`\n", p.sha256.before);
    if p.out.is_some() {
        out += &format!("- this file's sha256: `{}`\n", p.sha256.after);
    }
    out += &format!("- prompts sha256: `{}`\n", run.prompts.sha256);
    out
}

fn rate(r: &Rate) -> String {
    format!(
        "{} ({:.0}–{:.0} %)",
        percent(r.refusal_rate),
        100.0 * r.interval.low,
        100.0 * r.interval.high
    )
}

/// A name that may stand in a table and in code quotes.
fn cell(name: &str) -> String {
    name.chars().filter(|c| !"|`\n".contains(*c)).collect()
}
