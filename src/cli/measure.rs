//! `derive` and `eval`.

use refusal_patch::evaluate::judge::Verdict;
use refusal_patch::evaluate::{categories, AnswerOptions, Evaluator, Rate};
use refusal_patch::output::{preflight_beside, write_direction, Emit, Sidecar};
use refusal_patch::search::{Derived, LayerScore, Settings, Toward};
use refusal_patch::text::{PromptRecord, Set, Split};
use refusal_patch::{Error, Result};
use serde_json::json;

use super::args::{DeriveArgs, EvalArgs};
use super::session::{open, own_prompts, prompts};
use super::table::{cells, percent, table};

/// Why there are no log-odds, in JSON.
pub const NO_LOG_ODDS: &str =
    "the first token of an answer that begins with a thinking block says nothing about refusal";

pub fn derive(args: DeriveArgs) -> Result<u8> {
    let session = open(&args.model, &args.run)?;
    preflight_beside(&session.model.file, &args.output, 1 << 20, args.force)?;
    let prompts = prompts(&args.run)?;
    let settings =
        Settings { max_new_tokens: usize::from(args.run.max_new_tokens), ..Settings::default() };
    let Derived { directions, scan } = session.derive(&prompts, &settings)?;
    let scores: Vec<LayerScore> = directions.iter().map(LayerScore::from).collect();
    write_direction(
        &args.output,
        &session.model,
        &directions,
        super::json(&scores)?,
        &prompts.sha256(),
        args.force,
        session.progress(),
    )?;
    if args.run.json {
        super::print_json(json!({
            "model": args.model.display().to_string(),
            "output": args.output.display().to_string(),
            "directions": scores,
            "scan": scan,
        }));
        return Ok(0);
    }
    let gain = |layer, toward| match scan.effects.iter().any(|e| e.toward == toward) {
        true => format!("{:+.1}", 100.0 * scan.gain(layer, toward, Emit::Weights)),
        false => "-".into(),
    };
    let mut rows = vec![cells![
        "block",
        "gap",
        "AUC",
        "Fisher",
        "split-half cosine",
        "gain to harmful",
        "to refused"
    ]];
    for s in scores.iter().filter(|s| s.position == 0) {
        rows.push(cells![
            s.layer,
            format!("{:.3}", s.gap),
            format!("{:.3}", s.auc),
            format!("{:.2}", s.fisher),
            format!("{:.3}", s.split_half),
            gain(s.layer, Toward::Projected),
            gain(s.layer, Toward::Refused)
        ]);
    }
    let note =
        "gain: points of refusal that writing along the direction to harmful, or to refused \
                prompts adds (mean of half a gap, a gap and two)";
    super::print(&format!("{}\n{note}\n\nwritten: {}\n", table(&rows), args.output.display()));
    Ok(0)
}

