//! `inspect`.

use std::collections::{BTreeMap, BTreeSet};

use refusal_patch::arch::{Block, Names, Spec, Writer};
use refusal_patch::checkpoint::{Checkpoint, Gguf, Tensor};
use refusal_patch::encoding::Encoding;
use refusal_patch::output::Provenance;
use refusal_patch::packing::{packed_experts, packing_of};
use refusal_patch::text::Prompt;
use refusal_patch::Result;
use serde_json::{json, Value};

use super::args::InspectArgs;
use super::session::{options, own_prompts};
use super::table::{bytes, cells, table};
use refusal_patch::session::{chat, template, tokenizer};

/// The tensors of a writer.
fn could_touch(file: &Checkpoint, names: &Names, layer: usize, writer: Writer) -> Vec<Value> {
    let module = names.module(writer.role(), layer);
    if let Some((packing, t)) = file.folder().and_then(|f| packing_of(f, &module)) {
        let (name, kind) = (&t.name, t.type_name());
        return vec![
            json!({ "tensor": name, "type": kind, "packing": packing, "steppable": true }),
        ];
    }
    let stack = |t: &Tensor| {
        let (folder, name) = (file.folder()?, t.name.strip_suffix("_blocks")?);
        packed_experts(folder, name).ok()?.map(|(stack, _)| stack.encoding().name())
    };
    let steppable = |id| Encoding::from_ggml(id).is_some_and(Encoding::has_codes);
    let own = file.tensors().iter().filter(|t| names.is_writer(&t.name, layer, writer));
    let show = |t: &Tensor| {
        let (name, kind) = (&t.name, t.type_name());
        match stack(t) {
            Some(packing) => {
                json!({ "tensor": name, "type": kind, "packing": packing, "steppable": true })
            }
            None => json!({ "tensor": name, "type": kind, "steppable": steppable(t.type_id) }),
        }
    };
    own.map(show).collect()
}

