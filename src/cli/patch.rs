//! The main job.

use std::path::{Path, PathBuf};
use std::time::Instant;

use refusal_patch::checkpoint::{Checkpoint, ShardName};
use refusal_patch::edit::Method;
use refusal_patch::encoding::Encoding;
use refusal_patch::evaluate::{Scores, THOUGHT};
use refusal_patch::output::{
    check_copy, clear_leftovers, preflight, preflight_checkpoint, read_direction, write_whole,
    Emit, Provenance,
};
use refusal_patch::pair::Pair;
use refusal_patch::report::{self, ReportPaths, RunFacts, RunReport};
use refusal_patch::search::{
    Candidate, EncodingChoice, Original, Outcome, Patched, Settings, Source, Trial,
};
use refusal_patch::text::Set;
use refusal_patch::{Error, Result, Session};

use super::args::{EmitArg, EncodingArg, MethodArg, PatchArgs};
use super::session::{open, peak_memory, prompts, say};
use super::table::{bytes, cells, changes, p_value, percent, rate, table};

pub fn run(args: PatchArgs) -> Result<u8> {
    let started = Instant::now();
    let (Some(input), Some(output)) = (&args.input, &args.output) else {
        return Err(Error::Model("IN and OUT are needed; see --help".into()));
    };
    // Without the slash that a folder's name may end in: the report's name is made from it.
    let output: &PathBuf = &output.components().collect();
    let session = open(input, &args.run)?;
    if Provenance::of(&session.model.file)?.is_some() {
        super::note(&format!(
            "{} was patched before; the new edit comes on top of it",
            input.display()
        ));
    }
    let settings = settings(&args, &session)?;
    let prompts = prompts(&args.run)?;
    let out = (!args.dry_run).then_some(output.as_path());
    let (html, json_path) = report_paths(output, args.report.as_deref());
    if out.is_some() {
        // A sidecar is small; of a folder OUT has all that is in it.
        let bytes = match (&session.model.file, args.emit) {
            (Checkpoint::Folder(folder), EmitArg::Weights) => {
                let (bytes, notes) = check_copy(folder)?;
                say(&notes);
                bytes
            }
            (file, EmitArg::Weights) => file.file_len(),
            _ => 1 << 20,
        };
        // They may take the space that the new file needs.
        say(&clear_leftovers(output));
        // OUT before what is named after it.
        preflight_checkpoint(&session.model.file, settings.emit, output, bytes, args.force)?;
        for path in [&html, &json_path] {
            if path == output {
                return Err(Error::Model(format!(
                    "{}: the report would replace OUT; use another --report",
                    path.display()
                )));
            }
            preflight(session.model.file.path(), path, 1 << 20, args.force)?;
        }
    }
    let original = args.reference.as_ref().map(|path| open(path, &args.run)).transpose()?;
    let mut outcome = session.patch(output, original.as_ref(), &prompts, &settings)?;
    match &mut outcome {
        Outcome::NotNeeded { why, .. }
        | Outcome::OutOfLimits { why, .. }
        | Outcome::NeverRefused { why, .. } => *why = super::with_flags(why),
        Outcome::Patched(_) => {}
    }
    let seconds = started.elapsed().as_secs_f64();
    let facts = RunFacts {
        model: input.display().to_string(),
        device: session.evaluator().compute.describe().to_string(),
        seconds,
        stages: session.stages(),
        peak_memory: peak_memory(),
    };
    let mut report = RunReport::new(outcome, &prompts, &settings, facts);
    if let (Outcome::Patched(p), true) = (&report.outcome, out.is_some()) {
        let text =
            serde_json::to_string_pretty(&report).map_err(|e| Error::Model(e.to_string()))?;
        write_whole(&json_path, (text + "\n").as_bytes(), args.force)?;
        write_whole(&html, report::html(p, &report).as_bytes(), args.force)?;
        report.report = Some(ReportPaths {
            html: html.display().to_string(),
            json: json_path.display().to_string(),
        });
    }
    if args.run.json {
        super::print_json(super::json(&report)?);
    }
    let say = |text: &str| {
        if !args.run.json {
            super::print(text);
        }
    };
    let code = match &report.outcome {
        Outcome::Patched(p) => {
            if let Some(warning) = &p.warning {
                super::warn(warning);
            }
            say(&summary(p, seconds));
            if let (Some(out), false) = (&p.out, args.run.json) {
                let load = p.load.as_ref().map_or(String::new(), |l| format!("load it: {l}\n"));
                let more = match session.model.file.gguf().map_or(1, |g| g.shards().len()) {
                    n if n > 1 && p.emit == Emit::Weights => format!(", the first of {n} shards"),
                    _ => String::new(),
                };
                say(&format!(
                    "\nwritten: {}{more}\nreport:  {}\n{load}",
                    out.display(),
                    html.display()
                ));
            }
            0
        }
        Outcome::NotNeeded { why, validation, reference, .. } => {
            say(&format!("no patch needed: {why}\n\n{}", before(validation, reference.as_deref())));
            0
        }
        Outcome::OutOfLimits { why, validation, reference, front, candidates, .. } => {
            let best = match front.is_empty() {
                true => format!("best candidates (first token):\n{}", candidate_table(candidates)),
                false => {
                    format!(
                        "the edits that were tried and that no other one beats:\n{}",
                        front_table(front)
                    )
                }
            };
            say(&format!(
                "refusal can't be restored inside the limits: {why}; nothing was \
                 written\n\n{}\n{best}",
                before(validation, reference.as_deref())
            ));
            3
        }
        Outcome::NeverRefused { why, validation, reference } => {
            let table = before(validation, reference.as_deref());
            say(&format!("never-refused: {why}; nothing was written\n\n{table}"));
            3
        }
    };
    Ok(code)
}

