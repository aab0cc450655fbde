//! The vocabulary of a GGUF file: the spelling and the kind of each token.

use ahash::AHashMap;

use super::special::Special;
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

/// The kind of a token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Kind {
    /// Ordinary text.
    Text,
    /// One byte, spelled `<0x0A>`.
    Byte,
    /// User-defined: found in any text before the rest of the text is encoded.
    User,
    /// Control: found in templates only, and left out of decoded text.
    Control,
    /// As a control token, but shown in decoded text.
    Shown,
    /// Unused: the model never produces the token, and decoding leaves it out.
    Unused,
}

/// Spellings of tokens that end an answer. llama.cpp makes them control tokens, since files often
/// give them a wrong type.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[e~[",
];
/// Spellings of tokens that end a fill-in-the-middle answer, by the metadata key that may name the
/// token.
const FILL_ENDS: &[(&str, &[&str])] = &[
    ("fim_pad", &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    ("fim_rep", &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    ("fim_sep", &["<|file_sep|>"]),
];
/// Spellings of the other fill-in-the-middle tokens, control tokens as well.
const FILL: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<\u{ff5c}fim\u{2581}begin\u{ff5c}>",
    "<PRE>",
    "\u{2581}<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<\u{ff5c}fim\u{2581}hole\u{ff5c}>",
    "<SUF>",
    "\u{2581}<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<\u{ff5c}fim\u{2581}end\u{ff5c}>",
    "<MID>",
    "\u{2581}<MID>",
    "<|code_middle|>",
    "<|middle|>",
];
/// Tokens of gpt-oss's channels, which llama.cpp shows.
const SHOWN: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// The vocabulary.
pub(super) struct Vocab {
    texts: Vec<Vec<u8>>,
    kinds: Vec<Kind>,
    /// Ids of the tokens that encoded text may contain, by spelling. If two tokens share a
    /// spelling, the later one counts, as in llama.cpp.
    ids: AHashMap<Vec<u8>, u32>,
    /// The token of each byte.
    bytes: Vec<Option<u32>>,
    /// Tokens that end an answer.
    pub ends: Vec<u32>,
}

impl Vocab {
    /// Reads the vocabulary of a file.
    ///
    /// # Errors
    /// `Model`: the metadata lack the tokens, or hold fewer token types than tokens.
    pub fn read(file: &Gguf) -> Result<Vocab> {
        let mut texts = strings(file, "tokenizer.ggml.tokens")?.to_vec();
        for (i, t) in texts.iter_mut().enumerate().filter(|(_, t)| t.is_empty()) {
            *t = format!("[EMPTY_{i}]").into_bytes();
        }
        let types = match file.get("tokenizer.ggml.token_type") {
            Some(value) => value.to_i64s().filter(|t| t.len() >= texts.len()).ok_or_else(|| {
                Error::Model(format!(
                    "{}: tokenizer.ggml.token_type must hold {} integers, one for each token",
                    file.path().display(),
                    texts.len()
                ))
            })?,
            None => vec![1; texts.len()],
        };
        let mut kinds: Vec<Kind> = types[..texts.len()]
            .iter()
            .map(|t| match t {
                2 | 3 => Kind::Control,
                4 => Kind::User,
                5 => Kind::Unused,
                6 => Kind::Byte,
                _ => Kind::Text,
            })
            .collect();
        let all: AHashMap<&[u8], u32> =
            texts.iter().zip(0..).map(|(t, i)| (t.as_slice(), i)).collect();
        let find = |name: &str| all.get(name.as_bytes()).copied();
        let ends = ends(file, texts.len(), find);
        let by_spelling = ENDS.iter().chain(FILL_ENDS.iter().flat_map(|f| f.1)).chain(FILL);
        for id in by_spelling.filter_map(|name| find(name)) {
            kinds[id as usize] = Kind::Control;
        }
        for id in SHOWN.iter().filter_map(|name| find(name)) {
            kinds[id as usize] = Kind::Shown;
        }
        if let Some(id) = find("<|end|>").filter(|id| !ends.contains(id)) {
            kinds[id as usize] = Kind::Shown;
        }
        if let Some(id) = find("</s>").filter(|id| !ends.contains(id)) {
            kinds[id as usize] = Kind::Text;
        }
        let bytes = (0..=255u8)
            .map(|b| find(&format!("<0x{b:02X}>")).or(all.get(&[b][..]).copied()))
            .collect();
        let ids = all
            .into_iter()
            .filter(|&(_, i)| {
                matches!(kinds[i as usize], Kind::Text | Kind::Byte | Kind::User | Kind::Unused)
            })
            .map(|(t, i)| (t.to_vec(), i))
            .collect();
        Ok(Vocab { texts, kinds, ids, bytes, ends })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// The token with this spelling, if encoded text may contain it.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text.as_bytes()).copied()
    }

    /// The token of a byte.
    pub fn byte(&self, b: u8) -> Option<u32> {
        self.bytes[b as usize]
    }

    /// The spelling and the kind of a token.
    pub fn get(&self, id: u32) -> Option<(&[u8], Kind)> {
        Some((self.texts.get(id as usize)?, self.kinds[id as usize]))
    }

    /// The special tokens: user-defined, control and shown ones.
    pub fn specials(&self, file: &Gguf) -> Vec<Special> {
        // llama.cpp's rule for Phi-3, whose special tokens also remove the blanks after them.
        let name = file.get_str("general.name").unwrap_or_default().to_lowercase();
        let phi3 = name.contains("phi-3") || name.contains("phi3");
        let special = |(i, text): (u32, &Vec<u8>)| {
            let kind = self.kinds[i as usize];
            matches!(kind, Kind::User | Kind::Control | Kind::Shown).then(|| {
                let text = String::from_utf8(text.clone()).ok()?;
                let rstrip = phi3 && !["<unk>", "<s>", "<|endoftext|>"].contains(&text.as_str());
                Some(Special { id: i, user: kind == Kind::User, lstrip: false, rstrip, text })
            })?
        };
        (0..).zip(&self.texts).filter_map(special).collect()
    }
}

/// An array of strings that the tokenizer needs.
///
/// # Errors
/// `Model` if the metadata lack the key.
pub(super) fn strings<'f>(file: &'f Gguf, key: &str) -> Result<&'f [Vec<u8>]> {
    file.get_strings(key).ok_or_else(|| {
        Error::Model(format!(
            "{}: metadata key {key} is missing; the file has no whole tokenizer, \
             use `tokenizer` tokenizer.json",
            file.path().display()
        ))
    })
}