pub fn eval(args: EvalArgs) -> Result<u8> {
    let session = open(&args.model, &args.run)?;
    let sidecar = args.sidecar.as_ref();
    let edit = sidecar
        .map(|path| Ok::<_, Error>(Sidecar::read(path, &session.model, session.progress())?.edit))
        .transpose()?;
    let evaluator = Evaluator { edit: edit.as_ref(), ..session.evaluator() };
    let max_new = usize::from(args.run.max_new_tokens);
    let (owned, of) = match &args.prompts {
        Some(path) => (own_prompts(path)?, path.display().to_string()),
        None => {
            let set = prompts(&args.run)?;
            (
                set.split(Split::Test).into_iter().cloned().collect(),
                "the test split of the prompt sets".to_string(),
            )
        }
    };
    let list: Vec<&PromptRecord> = owned.iter().collect();
    let sequences: Vec<Vec<u32>> = if args.raw {
        let encode = |p: &&PromptRecord| session.chat.tokenizer.encode(&p.prompt, true);
        list.iter().map(|p| evaluator.with_bos(&encode(p))).collect()
    } else {
        evaluator.samples(&list)?.into_iter().map(|s| s.tokens).collect()
    };
    let mut answers = evaluator.answers_to(&list, &sequences, AnswerOptions::new(max_new))?;
    evaluator.read_refusals(&mut answers)?;
    // Whoever asks for own prompts wants these answers.
    let perplexity = args.prompts.is_none().then(|| evaluator.perplexity()).transpose()?;
    let sets: Vec<(Set, Rate)> = [Set::Harmful, Set::Harmless, Set::Borderline]
        .into_iter()
        .map(|s| (s, Rate::of(&answers, s)))
        .filter(|(_, r)| r.n > 0)
        .collect();
    let never = sets.iter().any(|(set, r)| *set == Set::Harmful && r.is_never());
    if args.run.json {
        let mut summary = serde_json::Map::new();
        for (set, r) in &sets {
            let mut of = super::json(r)?;
            let named: serde_json::Map<_, _> = categories(&answers, *set)
                .into_iter()
                .map(|(c, r)| Ok((c, super::json(&r)?)))
                .collect::<Result<_>>()?;
            if !named.is_empty() {
                of["categories"] = named.into();
            }
            summary.insert(set.name().into(), of);
        }
        summary.insert("perplexity".into(), json!(perplexity));
        if never {
            summary.insert("verdict".into(), json!("never-refused"));
        }
        let mut rows = Vec::new();
        for (a, s) in answers.iter().zip(&sequences) {
            let mut row = super::json(a)?;
            row["tokens"] = json!(s);
            rows.push(row);
        }
        let mut value = json!({
            "model": args.model.display().to_string(),
            "evaluated": of,
            "thinking": session.chat.template.thinking,
            "max_new_tokens": max_new,
            "summary": summary,
            "prompts": rows,
        });
        if answers.iter().any(|a| a.thinks) {
            value["no_log_odds"] = json!(NO_LOG_ODDS);
        }
        super::print_json(value);
        return Ok(0);
    }
    let think = answers.iter().any(|a| a.thinks);
    let row = |name: &str, r: &Rate| {
        let mut row = cells![
            name,
            r.n,
            percent(r.refusal_rate),
            format!("{} to {}", percent(r.interval.low), percent(r.interval.high)),
            r.evasive,
            r.incoherent
        ];
        // The first token of a thinking block says nothing about the answer, and only a block can
        // be unfinished.
        let last =
            if think { r.unfinished.to_string() } else { format!("{:+.2}", r.mean_log_odds) };
        row.push(last);
        row
    };
    let head = |name: String| {
        let last = if think { "unfinished" } else { "mean log-odds" };
        cells![name, "n", "refused", "95 % interval", "evasive", "incoherent", last]
    };
    let mut rows = vec![head(args.model.display().to_string())];
    rows.extend(sets.iter().map(|(set, r)| row(set.name(), r)));
    let mut out = table(&rows);
    let mut rows = vec![head("by category".into())];
    for (set, _) in &sets {
        let named = categories(&answers, *set);
        rows.extend(named.iter().map(|(c, r)| row(&format!("{}, {c}", set.name()), r)));
    }
    if rows.len() > 1 {
        out += &format!("\n{}", table(&rows));
    }
    if never {
        out +=
            "\nnever-refused: it hardly refuses a harmful prompt, as a base model that was never \
             taught to\n";
    }
    if let Some(perplexity) = perplexity {
        out += &format!("\nperplexity of the built-in text {perplexity:.2}\n");
    }
    let unfinished = answers.iter().filter(|a| a.verdict == Verdict::Unfinished).count();
    if let Some(note) = still_thinking(unfinished, answers.len(), max_new) {
        out += &format!("\n{note}\n");
    }
    super::print(&format!("{out}\nmeasured on {of}\n"));
    Ok(0)
}

/// What to say of answers that never came.
pub fn still_thinking(unfinished: usize, of: usize, max_new: usize) -> Option<String> {
    (unfinished > 0).then(|| {
        format!(
            "{unfinished} of {of} answers did not end their thinking block in {max_new} new \
             tokens or the model's context: counted \
             as not refused (--max-new-tokens N gives more room)"
        )
    })
}