pub fn run(args: InspectArgs) -> Result<u8> {
    let file = Checkpoint::open(&args.model)?;
    if args.prompt.is_some() || args.prompts.is_some() {
        return show_prompts(&args, &file);
    }
    let mut types: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for t in file.tensors() {
        let entry = types.entry(t.type_name()).or_default();
        *entry = (entry.0 + 1, entry.1 + t.len);
    }
    let (spec, names) = (Spec::of(&file), Names::of(&file));
    // A patch may touch the writers of any block.
    let touched: Vec<Value> = spec.as_ref().map_or(Vec::new(), |s| {
        (0..s.layers.min(file.tensors().len()))
            .flat_map(|l| s.writers(l).iter().map(move |w| (l, *w)))
            .flat_map(|(l, w)| could_touch(&file, &names, l, w))
            .collect()
    });
    let provenance = Provenance::of(&file)?;
    let architecture = match &file {
        Checkpoint::Gguf(g) => g.arch().unwrap_or("unknown"),
        Checkpoint::Folder(f) => f.text_config()["model_type"].as_str().unwrap_or("unknown"),
    };
    let key = |key: &str| file.gguf().and_then(|g: &Gguf| g.get_str(key));
    let has_template = template(&file)?.is_some();
    if args.run.json {
        let tensors: Vec<Value> = file
            .tensors()
            .iter()
            .map(|t| {
                let kind = t.type_name();
                json!({ "name": t.name, "dims": t.dims, "type": kind, "bytes": t.len })
            })
            .collect();
        let experts = spec.as_ref().ok().and_then(|s| Some((s, s.experts.as_ref()?)));
        let experts = experts.map(|(s, e)| {
            json!({
                "count": e.count,
                "used": e.used,
                "width": e.ffn,
                "shared": e.shared,
                "normalised": e.normalised,
                "blocks": (0..s.layers).filter(|&l| e.are_in(l)).count(),
            })
        });
        super::print_json(json!({
            "file": args.model.display().to_string(),
            "shards": file.gguf().map(|g| g.shards().len()),
            "architecture": architecture,
            "supported": spec.is_ok(),
            "experts": experts,
            "tensors": tensors,
            "could_touch": touched,
            "sidecar": key("refusal_patch.sidecar"),
            "chat_template": has_template,
            "provenance": provenance.map(|p| json!({
                "version": p.version,
                "source_sha256": p.source_sha256,
                "method": p.method,
                "layers": p.layers,
                "strength": p.strength,
                "tensors": p.edits.iter().map(|e| e.tensor.clone()).collect::<Vec<_>>(),
            })),
        }));
        return Ok(0);
    }
    if let Some(kind) = key("refusal_patch.sidecar") {
        let text = |name: &str| key(&format!("refusal_patch.{name}")).unwrap_or("?");
        super::print(&format!(
            "{}: {kind} of refusal-patch {} for a {} model with sha256 {}\nblocks {}: {}\n",
            args.model.display(),
            text("version"),
            text("base_architecture"),
            text("base_sha256"),
            text("blocks"),
            text("operation")
        ));
        return Ok(0);
    }
    let mut out = format!(
        "{}: {}, {}, architecture {architecture}\n",
        args.model.display(),
        match &file {
            Checkpoint::Gguf(g) => match g.shards().len() {
                1 => format!("GGUF v{}", g.version()),
                n => format!("GGUF v{} in {n} shards", g.version()),
            },
            Checkpoint::Folder(f) => format!("{} safetensors files", f.files().len()),
        },
        bytes(file.file_len())
    );
    match &spec {
        Ok(s) => {
            out += &format!(
                "{} blocks, hidden {}, {} heads of {} ({} key/value), {}, vocabulary {}{}\n",
                s.layers,
                s.hidden,
                s.heads,
                either(s, |b| b.head_dim),
                either(s, |b| b.kv_heads),
                feed_forward(s),
                s.vocab,
                block(s)
            )
        }
        Err(e) => out += &format!("can't be run: {}\n", super::with_flags(&e.to_string())),
    }
    let known = |name: &str| key(name).unwrap_or("none");
    out += &match &file {
        Checkpoint::Gguf(_) => {
            format!("tokenizer {} ({})", known("tokenizer.ggml.model"), known("tokenizer.ggml.pre"))
        }
        Checkpoint::Folder(f) if f.dir().join("tokenizer.json").exists() => {
            "tokenizer.json present".into()
        }
        Checkpoint::Folder(_) => "tokenizer.json missing (use --tokenizer)".into(),
    };
    out += &format!(
        ", chat template {}\n\n",
        if has_template { "present" } else { "missing (use --chat-template)" }
    );
    let mut rows = vec![cells!["type", "tensors", "size", "can be patched"]];
    for (name, (n, size)) in &types {
        let patched = match Encoding::ALL.iter().find(|e| e.name() == name) {
            Some(e) if e.has_codes() => "yes",
            Some(_) => "in a finer type",
            None if touched.iter().any(|t| t["type"] == *name && t["steppable"] == true) => "yes",
            None => "no",
        };
        rows.push(cells![name, n, bytes(*size), patched]);
    }
    out += &table(&rows);
    out += &format!(
        "\na patch may touch a few of {} writers (attention output, feed-forward down)\n",
        touched.len()
    );
    if let Some(p) = provenance {
        out += &format!(
            "patched by refusal-patch {}: {} edit of block {:?}, strength {}, of a file with \
             sha256 {}\n",
            p.version, p.method, p.layers, p.strength, p.source_sha256
        );
    }
    super::print(&out);
    Ok(0)
}

/// The sizes of all blocks in words: `256 or 512`.
fn either(s: &Spec, size: impl Fn(&Block) -> usize) -> String {
    let all: BTreeSet<usize> = s.blocks.iter().map(size).collect();
    all.iter().map(usize::to_string).collect::<Vec<_>>().join(" or ")
}

