//! The tokenizer. Read from GGUF metadata it gives the token ids of llama.cpp; read from a
//! `tokenizer.json` it uses the `tokenizers` crate.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use super::added;
use super::bpe::Bpe;
use super::guard::{self, guarded};
use super::pre::{self, Pre, Spelling};
use super::special::{Part, Special, Specials};
use super::spm::Spm;
use super::vocab::{self, token_key, Kind, Vocab};
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

const HINT: &str = "use `tokenizer` tokenizer.json, the file that comes with the original model";

/// Encodes text as token ids and decodes token ids to text.
pub struct Tokenizer {
    engine: Engine,
    specials: Specials,
    ends: HashSet<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    chat_bos: bool,
}

enum Engine {
    Bpe(Vocab, Box<Bpe>),
    Spm(Vocab, Spm),
    Json(Box<Json>),
}

/// The tokenizer of a `tokenizer.json`.
struct Json {
    inner: tokenizers::Tokenizer,
    /// The tokenizer for text after a special token. Present only if `inner` puts a blank before
    /// the start of the whole text and nowhere else.
    later: Option<tokenizers::Tokenizer>,
    /// Special tokens, which decoding leaves out.
    hidden: HashSet<u32>,
    /// Why a text had no tokens.
    fault: OnceLock<String>,
}

impl Tokenizer {
    /// Builds the tokenizer that the metadata of a GGUF file describe.
    ///
    /// # Errors
    /// Metadata keys that are missing or contradict each other; an unsupported tokenizer model or
    /// pre-tokenizer.
    pub fn from_gguf(file: &Gguf) -> Result<Tokenizer> {
        let path = file.path().display();
        let model = model(file).ok_or_else(|| {
            Error::unsupported(
                format!("{path}: metadata key tokenizer.ggml.model is missing"),
                HINT,
            )
        })?;
        if !["gpt2", "gemma4", "llama"].contains(&model) {
            return Err(Error::unsupported(
                format!(
                    "{path}: tokenizer.ggml.model is {model:?}; supported: gpt2, gemma4, llama"
                ),
                HINT,
            ));
        }
        let pre = if model == "llama" { None } else { Some(known_pre(file)?) };
        let vocab = Vocab::read(file)?;
        let specials = Specials::new(vocab.specials(file));
        let size = vocab.len();
        let mut ends: HashSet<u32> = vocab.ends.iter().copied().collect();
        let [mut bos, mut eos] = ["bos", "eos"].map(|key| token_key(file, key, size));
        let engine = match pre {
            Some(pre) => {
                let merges = match file.get_strings("tokenizer.ggml.merges") {
                    None if pre.optional_merges() => &[],
                    _ => vocab::strings(file, "tokenizer.ggml.merges")?,
                };
                let bpe = Bpe::new(pre, merges).map_err(|e| {
                    Error::Model(format!("{path}: the tokenizer can't be built: {e}"))
                })?;
                Engine::Bpe(vocab, Box::new(bpe))
            }
            None => {
                let default = |id: u32| Some(id).filter(|&id| (id as usize) < size);
                bos = bos.or(default(1));
                eos = eos.or(default(2));
                ends.extend(eos);
                let unknown = token_key(file, "unknown", size).or(default(0));
                let prefix = file.get_bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
                Engine::Spm(vocab, Spm::new(scores(file, size)?, prefix, unknown))
            }
        };
        let add_bos = add_bos(file);
        Ok(Tokenizer { engine, specials, ends, bos, eos, add_bos, chat_bos: add_bos })
    }

    /// The tokenizer of a `tokenizer.json`, with the begin and end tokens that a GGUF file names.
    ///
    /// # Errors
    /// A file that can't be read or is no `tokenizer.json`.
    pub fn from_json(path: &Path, file: &Gguf) -> Result<Tokenizer> {
        let mut tokenizer = Tokenizer::plain_json(path)?;
        let Engine::Json(json) = &tokenizer.engine else { return Ok(tokenizer) };
        let size = json.inner.get_vocab_size(true);
        let size =
            file.get_strings("tokenizer.ggml.tokens").map_or(size, |tokens| tokens.len().max(size));
        [tokenizer.bos, tokenizer.eos] = ["bos", "eos"].map(|key| token_key(file, key, size));
        tokenizer.ends =
            vocab::ends(file, size, |name| json.inner.token_to_id(name)).into_iter().collect();
        (tokenizer.add_bos, tokenizer.chat_bos) = (add_bos(file), add_bos(file));
        Ok(tokenizer)
    }

