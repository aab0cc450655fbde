//! The tokenizer, from GGUF metadata alone.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

/// Text to token ids and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    tokens: Vec<String>,
    special: HashMap<String, u32>,
    ends: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    pub fn from_gguf(file: &Gguf) -> Result<Tokenizer> {
        let path = file.path().display().to_string();
        let missing = |key: &str| {
            Error::Model(format!("{path}: metadata key {key} is missing; the file has no tokenizer"))
        };
        let list = |key: &str| file.get_strings(key).ok_or_else(|| missing(key));
        let tokens: Vec<String> =
            list("tokenizer.ggml.tokens")?.iter().map(|t| String::from_utf8_lossy(t).into_owned()).collect();
        let pre = file.get_str("tokenizer.ggml.pre").unwrap_or("");
        let regex = match pre {
            "llama-bpe" | "llama3" => LLAMA3,
            "qwen2" => QWEN2,
            "gpt-2" => GPT2,
            _ => {
                return Err(Error::unsupported(
                    format!("{path}: pre-tokenizer {pre:?}"),
                    "use --tokenizer tokenizer.json",
                ))
            }
        };
        let merges: Vec<(String, String)> = list("tokenizer.ggml.merges")?
            .iter()
            .filter_map(|m| {
                String::from_utf8_lossy(m).split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()))
            })
            .collect();
        let vocab =
            tokens.iter().enumerate().map(|(i, t)| (t.clone(), i as u32)).collect::<ahash::AHashMap<_, _>>();
        let wrong = |e: tokenizers::Error| Error::Model(format!("{path}: the tokenizer can't be built: {e}"));
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(regex == LLAMA3)
            .build()
            .map_err(wrong)?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        let split = Split::new(SplitPattern::Regex(regex.into()), SplitDelimiterBehavior::Isolated, false)
            .map_err(wrong)?;
        inner.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![
            split.into(),
            ByteLevel::new(false, false, false).into(),
        ]))));
        inner.with_decoder(Some(ByteLevelDecoder::default()));
        let types = file.get("tokenizer.ggml.token_type").and_then(|v| v.to_i64s()).unwrap_or_default();
        // Control and user-defined tokens.
        let special = tokens
            .iter()
            .enumerate()
            .filter(|(i, t)| matches!(types.get(*i), Some(3 | 4)) && !t.is_empty())
            .map(|(i, t)| (t.clone(), i as u32))
            .collect();
        Ok(Tokenizer::finish(inner, tokens, special, file))
    }

    /// The tokenizer of a `tokenizer.json`, with the end and begin tokens that the checkpoint names.
    ///
    /// # Errors
    /// A file that can't be read, or one with fewer or more tokens than the model.
    pub fn from_json(path: &Path, file: &Gguf) -> Result<Tokenizer> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::format(path, None, format!("not a tokenizer.json: {e}")))?;
        let size = inner.get_vocab_size(true) as u32;
        let tokens = (0..size).map(|i| inner.id_to_token(i).unwrap_or_default()).collect();
        let special = inner.get_added_tokens_decoder().into_iter().map(|(id, t)| (t.content, id)).collect();
        Ok(Tokenizer::finish(inner, tokens, special, file))
    }

    fn finish(
        inner: tokenizers::Tokenizer,
        tokens: Vec<String>,
        special: HashMap<String, u32>,
        file: &Gguf,
    ) -> Tokenizer {
        let id = |k: &str| file.get_u32(&format!("tokenizer.ggml.{k}_token_id"));
        let ends = ["eos", "eot", "eom"].iter().filter_map(|k| id(k)).collect();
        let add_bos = file.get_bool("tokenizer.ggml.add_bos_token").unwrap_or(false);
        Tokenizer { inner, tokens, special, ends, bos: id("bos"), eos: id("eos"), add_bos }
    }

    /// Token ids of a text.
    pub fn encode(&self, text: &str, parse_special: bool) -> Vec<u32> {
        if parse_special {
            self.encode_template(text, &[])
        } else {
            self.plain(text)
        }
    }

    /// Token ids of a rendered template: special tokens are parsed outside of `contents`.
    pub fn encode_template(&self, text: &str, contents: &[Range<usize>]) -> Vec<u32> {
        let mut out = Vec::new();
        let mut start = 0;
        let mut at = 0;
        while at < text.len() {
            let inside = contents.iter().any(|c| c.contains(&at));
            let hit = if inside {
                None
            } else {
                self.special
                    .iter()
                    .filter(|(s, _)| text[at..].starts_with(s.as_str()))
                    .max_by_key(|(s, _)| s.len())
            };
            if let Some((s, &id)) = hit {
                out.extend(self.plain(&text[start..at]));
                out.push(id);
                at += s.len();
                start = at;
            } else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
            }
        }
        out.extend(self.plain(&text[start..]));
        out
    }

    fn plain(&self, text: &str) -> Vec<u32> {
        if text.is_empty() {
            return Vec::new();
        }
        self.inner.encode_fast(text, false).map(|e| e.get_ids().to_vec()).unwrap_or_default()
    }

    /// The text of tokens; special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let plain: Vec<u32> =
            ids.iter().copied().filter(|&i| !self.special.values().any(|&s| s == i)).collect();
        self.inner.decode(&plain, false).unwrap_or_default()
    }

    /// A token as the vocabulary spells it.
    pub fn token_text(&self, id: u32) -> String {
        self.tokens.get(id as usize).cloned().unwrap_or_default()
    }

    /// Whether a token ends an answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// The token that begins every text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether `bos` is put in front of plain text.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }
}