/// A block's feed-forward layers in words.
fn feed_forward(s: &Spec) -> String {
    let dense = format!("feed-forward {}", either(s, |b| b.ffn));
    let Some(e) = &s.experts else { return dense };
    let shared =
        if e.shared > 0 { format!(" and a shared one of {}", e.shared) } else { String::new() };
    let weights = if e.normalised { "" } else { ", weights not normalised" };
    let dense = match (0..s.layers).filter(|&l| !e.are_in(l)).count() {
        _ if e.parallel => format!(" beside {dense}"),
        0 => String::new(),
        n => format!(", in {n} blocks {dense}"),
    };
    format!("{} of {} experts of {}{shared}{weights}{dense}", e.used, e.count, e.ffn)
}

/// What else is to be known of its blocks, in words.
fn block(s: &Spec) -> String {
    let windows: Vec<usize> = s.blocks.iter().filter_map(|a| a.window).collect();
    let mut out = match windows.first() {
        Some(window) => format!(", windows of {window} tokens in {} blocks", windows.len()),
        None => String::new(),
    };
    if let Some(net) = &s.delta {
        let n = net.blocks.iter().filter(|b| **b).count();
        out += &format!(
            ", gated delta nets instead of attention in {n} blocks ({} key and {} value heads)",
            net.key_heads, net.value_heads
        );
    }
    let shares = s.blocks.iter().filter(|b| b.shares.is_some()).count();
    if shares > 0 {
        out += &format!(", keys and values of earlier blocks in the last {shares}");
    }
    if let Some(p) = &s.per_layer {
        out += &format!(", per-layer embeddings of {}", p.width);
    }
    if s.norms.after() {
        out += ", norms after the writers: an edit turns what they add, and can't lengthen it";
    }
    out
}

fn show_prompts(args: &InspectArgs, file: &Checkpoint) -> Result<u8> {
    let texts: Vec<String> = match (&args.prompt, &args.prompts) {
        (Some(text), _) => vec![text.clone()],
        (None, Some(path)) => own_prompts(path)?.into_iter().map(|p| p.prompt).collect(),
        (None, None) => Vec::new(),
    };
    let (tokenizer, chat) = if args.raw {
        (Some(tokenizer(file, &options(&args.run))?), None)
    } else {
        (None, Some(chat(file, &options(&args.run))?))
    };
    let mut shown = Vec::new();
    for text in &texts {
        let prompt = match (&chat, &tokenizer) {
            (Some(chat), _) => chat.prompt(text)?,
            (None, Some(t)) => {
                Prompt { text: text.clone(), tokens: t.encode(text, true), post_instruction: 0..0 }
            }
            (None, None) => continue,
        };
        shown.push((text, prompt));
    }
    let tokenizer = chat.as_ref().map(|c| &c.tokenizer).or(tokenizer.as_ref());
    let spell = |id: u32| tokenizer.map(|t| t.token_text(id)).unwrap_or_default();
    if args.run.json {
        let prompts: Vec<Value> = shown
            .iter()
            .map(|(text, p)| {
                let token = |&id: &u32| json!({ "id": id, "token": spell(id) });
                json!({
                    "text": text,
                    "rendered": p.text,
                    "tokens": p.tokens.iter().map(token).collect::<Vec<_>>(),
                    "post_instruction": p.post_instruction.clone().collect::<Vec<_>>(),
                })
            })
            .collect();
        super::print_json(json!({ "prompts": prompts }));
        return Ok(0);
    }
    for (_, p) in shown {
        let mut rows = vec![cells!["token", "id", "position", ""]];
        for (i, &id) in p.tokens.iter().enumerate() {
            let role = match i {
                i if i + 1 == p.post_instruction.end => "decides",
                i if p.post_instruction.contains(&i) => "post-instruction",
                _ => "",
            };
            rows.push(cells![format!("{:?}", spell(id)), id, i, role]);
        }
        super::print(&format!("{:?}\n\n{}\n", p.text, table(&rows)));
    }
    Ok(0)
}