fn settings(args: &PatchArgs, session: &Session) -> Result<Settings> {
    let (layers, blocks) = (args.layers.given(), session.model.spec.layers);
    if let Some((first, last)) = layers.filter(|&(_, last)| last >= blocks) {
        return Err(Error::Model(format!(
            "--layers {first}..{last}: the model has blocks 0 to {}",
            blocks - 1
        )));
    }
    if args.emit == EmitArg::ControlVector && layers.is_some_and(|(first, _)| first == 0) {
        return Err(Error::Model(
            "llama.cpp can't steer block 0 by a control vector; use --layers 1 or later".into(),
        ));
    }
    let source = match &args.direction {
        None => Source::Own,
        Some(path) => {
            let (saved, warning) = read_direction(path, &session.model, session.progress())?;
            if let Some(w) = warning {
                super::warn(&w);
            }
            Source::Given(saved)
        }
    };
    Ok(Settings {
        emit: match args.emit {
            EmitArg::Weights => Emit::Weights,
            EmitArg::Lora => Emit::Lora,
            EmitArg::ControlVector => Emit::ControlVector,
        },
        method: match args.method {
            MethodArg::Auto => None,
            MethodArg::Gated => Some(Method::Gated),
            MethodArg::Amplify => Some(Method::Amplify),
            MethodArg::Restore => Some(Method::Restore),
            MethodArg::Add => Some(Method::Add),
        },
        strength: args.strength.given(),
        layers: layers.map(|(first, last)| first..=last),
        encoding: match args.encoding {
            EncodingArg::Auto => EncodingChoice::Auto,
            EncodingArg::Keep => EncodingChoice::Keep,
            EncodingArg::Q8_0 => EncodingChoice::Fixed(Encoding::Q8_0),
            EncodingArg::F16 => EncodingChoice::Fixed(Encoding::F16),
        },
        max_kl: args.max_kl,
        max_over_refusal: args.max_over_refusal,
        max_new_tokens: args.run.max_new_tokens.into(),
        source,
        routed: false,
        dry_run: args.dry_run,
        force: args.force,
    })
}

/// PATH.html and PATH.json, or beside OUT. Endings are added, not replaced: names have dots in
/// them.
fn report_paths(out: &Path, wanted: Option<&Path>) -> (PathBuf, PathBuf) {
    // All shards of a split model have one report.
    let whole = ShardName::of(out).map(|name| name.prefix);
    let (path, known, middle) = match wanted {
        Some(p) => (p, ".html", ""),
        None => (whole.as_deref().unwrap_or(out), ".gguf", ".report"),
    };
    let text = path.to_string_lossy();
    let stem = text.strip_suffix(known).unwrap_or(&text);
    (format!("{stem}{middle}.html").into(), format!("{stem}{middle}.json").into())
}

fn before(s: &Scores, original: Option<&Original>) -> String {
    let mut rows = vec![cells!["validation prompts", "IN", original.map_or("", |_| "original")]];
    for (set, r) in s.refusal.iter() {
        let goal = original.map_or(String::new(), |o| rate(o.validation.get(set)));
        rows.push(cells![format!("refusal, {}", set.name()), rate(r), goal]);
    }
    table(&rows)
}

