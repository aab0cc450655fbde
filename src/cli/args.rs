//! What can be said on the command line. Populating these needs nothing but validation.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Restores the refusal of harmful requests that compression took from a language model.
///
/// `refusal-patch IN.gguf OUT.gguf` measures IN, finds its refusal direction, folds the smallest
/// edit that brings refusal back into the quantized weights, writes OUT in the same format and
/// size, and measures OUT.
///
/// Exit codes: 0 done (also when no patch is needed), 1 error, 2 usage, 3 no edit restores refusal
/// inside the limits (or `compare` found that refusal fell), 130 interrupted.
#[derive(Parser)]
#[command(
    name = "refusal-patch",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub patch: PatchArgs,
}

#[derive(Subcommand)]
pub enum Command {
    /// Derive the refusal direction of a model, with its scores
    Derive(DeriveArgs),
    /// Measure refusal, over-refusal and perplexity of a model
    Eval(EvalArgs),
    /// What compression did to refusal; exit code 3 when it fell
    Compare(CompareArgs),
    /// Compare two files tensor by tensor: identical or changed, edit asked and achieved
    Diff(DiffArgs),
    /// Show what is in a file, what a patch would touch, and what a prompt looks like to the model
    Inspect(InspectArgs),
}

#[derive(Args)]
pub struct PatchArgs {
    /// The model to patch: a GGUF file, any shard of a split one. It is only read.
    #[arg(value_name = "IN", required = true)]
    pub input: Option<PathBuf>,
    /// Where the patched model goes. Of a split IN: the name of a shard, as IN has them, or a name
    /// without a number (out.gguf stands for out-00001-of-00003.gguf and its siblings)
    #[arg(value_name = "OUT", required = true)]
    pub output: Option<PathBuf>,
    /// What OUT is: IN with the edit folded in, or the edit beside it as a LoRA adapter or a
    /// control vector (GGUF)
    #[arg(long, value_enum, default_value = "weights")]
    pub emit: EmitArg,
    /// The uncompressed original: its refusal is the goal, its directions and weights are there to
    /// restore from
    #[arg(long, value_name = "MODEL", required_if_eq("method", "restore"))]
    pub reference: Option<PathBuf>,
    /// How the edit's gate is made; auto is gated (add for a control vector, which has no gate)
    /// and, with a reference, restore
    #[arg(long, value_enum, default_value = "auto")]
    pub method: MethodArg,
    /// Strength in units of the gap between harmful and harmless prompts, above 0; given
    /// explicitly, it also patches a healthy model
    #[arg(long, value_name = "auto|X", default_value = "auto", value_parser = strength)]
    #[arg(allow_hyphen_values = true)]
    pub strength: Auto<f64>,
    /// Blocks to consider: one, or a range A..B with both ends
    #[arg(long, value_name = "auto|L|A..B", default_value = "auto", value_parser = layers)]
    pub layers: Auto<(usize, usize)>,
    /// Encoding of the touched tensors; auto keeps it where the grid holds the edit
    #[arg(long, value_enum, default_value = "auto")]
    pub encoding: EncodingArg,
    /// Use a direction that `derive -o` saved
    #[arg(long, value_name = "FILE")]
    pub direction: Option<PathBuf>,
    /// Most KL(IN ‖ OUT) on IN's answers to harmless prompts, in nats
    #[arg(long, value_name = "X", default_value_t = 0.02, value_parser = fraction)]
    pub max_kl: f64,
    /// Most rise of the refusal of harmless prompts, as a share
    #[arg(long, value_name = "X", default_value_t = 0.01, value_parser = fraction)]
    pub max_over_refusal: f64,
    /// Where the report goes: PATH.html and PATH.json [default: OUT with .report.html and
    /// .report.json]
    #[arg(long, value_name = "PATH")]
    pub report: Option<PathBuf>,
    /// Choose, but write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Overwrite OUT
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Options of every command that runs a model.
#[derive(Args, Clone)]
pub struct RunArgs {
    /// Ends what runs.
    #[arg(skip)]
    pub cancel: refusal_patch::progress::Cancel,
    /// Harmful prompts instead of the built-in ones: by the file's ending .txt (one a line), .json,
    /// .jsonl, .ndjson, .csv or .tsv
    #[arg(long, value_name = "F")]
    pub harmful: Option<PathBuf>,
    /// Harmless prompts instead of the built-in ones
    #[arg(long, value_name = "F")]
    pub harmless: Option<PathBuf>,
    /// Borderline prompts (they sound harmful and are not) instead of the built-in ones
    #[arg(long, value_name = "F")]
    pub borderline: Option<PathBuf>,
    /// A system prompt for every chat
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// A Jinja chat template instead of the file's
    #[arg(long, value_name = "F")]
    pub chat_template: Option<PathBuf>,
    /// A tokenizer.json instead of the file's tokenizer
    #[arg(long, value_name = "F")]
    pub tokenizer: Option<PathBuf>,
    /// Where matrix products run: auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Multiply 32-bit floats only. Otherwise the CPU multiplies block types of GGUF (Q4_K and so
    /// on) in 8-bit integers, as llama.cpp does
    #[arg(long)]
    pub exact: bool,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Memory for activations, such as 512M or 4G [default: half of what is free, at most 2G]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: Option<usize>,
    /// Render chats with thinking off, or on (eval, compare and inspect only): answers are judged
    /// after the thinking block, and those that do not end it within their new tokens are counted
    /// as unfinished
    #[arg(long, value_enum, default_value = "off")]
    pub thinking: ThinkingArg,
    /// New tokens per answer, greedy [default: 32; with --thinking on 1024, and no more than the
    /// context holds]
    #[arg(
        long,
        value_name = "N",
        default_value = "32",
        default_value_if("thinking", "on", "1024"),
        hide_default_value = true,
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    pub max_new_tokens: u16,
    /// Machine-readable output on standard output
    #[arg(long)]
    pub json: bool,
    /// No progress
    #[arg(long, short)]
    pub quiet: bool,
}

#[derive(Args)]
pub struct DeriveArgs {
    /// A GGUF file
    pub model: PathBuf,
    /// Where the direction goes, as safetensors
    #[arg(short, long, value_name = "D.safetensors")]
    pub output: PathBuf,
    /// Overwrite it
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Args)]
pub struct EvalArgs {
    /// A GGUF file
    pub model: PathBuf,
    /// Any prompts to answer, instead of the test split of the prompt sets
    #[arg(long, value_name = "F")]
    pub prompts: Option<PathBuf>,
    /// No chat template: the model continues the text itself
    #[arg(long)]
    pub raw: bool,
    /// With this LoRA adapter or control vector, which `--emit` wrote for this model
    #[arg(long, value_name = "F")]
    pub sidecar: Option<PathBuf>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Args)]
