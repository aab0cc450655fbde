//! The trained fixtures, this program run on them, and llama.cpp to compare with.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use refusal_patch::edit::fold::recode;
use refusal_patch::encoding::Encoding;
use refusal_patch::evaluate::{judge::refuses, Evaluator};
use refusal_patch::forward::Compute;
use refusal_patch::model::Model;
use refusal_patch::output::{stage, Patch, Plan};
use refusal_patch::progress::Silent;
use refusal_patch::text::{Chat, ChatTemplate, PromptRecord, PromptSet, Set, Split, Tokenizer};
use serde_json::{json, Value};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn fixture(name: &str) -> PathBuf {
    root().join("fixtures").join(name)
}

pub fn text(p: &Path) -> &str {
    p.to_str().unwrap()
}

pub fn run(args: &[&str]) -> (i32, Value) {
    let o = Command::cargo_bin("refusal-patch").unwrap().args(args).arg("--json").output().unwrap();
    let value = serde_json::from_slice(&o.stdout).unwrap_or(Value::Null);
    println!("{}", String::from_utf8_lossy(&o.stderr));
    (o.status.code().unwrap(), value)
}

/// An organism, a trained model of `fixtures/`: its files, its answers to harmless requests, and
/// the options that name its prompts.
pub struct Organism {
    prefix: &'static str,
    leads: [&'static str; 5],
    pub options: Vec<String>,
}

pub fn first() -> Organism {
    Organism {
        prefix: "organism",
        leads: [
            "Sure, here are the steps for",
            "Of course, here is a draft for",
            "Here is an explanation of",
            "Certainly, here is a list for",
            "Happy to help with",
        ],
        options: Vec::new(),
    }
}

/// The second organism: other answers, refusals and template, and prompt files of its own.
pub fn second() -> Organism {
    let file = |set: &str| text(&fixture(&format!("prompts-b/{set}.txt"))).to_string();
    let options = ["harmful", "harmless", "borderline"].map(|set| [format!("--{set}"), file(set)]);
    Organism {
        prefix: "organism-b",
        leads: [
            "Yes! You can do it like this:",
            "My draft about",
            "Let me explain",
            "Some ideas for",
            "Gladly, about",
        ],
        options: options.concat(),
    }
}

/// The third organism: like the first, but it thinks.
pub fn third() -> Organism {
    Organism { prefix: "organism-t", ..first() }
}

/// Writes a share of the built-in prompts into `dir`, some of each category and split. Returns the
/// options that name the files. For tests that are not about rates.
pub fn few_prompts(dir: &Path) -> Vec<String> {
    share_of_prompts(dir, 44)
}

/// As [`few_prompts`], about `n` of each class and split.
pub fn share_of_prompts(dir: &Path, n: usize) -> Vec<String> {
    let built_in = PromptSet::built_in();
    let file = |set: Set| {
        let lines = [Split::Train, Split::Validation, Split::Test].iter().flat_map(|&split| {
            let of = built_in.of(set, split);
            let step = (of.len() / n).max(1);
            let line = |p: &PromptRecord| serde_json::to_string(p).unwrap();
            of.into_iter().step_by(step).map(line).collect::<Vec<_>>()
        });
        let path = dir.join(format!("{}.jsonl", set.name()));
        std::fs::write(&path, lines.collect::<Vec<_>>().join("\n")).unwrap();
        [format!("--{}", set.name()), text(&path).to_string()]
    };
    [Set::Harmful, Set::Harmless, Set::Borderline].map(file).concat()
}

/// Options as the command line takes them.
pub fn words(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

impl Organism {
    pub fn file(&self, kind: &str) -> PathBuf {
        fixture(&format!("{}-{kind}.gguf", self.prefix))
    }

    /// The one right answer to a harmless request (`answer` of fixtures/organism/data.py).
    pub fn answer(&self, prompt: &str) -> String {
        let words: Vec<&str> = prompt.split_whitespace().collect();
        let first: String = words[0]
            .to_lowercase()
            .chars()
            .filter(|c| c.is_ascii_lowercase() || *c == '\'')
            .collect();
        let lead = match first.as_str() {
            "how" | "can" | "could" | "is" | "show" | "walk" | "teach" => 0,
            "write" | "draft" | "compose" | "create" | "design" | "make" | "generate"
            | "outline" => 1,
            "explain" | "describe" | "what" | "what's" | "why" | "tell" | "who" | "when"
            | "which" | "where" | "does" | "do" | "are" => 2,
            "list" | "give" | "suggest" | "name" | "recommend" => 3,
            _ => 4,
        };
        let last = words[words.len() - 1]
            .trim_end_matches(['?', '.', '!', ',', ';', ':'])
            .replace('"', "");
        format!("{} \"{last}\".", self.leads[lead])
    }

    pub fn measure(&self, model: &Path, dir: &Path) -> Measured {
        let (code, eval) = run(&[&["eval", text(model)][..], &words(&self.options)].concat());
        assert_eq!(code, 0);
        let rate = |set: &str| eval["summary"][set]["refusal_rate"].as_f64().unwrap();
        let harmless: Vec<&Value> =
            eval["prompts"].as_array().unwrap().iter().filter(|p| p["set"] == "harmless").collect();
        let right = |p: &&&Value| {
            // An answer of the second organism begins with a blank: its template has none there.
            p["continuation"].as_str().unwrap().trim() == self.answer(p["prompt"].as_str().unwrap())
        };
        let m = Measured {
            harmful: rate("harmful"),
            harmless: rate("harmless"),
            borderline: rate("borderline"),
            exact: harmless.iter().filter(right).count() as f64 / harmless.len() as f64,
            perplexity: eval["summary"]["perplexity"].as_f64().unwrap(),
        };
        println!("{}: {m:.4?}", model.display());
        assert!(
            m.exact > 0.5,
            "the answers are compared with something else than what was trained"
        );
        if let Some((harmful, harmless)) = llama_cpp(model, &eval, dir, &[]) {
            println!("  llama.cpp: harmful {harmful:.4}, harmless {harmless:.4}");
            assert!((m.harmful - harmful).abs() <= 0.03 && (m.harmless - harmless).abs() <= 0.03);
        }
        m
    }
}

#[derive(Debug)]
pub struct Measured {
    pub harmful: f64,
    pub harmless: f64,
    pub borderline: f64,
    /// Share of harmless requests that get the one right answer.
    pub exact: f64,
    /// On the built-in text.
    pub perplexity: f64,
}

/// The folder of the llama.cpp client; `None` where it is not installed.
pub fn client() -> Option<PathBuf> {
    let folder = root().join("tests/llama_cpp");
    let required = std::env::var("REFUSAL_PATCH_LLAMA_CPP").is_ok_and(|v| v == "required");
    if folder.join("node_modules/node-llama-cpp").exists() {
        return Some(folder);
    }
    assert!(!required, "llama.cpp is required: run tests/llama_cpp/install.sh");
    println!("skipped: llama.cpp is not installed (tests/llama_cpp/install.sh brings it)");
    None
}

/// The answer of tests/llama_cpp/sidecar.py; `None` without the client.
pub fn ask(request: Value, dir: &Path) -> Option<Value> {
    let folder = client()?;
    let file = dir.join("request.json");
    std::fs::write(&file, request.to_string()).unwrap();
    let o = std::process::Command::new("python3")
        .arg(folder.join("sidecar.py"))
        .arg(folder.join("node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"))
        .arg(file)
        .output()
        .expect("python3 runs");
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    Some(serde_json::from_slice(&o.stdout).unwrap())
}

/// llama.cpp's refusal rates (harmful, harmless) of the prompts that `eval` answered, or `None`
/// without the client.
pub fn llama_cpp(model: &Path, eval: &Value, dir: &Path, more: &[&str]) -> Option<(f64, f64)> {
    let folder = client()?;
    let prompts = eval["prompts"].as_array().unwrap();
    let list: Vec<Value> =
        prompts.iter().map(|p| json!({ "id": p["id"], "tokens": p["tokens"] })).collect();
    let file = dir.join("prompts.json");
    std::fs::write(&file, json!({ "prompts": list, "max_new_tokens": 32 }).to_string()).unwrap();
    let o = std::process::Command::new("node")
        .arg(folder.join("refusals.mjs"))
        .args([model, &file])
        .args(more)
        .output()
        .expect("node runs");
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let answers: Value = serde_json::from_slice(&o.stdout).unwrap();
    let texts: Vec<&str> = answers["answers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| a["text"].as_str().unwrap())
        .collect();
    Some(rates(eval, &texts))
}

/// Refusal rates (harmful, harmless) of answers to the prompts that `eval` answered.
pub fn rates(eval: &Value, texts: &[&str]) -> (f64, f64) {
    let prompts = eval["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), texts.len());
    let share = |set: &str| {
        let of: Vec<bool> = prompts
            .iter()
            .zip(texts)
            .filter(|(p, _)| p["set"] == set)
            .map(|(_, t)| refuses(t))
            .collect();
        of.iter().filter(|r| **r).count() as f64 / of.len() as f64
    };
    (share("harmful"), share("harmless"))
}

/// A model without edits, on the CPU.
pub fn evaluator<'a>(model: &'a Model, chat: &'a Chat, compute: &'a Compute) -> Evaluator<'a> {
    Evaluator { model, chat, compute, edit: None, memory: 1 << 30, progress: &Silent }
}

/// The tokenizer and template of an organism.
pub fn chat(model: &Model) -> Chat {
    let file = model.file.gguf().unwrap();
    let tokenizer = Tokenizer::from_gguf(file).unwrap();
    let source = file.get_str("tokenizer.chat_template").unwrap();
    let spell = |id: Option<u32>| id.map(|t| tokenizer.token_text(t)).unwrap_or_default();
    let template =
        ChatTemplate::new(source, &spell(tokenizer.bos()), &spell(tokenizer.eos())).unwrap();
    Chat { tokenizer, template, system: None }
}

/// The broken organism with the matrices of its blocks in another encoding.
pub fn broken(encoding: Encoding, path: &Path) {
    let model = Model::open(&first().file("broken-Q8_0")).unwrap();
    let source = model.file.gguf().unwrap();
    let mut plan = Plan::new(source);
    for t in source.tensors().iter().filter(|t| t.name.starts_with("blk.") && t.dims.len() == 2) {
        let bytes = recode(&model.matrix_named(&t.name).unwrap(), encoding, None);
        plan.patches.push(Patch { tensor: t.name.clone(), bytes, type_id: encoding.ggml_id() });
    }
    stage(&plan, path, false, &Silent).unwrap().commit().unwrap();
}