    /// The tokenizer of a `tokenizer.json`, with the tokens that only files beside it define. Its
    /// begin and end tokens are not set yet.
    pub(super) fn plain_json(path: &Path) -> Result<Tokenizer> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let more = added::beside(path)?;
        let (shown, path) = (path.display().to_string(), path.to_path_buf());
        let read = move || inner_and_later(&bytes, &more, &path);
        let (inner, later) = guarded(&shown, guard::TOKENIZER, read)??;
        let specials: Vec<Special> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, t)| t.special)
            .map(|(id, t)| Special {
                id,
                text: t.content,
                user: false,
                lstrip: t.lstrip,
                rstrip: t.rstrip,
            })
            .collect();
        let specials = Specials::new(specials);
        let hidden = specials.ids();
        let engine = Engine::Json(Box::new(Json { inner, later, hidden, fault: OnceLock::new() }));
        let ends = HashSet::new();
        Ok(Tokenizer {
            engine,
            specials,
            ends,
            bos: None,
            eos: None,
            add_bos: false,
            chat_bos: false,
        })
    }

    /// Sets the begin and end tokens. As in transformers, plain text begins with `bos` if the
    /// file's own post-processor adds it, and a chat begins with `bos` if the template writes it.
    pub(super) fn set_begin_and_ends(
        &mut self,
        bos: Option<u32>,
        eos: Option<u32>,
        ends: HashSet<u32>,
    ) {
        (self.bos, self.eos, self.ends) = (bos, eos, ends);
        if let Engine::Json(json) = &self.engine {
            let begin =
                json.inner.encode("a", true).ok().and_then(|e| e.get_ids().first().copied());
            self.add_bos = begin.is_some() && begin == bos;
        }
    }

    /// The id of the token with this spelling.
    pub(super) fn token_id(&self, text: &str) -> Option<u32> {
        match &self.engine {
            Engine::Bpe(vocab, _) | Engine::Spm(vocab, _) => vocab.id(text),
            Engine::Json(json) => json.inner.token_to_id(text),
        }
    }

    /// The token ids of a text. User-defined tokens are found in any text. Control tokens are found
    /// only with `parse_special`; without it their spelling is ordinary text.
    pub fn encode(&self, text: &str, parse_special: bool) -> Vec<u32> {
        self.encode_parts(self.specials.split(text, |_| parse_special))
    }

    /// The token ids of a rendered template. Control tokens are found only outside of `contents`,
    /// the byte ranges of the messages' own texts.
    pub fn encode_template(&self, text: &str, contents: &[Range<usize>]) -> Vec<u32> {
        self.encode_parts(self.specials.split(text, |at| {
            contents.iter().all(|c| c.is_empty() || c.end <= at.start || at.end <= c.start)
        }))
    }

    fn encode_parts(&self, parts: Vec<Part>) -> Vec<u32> {
        let mut out = Vec::new();
        for (i, part) in parts.into_iter().enumerate() {
            match (part, &self.engine) {
                (Part::Token(id), _) => out.push(id),
                (Part::Text(text), Engine::Bpe(vocab, bpe)) => bpe.encode(vocab, text, &mut out),
                (Part::Text(text), Engine::Spm(vocab, spm)) => spm.encode(vocab, text, &mut out),
                (Part::Text(text), Engine::Json(json)) => {
                    let inner = json.later.as_ref().filter(|_| i > 0).unwrap_or(&json.inner);
                    match inner.encode_fast(text, false) {
                        Ok(encoded) => out.extend(encoded.get_ids()),
                        Err(e) => drop(json.fault.set(e.to_string())),
                    }
                }
            }
        }
        out
    }

    /// Why a text had no tokens, where that has happened: the pre-tokenizer of a `tokenizer.json`
    /// gave up, or its model knows no token for what it doesn't know.
    pub fn fault(&self) -> Option<&str> {
        match &self.engine {
            Engine::Json(json) => json.fault.get().map(String::as_str),
            Engine::Bpe(..) | Engine::Spm(..) => None,
        }
    }

    /// The text of tokens; tokens of structure are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let vocab = match &self.engine {
            Engine::Bpe(vocab, _) | Engine::Spm(vocab, _) => vocab,
            Engine::Json(json) => {
                let shown: Vec<u32> =
                    ids.iter().copied().filter(|id| !json.hidden.contains(id)).collect();
                return json.inner.decode(&shown, false).unwrap_or_default();
            }
        };
        let mut out = Vec::new();
        // True where encoding would put a blank before the next token's text.
        let mut begins = true;
        for (text, kind) in ids.iter().filter_map(|&id| vocab.get(id)) {
            let from = out.len();
            let was_begin = std::mem::replace(&mut begins, false);
            match (kind, byte(text), &self.engine) {
                (Kind::Control, ..) => begins = true,
                (Kind::Unused, ..) => begins = was_begin,
                (Kind::User | Kind::Shown, ..) => {
                    out.extend_from_slice(text);
                    begins = true;
                }
                (Kind::Byte, Some(b), _) => out.push(b),
                (_, _, Engine::Bpe(_, bpe)) => bpe.decode(text, &mut out),
                (_, _, Engine::Spm(_, spm)) => {
                    spm.decode(text, &mut out);
                    if was_begin && spm.add_space_prefix && out.get(from) == Some(&b' ') {
                        out.remove(from);
                    }
                }
                (_, _, Engine::Json(..)) => {}
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    /// A token as the vocabulary spells it.
    pub fn token_text(&self, id: u32) -> String {
        match &self.engine {
            Engine::Bpe(vocab, _) | Engine::Spm(vocab, _) => vocab
                .get(id)
                .map(|(text, _)| String::from_utf8_lossy(text).into_owned())
                .unwrap_or_default(),
            Engine::Json(json) => json.inner.id_to_token(id).unwrap_or_default(),
        }
    }

    /// Whether the token ends an answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// The token that begins a text, if the checkpoint names one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, if the checkpoint names one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether `bos` goes before plain text.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether `bos` goes before a rendered chat that does not begin with it.
    pub fn chat_bos(&self) -> bool {
        self.chat_bos
    }
}

/// The tokenizer of a `tokenizer.json`, and that of the text after a special token where it is
/// another one.
fn inner_and_later(
    bytes: &[u8],
    more: &[added::Added],
    path: &Path,
) -> Result<(tokenizers::Tokenizer, Option<tokenizers::Tokenizer>)> {
    let wrong =
        |e: &dyn std::fmt::Display| Error::format(path, None, format!("not a tokenizer.json: {e}"));
    // First, because the library's own reader panics on some that isn't JSON.
    let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(|e| wrong(&e))?;
    let parse = |bytes: &[u8]| {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| wrong(&e))?;
        // How batches were padded and cut in training is no part of a chat: transformers sets
        // it call by call.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| wrong(&e))?;
        added::add(&mut inner, more, path)?;
        // Special tokens are found here, where it is known which text is the user's.
        inner.set_encode_special_tokens(true);
        Ok(inner)
    };
    let inner = parse(bytes)?;
    let later = if value.get_mut("pre_tokenizer").is_some_and(drop_first_blank) {
        Some(parse(value.to_string().as_bytes())?)
    } else {
        None
    };
    Ok((inner, later))
}