fn summary(p: &Patched, seconds: f64) -> String {
    let (split, Pair { before: a, after: b }) = p.measured();
    let split = match split {
        "test" => "test prompts",
        _ => "validation prompts (dry run)",
    };
    let mut rows = vec![cells![
        split,
        "before",
        "after",
        if p.changes.is_empty() { "" } else { "McNemar p" },
        if p.reference.is_some() { "original" } else { "" }
    ]];
    for (set, r) in a.refusal.iter() {
        // Paired, where both answered the test prompts.
        let whole = p.changes.iter().find(|c| c.set == set && c.category.is_empty());
        rows.push(cells![
            format!("refusal, {}", set.name()),
            rate(r),
            rate(b.refusal.get(set)),
            whole.map_or(String::new(), |c| p_value(c.p_value)),
            p.original().map_or(String::new(), |o| rate(o.get(set)))
        ]);
    }
    rows.extend([
        cells!["KL on harmless answers", "", format!("{:.4}", b.kl)],
        cells![
            "perplexity, own answers",
            format!("{:.4}", a.answer_perplexity),
            format!("{:.4}", b.answer_perplexity)
        ],
        cells!["perplexity, text", format!("{:.2}", a.perplexity), format!("{:.2}", b.perplexity)],
        cells!["harmless answers unchanged", "", percent(b.same_answers)],
    ]);
    let mut out = table(&rows);
    if let Some(thinking) = &p.thinking {
        let name = format!("with thinking, cut after {THOUGHT} tokens");
        let mut rows = vec![cells![name, "before", "after"]];
        for (set, r) in thinking.before.iter() {
            let name = format!("refusal, {}", set.name());
            rows.push(cells![name, rate(r), rate(thinking.after.get(set))]);
        }
        out += &format!("\n{}", table(&rows));
    }
    let categories = p.changes.iter().filter(|c| c.set == Set::Harmful && !c.category.is_empty());
    let categories = changes("harmful, by category", ("before", "after"), categories);
    if !categories.is_empty() {
        out += &format!("\n{categories}");
    }
    let c = &p.chosen;
    out += &format!(
        "\nedit: {}, {}, strength {:.2}, {} of the weights' norm (McNemar p = {} on \
         validation)\n\n",
        c.kind(),
        c.place(),
        c.strength,
        percent(c.size),
        p_value(p.p_value)
    );
    if c.edit.iter().all(|t| t.v.is_empty()) {
        out += &format!(
            "a constant touches harmless prompts too: KL {:.4}, {} of their answers changed\n",
            b.kl,
            percent(1.0 - b.same_answers)
        );
    }
    let mut rows =
        vec![cells!["tensor", "encoding", "edit stored", "codes moved", "bytes changed"]];
    for t in &p.tensors {
        let encoding = if t.encoding.before == t.encoding.after {
            t.encoding.before.to_string()
        } else {
            format!("{} -> {}", t.encoding.before, t.encoding.after)
        };
        let moved = t.achieved.codes_moved as f64 / t.achieved.elements.max(1) as f64;
        rows.push(cells![
            t.tensor,
            encoding,
            percent(t.achieved.achieved),
            percent(moved),
            bytes(t.achieved.bytes_changed)
        ]);
    }
    let memory = peak_memory().map_or(String::new(), |m| format!(", peak memory {}", bytes(m)));
    // A sidecar touches no tensor.
    if p.emit == Emit::Weights {
        out += &table(&rows);
        out += &format!(
            "\nsize {} -> {}, {seconds:.0} s{memory}\n",
            bytes(p.bytes.before),
            bytes(p.bytes.after)
        );
    } else {
        out += &format!(
            "{} beside {}, {seconds:.0} s{memory}\n",
            bytes(p.bytes.after),
            bytes(p.bytes.before)
        );
    }
    out
}

fn front_table(front: &[Trial]) -> String {
    let mut rows = vec![cells![
        "edit",
        "strength",
        "harmful",
        "harmless",
        "borderline",
        "KL",
        "limit that it breaks"
    ]];
    rows.extend(front.iter().map(|t| {
        cells![
            format!("{}, {}", t.method.name(), t.place),
            format!("{:.2}", t.strength),
            percent(t.refused.harmful),
            percent(t.refused.harmless),
            percent(t.refused.borderline),
            format!("{:.4}", t.kl),
            t.broken.map_or("none".to_string(), |b| b.to_string())
        ]
    }));
    table(&rows)
}

fn candidate_table(candidates: &[Candidate]) -> String {
    let mut rows = vec![cells!["edit", "strength", "size", "harmful", "harmless", "borderline"]];
    rows.extend(candidates.iter().take(8).map(|c| {
        cells![
            c.place(),
            format!("{:.2}", c.strength),
            percent(c.size),
            percent(c.refused.harmful),
            percent(c.refused.harmless),
            percent(c.refused.borderline)
        ]
    }));
    table(&rows)
}
