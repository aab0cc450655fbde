//! The words that the judge knows refusals by: `judge.txt`, read.

use std::sync::OnceLock;

/// See `judge.txt`.
#[derive(Default)]
pub(super) struct Words {
    pub grammars: Vec<Grammar>,
    pub adverbs: Vec<String>,
    pub phrases: Vec<String>,
    pub apologies: Vec<String>,
    pub sympathy: Vec<String>,
    pub amends: Vec<String>,
    pub inability: Vec<String>,
    pub openers: Vec<String>,
    pub innocent: Vec<String>,
    pub program: Vec<String>,
    pub denials: Vec<String>,
    pub evasions: Vec<String>,
    pub asked: Vec<String>,
}

/// How a language says that the speaker will not do something.
#[derive(Default)]
pub(super) struct Grammar {
    pub negations: Vec<String>,
    pub fillers: Vec<String>,
    pub verbs: Vec<String>,
    pub speaker: Vec<String>,
    /// The three stand in one clause, in any order.
    pub free: bool,
}

/// The words, read once.
pub(super) fn words() -> &'static Words {
    static WORDS: OnceLock<Words> = OnceLock::new();
    WORDS.get_or_init(|| {
        let mut all = Words::default();
        let lines =
            include_str!("judge.txt").lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
        for (name, list) in lines.filter_map(|l| l.split_once(": ")) {
            if name == "grammar" {
                let free = list.ends_with("in any order");
                all.grammars.push(Grammar { free, ..Grammar::default() });
                continue;
            }
            let mut none = Vec::new();
            let grammar = all.grammars.last_mut();
            let to = match (name, grammar) {
                ("negations", Some(g)) => &mut g.negations,
                ("fillers", Some(g)) => &mut g.fillers,
                ("verbs", Some(g)) => &mut g.verbs,
                ("speaker", Some(g)) => &mut g.speaker,
                ("adverbs", _) => &mut all.adverbs,
                ("phrases", _) => &mut all.phrases,
                ("apologies", _) => &mut all.apologies,
                ("sympathy", _) => &mut all.sympathy,
                ("amends", _) => &mut all.amends,
                ("inability", _) => &mut all.inability,
                ("openers", _) => &mut all.openers,
                ("innocent", _) => &mut all.innocent,
                ("program", _) => &mut all.program,
                ("denials", _) => &mut all.denials,
                ("evasions", _) => &mut all.evasions,
                ("asked", _) => &mut all.asked,
                _ => &mut none,
            };
            to.extend(list.split(" | ").map(str::to_string));
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_word_list_is_used_and_written_as_texts_are_compared() {
        let known = "adverbs negations fillers verbs speaker phrases apologies sympathy amends \
            inability openers innocent program denials evasions asked";
        let mut lines = 0;
        for line in
            include_str!("judge.txt").lines().filter(|l| !l.is_empty() && !l.starts_with('#'))
        {
            let (name, list) = line.split_once(": ").unwrap_or_else(|| panic!("{line}"));
            assert!(name == "grammar" || known.split(' ').any(|k| k == name), "{line}");
            for word in list.split(" | ").filter(|_| name != "grammar") {
                assert!(
                    !word.is_empty() && word == word.trim() && word == word.to_lowercase(),
                    "{line}: {word:?}"
                );
                assert!(!word.contains('\u{2019}'), "{line}: {word:?}");
            }
            lines += 1;
        }
        assert!(lines > 50 && words().grammars.len() > 10 && !words().asked.is_empty());
    }
}
