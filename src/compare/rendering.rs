//! Whether two models read the same prompts: a changed chat template alone moves refusal by tens of
//! points, and so do tokens that are missing, such as the one that begins a text.

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::checkpoint::hex;
use crate::error::Result;
use crate::pair::Pair;
use crate::text::{Chat, PromptSet};

/// Characters that are shown of a text around the place where it differs.
const SHOWN: usize = 40;

/// Every prompt as a model reads it.
#[derive(Clone, Debug, Default)]
pub struct Rendered {
    prompts: Vec<One>,
}

#[derive(Clone, Debug)]
struct One {
    id: String,
    text: String,
    tokens: Vec<u32>,
}

impl Rendered {
    /// Renders all prompts of a set.
    ///
    /// # Errors
    /// What the template says.
    pub fn take(chat: &Chat, prompts: &PromptSet) -> Result<Rendered> {
        let one = |p: &crate::text::PromptRecord| -> Result<One> {
            let rendered = chat.prompt(&p.prompt)?;
            Ok(One { id: p.id.clone(), text: rendered.text, tokens: rendered.tokens })
        };
        Ok(Rendered { prompts: prompts.prompts.iter().map(one).collect::<Result<_>>()? })
    }

    /// sha256 of all texts, and of all token ids.
    fn sha256(&self) -> Hashes {
        let (mut texts, mut tokens) = (Sha256::new(), Sha256::new());
        for p in &self.prompts {
            texts.update((p.text.len() as u64).to_le_bytes());
            texts.update(&p.text);
            tokens.update((p.tokens.len() as u64).to_le_bytes());
            p.tokens.iter().for_each(|t| tokens.update(t.to_le_bytes()));
        }
        Hashes { texts: hex(&texts.finalize()), tokens: hex(&tokens.finalize()) }
    }
}

/// How the prompts of two models differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rendering {
    /// Prompts.
    pub prompts: usize,
    /// Prompts whose rendered texts differ.
    pub texts_differ: usize,
    /// Prompts whose token ids differ.
    pub tokens_differ: usize,
    /// sha256 of what the original and the compressed model read.
    pub sha256: Pair<Hashes>,
    /// The first prompt that differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<Difference>,
}

/// sha256 of all prompts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hashes {
    /// Of the rendered texts.
    pub texts: String,
    /// Of the token ids.
    pub tokens: String,
}

/// Where a prompt differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The prompt's id.
    pub id: String,
    /// The text, or the tokens, from the place where the two differ: of the original, and of the
    /// compressed model.
    pub shown: Pair<String>,
}

impl Rendering {
    /// Compares what an original and its compressed version read of the same prompts.
    pub fn of(original: &Rendered, compressed: &Rendered) -> Rendering {
        let pairs = || original.prompts.iter().zip(&compressed.prompts);
        let text = pairs().find(|(x, y)| x.text != y.text).map(|(x, y)| {
            let same = x.text.chars().zip(y.text.chars()).take_while(|(a, b)| a == b).count();
            let from = same.saturating_sub(SHOWN / 4);
            let shown = |t: &str| t.chars().skip(from).take(SHOWN).collect::<String>();
            (x, shown(&x.text), shown(&y.text))
        });
        let tokens = || {
            pairs().find(|(x, y)| x.tokens != y.tokens).map(|(x, y)| {
                let same = x.tokens.iter().zip(&y.tokens).take_while(|(a, b)| a == b).count();
                let shown =
                    |t: &[u32]| format!("{:?}", t.iter().skip(same).take(8).collect::<Vec<_>>());
                (x, shown(&x.tokens), shown(&y.tokens))
            })
        };
        let first = text.or_else(tokens).map(|(one, before, after)| Difference {
            id: one.id.clone(),
            shown: Pair { before, after },
        });
        Rendering {
            prompts: original.prompts.len(),
            texts_differ: pairs().filter(|(x, y)| x.text != y.text).count(),
            tokens_differ: pairs().filter(|(x, y)| x.tokens != y.tokens).count(),
            sha256: Pair::new(original.sha256(), compressed.sha256()),
            first,
        }
    }

    /// What the user must know before the numbers; none where both models read the same.
    pub fn warning(&self) -> Option<String> {
        let Difference { id, shown: Pair { before: original, after: compressed } } =
            self.first.as_ref()?;
        let (n, all) = (self.texts_differ, self.prompts);
        Some(match n {
            0 => format!(
                "THE TWO MODELS READ DIFFERENT TOKENS: the texts of all {all} prompts are equal, \
                 the tokens of {} are not; prompt {id} goes on with {original} and with \
                 {compressed}. What follows compares two tokenizers as well; give both one with \
                 `tokenizer`",
                self.tokens_differ
            ),
            _ => format!(
                "THE TWO MODELS READ DIFFERENT PROMPTS: their chat templates render {n} of {all} \
                 prompts differently; prompt {id} has {original:?} in the original and \
                 {compressed:?} in the compressed model. What follows compares two templates as \
                 well, which alone can move refusal by tens of points; give both one with \
                 `chat_template`"
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(all: &[(&str, &[u32])]) -> Rendered {
        let one = |(i, (text, tokens)): (usize, &(&str, &[u32]))| One {
            id: format!("p{i}"),
            text: text.to_string(),
            tokens: tokens.to_vec(),
        };
        Rendered { prompts: all.iter().enumerate().map(one).collect() }
    }

    #[test]
    fn a_changed_template_is_named_with_the_place_where_it_differs() {
        let a = rendered(&[("<user>é a<end>", &[1, 2]), ("<user>b<end>", &[1, 3])]);
        let b = rendered(&[("<user>é a<end>", &[1, 2]), ("<user> b<stop>", &[1, 4])]);
        let r = Rendering::of(&a, &b);
        assert_eq!((r.prompts, r.texts_differ, r.tokens_differ), (2, 1, 1));
        let first = r.first.as_ref().unwrap();
        assert_eq!(first.id, "p1");
        assert_eq!(
            (first.shown.before.as_str(), first.shown.after.as_str()),
            ("<user>b<end>", "<user> b<stop>")
        );
        let warning = r.warning().unwrap();
        assert!(warning.contains("DIFFERENT PROMPTS") && warning.contains("1 of 2"), "{warning}");
        assert_ne!(r.sha256.before.texts, r.sha256.after.texts);
    }

    #[test]
    fn other_tokens_of_the_same_text_are_a_difference_too() {
        let a = rendered(&[("a", &[7, 1, 2])]);
        let r = Rendering::of(&a, &rendered(&[("a", &[1, 2])]));
        assert_eq!((r.texts_differ, r.tokens_differ), (0, 1));
        assert_eq!(r.sha256.before.texts, r.sha256.after.texts);
        assert_ne!(r.sha256.before.tokens, r.sha256.after.tokens);
        let warning = r.warning().unwrap();
        assert!(warning.contains("DIFFERENT TOKENS") && warning.contains("[7, 1, 2]"), "{warning}");
        let same = Rendering::of(&a, &a);
        assert_eq!((same.warning(), same.first), (None, None));
    }
}