pub struct CompareArgs {
    /// The model before compression: a GGUF file
    pub original: PathBuf,
    /// The same model, pruned or quantized
    pub compressed: PathBuf,
    /// Most that the refusal of harmful prompts may fall, as a share; more, unless it may be chance
    /// (paired McNemar test, p < 0.05), is exit code 3
    #[arg(long, value_name = "X", default_value_t = 0.05, value_parser = fraction)]
    pub max_drop: f64,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Args)]
pub struct DiffArgs {
    /// The file before
    pub before: PathBuf,
    /// The file after
    pub after: PathBuf,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Args)]
pub struct InspectArgs {
    /// A GGUF file; a vocabulary alone will do for prompts
    pub model: PathBuf,
    /// Show what the model sees of this request
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Show what the model sees of these requests
    #[arg(long, value_name = "F")]
    pub prompts: Option<PathBuf>,
    /// The tokens of the text itself, without template
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// A value, or the tool's own choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Auto<T> {
    Auto,
    Given(T),
}

impl<T> Auto<T> {
    pub fn given(self) -> Option<T> {
        match self {
            Auto::Auto => None,
            Auto::Given(x) => Some(x),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum MethodArg {
    Auto,
    /// Fires on harmful prompts only
    Gated,
    /// Strengthens what the layer writes: a baseline
    Amplify,
    /// Puts back what compression took from the weights; needs --reference
    Restore,
    /// A constant, as a bias: touches every token
    Add,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EmitArg {
    Weights,
    Lora,
    ControlVector,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum EncodingArg {
    Auto,
    Keep,
    #[value(name = "q8_0")]
    Q8_0,
    F16,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ThinkingArg {
    Off,
    On,
}

fn strength(text: &str) -> Result<Auto<f64>, String> {
    if text == "auto" {
        return Ok(Auto::Auto);
    }
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok(Auto::Given(x)),
        _ => Err("a strength is a number above 0: this tool only restores refusal".into()),
    }
}

fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x >= 0.0 && x.is_finite() => Ok(x),
        _ => Err("a limit is a number of 0 or more".into()),
    }
}

fn layers(text: &str) -> Result<Auto<(usize, usize)>, String> {
    if text == "auto" {
        return Ok(Auto::Auto);
    }
    let (a, b) = text.split_once("..").unwrap_or((text, text));
    match (a.parse(), b.parse()) {
        (Ok(a), Ok(b)) if a <= b => Ok(Auto::Given((a, b))),
        _ => Err("expected auto, a block such as 5, or a range such as 3..8".into()),
    }
}

fn size(text: &str) -> Result<usize, String> {
    let (digits, unit) = text.split_at(text.trim_end_matches(|c: char| c.is_alphabetic()).len());
    let shift = match unit.to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err("expected a size such as 512M or 4G".into()),
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .filter(|&n| n > 0)
        .ok_or_else(|| "expected a size such as 512M or 4G".into())
}