/// The tokens that end an answer, by llama.cpp's rules: those that the metadata name, and those
/// with a known spelling.
pub(super) fn ends(file: &Gguf, size: usize, find: impl Fn(&str) -> Option<u32>) -> Vec<u32> {
    let named = |key: &str| token_key(file, key, size);
    let mut ends: Vec<u32> = ["eos", "eot", "eom"].into_iter().filter_map(named).collect();
    ends.extend(ENDS.iter().filter_map(|name| find(name)));
    for (key, names) in FILL_ENDS {
        ends.extend(named(key).or_else(|| names.iter().find_map(|name| find(name))));
    }
    let has = |name: &str| find(name).is_some_and(|id| ends.contains(&id));
    let calls = has("<|call|>") || has("<|calls|>");
    let drop_end = calls && (has("<|return|>") || has("<|flush|>"));
    // If the vocabulary has certain other end tokens, these two end no answer.
    let dropped = [
        find("<|end|>").filter(|_| drop_end),
        find("</s>").filter(|_| has("<|tool_response>") || has("<|plamo:eos|>")),
    ];
    ends.retain(|id| !dropped.contains(&Some(*id)));
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// The token that a metadata key names; `None` if its id is outside of the vocabulary.
pub(super) fn token_key(file: &Gguf, key: &str, size: usize) -> Option<u32> {
    file.get_u32(&format!("tokenizer.ggml.{key}_token_id")).filter(|&id| (id as usize) < size)
}