fn model(file: &Gguf) -> Option<&str> {
    file.get_str("tokenizer.ggml.model")
}

/// The name of the file's pre-tokenizer.
fn pre_name(file: &Gguf) -> Option<&str> {
    match model(file) {
        Some("gemma4") => Some("gemma4"),
        _ => file.get_str("tokenizer.ggml.pre"),
    }
}

fn known_pre(file: &Gguf) -> Result<&'static Pre> {
    let name = pre_name(file);
    name.and_then(pre::find).ok_or_else(|| {
        let found = match name {
            Some(name) => format!("tokenizer.ggml.pre is {name:?}"),
            None => "metadata key tokenizer.ggml.pre is missing".to_string(),
        };
        let what =
            format!("{}: {found}; supported: {}", file.path().display(), pre::names().join(", "));
        Error::unsupported(what, HINT)
    })
}

/// Whether texts begin with `bos`: the file's `tokenizer.ggml.add_bos_token`, else llama.cpp's
/// default for the tokenizer.
fn add_bos(file: &Gguf) -> bool {
    let pre = pre_name(file).and_then(pre::find);
    if pre.is_some_and(|p| p.spelling == Spelling::RawNewlines) {
        return true; // Gemma 4 files say false, wrongly.
    }
    let default = model(file) == Some("llama") || pre.is_some_and(|p| p.add_bos);
    file.get_bool("tokenizer.ggml.add_bos_token").unwrap_or(default)
}

/// The score of every token; zero for each in a file without scores.
fn scores(file: &Gguf, size: usize) -> Result<Vec<f32>> {
    let Some(value) = file.get("tokenizer.ggml.scores") else { return Ok(vec![0.0; size]) };
    let integers = || Some(value.to_i64s()?.into_iter().map(|x| x as f32).collect());
    value.to_f32s().or_else(integers).filter(|s: &Vec<f32>| s.len() >= size).ok_or_else(|| {
        Error::Model(format!(
            "{}: tokenizer.ggml.scores must hold {size} numbers, one for each token",
            file.path().display()
        ))
    })
}

/// The byte that a token such as `<0x0A>` stands for.
fn byte(text: &[u8]) -> Option<u8> {
    let digits = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Stops `Metaspace` pre-tokenizers from putting a blank before the start of a text. Returns
/// whether there was such a pre-tokenizer.
fn drop_first_blank(pre_tokenizer: &mut serde_json::Value) -> bool {
    if let Some(list) = pre_tokenizer.get_mut("pretokenizers").and_then(|l| l.as_array_mut()) {
        return list.iter_mut().filter_map(|p| drop_first_blank(p).then_some(())).count() > 0;
    }
    let found = pre_tokenizer["prepend_scheme"] == "first";
    if found {
        pre_tokenizer["prepend_scheme"] = "never".into();
    }
    found
}
