//! Targets that read texts and blocks: tokenizers, templates, prompts, encodings.

use super::*;

/// A `tokenizer.json`, and the `tokenizer_config.json` and `added_tokens.json` beside it.
pub mod tokenizer_json {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let dir = dir("tokenizer_json");
        let (own, rest) = cut(bytes);
        let (config, added) = cut(rest);
        for (name, bytes) in [("tokenizer_config.json", config), ("added_tokens.json", added)] {
            let path = dir.join(name);
            match bytes.is_empty() {
                true => drop(std::fs::remove_file(path)),
                false => file(&path, bytes, 0),
            }
        }
        file(&dir.join("tokenizer.json"), own, 0);
        file(&dir.join("config.json"), CONFIG.as_bytes(), 0);
        file(&dir.join("generation_config.json"), br#"{"eos_token_id": 1}"#, 0);
        file(&dir.join("model.safetensors"), &weights(&[], None), 0);
        let Ok(Checkpoint::Folder(folder)) = Checkpoint::open(&dir) else { return };
        let _ = folder_template(&folder);
        if let Ok(tokenizer) = Tokenizer::from_folder(&folder, None) {
            encode(&tokenizer);
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        Vec::new()
    }
}

thread_local! {
    /// A chat whose template is replaced again and again.
    static CHAT: RefCell<Option<Chat>> = const { RefCell::new(None) };
}

/// A chat template.
pub mod template {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let source = String::from_utf8_lossy(bytes);
        let Ok(template) = ChatTemplate::new(&source, "<s>", "</s>") else { return };
        let (all, one) = (messages(), [Message::new("user", "Hi")]);
        for (messages, thinking) in [(&all[..], Thinking::Off), (&one, Thinking::On)] {
            let _ = template.render(messages, true, thinking);
        }
        CHAT.with_borrow_mut(|chat| {
            let chat = chat.get_or_insert_with(|| {
                let file = Gguf::open(&root().join(WITH_TOKENIZER)).expect("a fixture");
                let tokenizer = Tokenizer::from_gguf(&file).expect("a fixture");
                let template = ChatTemplate::new("", "", "").expect("a template");
                Chat { tokenizer, template, system: None }
            });
            chat.template = template;
            for prompt in [chat.prompt("Hi <s>"), chat.conversation(&all)].into_iter().flatten() {
                assert!(!prompt.post_instruction.is_empty());
                assert!(prompt.post_instruction.end <= prompt.tokens.len());
            }
        });
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        Vec::new()
    }
}

/// A byte that says which encoding, and blocks of it.
pub mod encoding {
    use super::*;

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    pub fn run(bytes: &[u8]) {
        let [first, rest @ ..] = bytes else { return };
        let e = Encoding::ALL[usize::from(*first) % Encoding::ALL.len()];
        let blocks = (rest.len() / e.block_bytes()).min(8);
        let (bytes, n) = (&rest[..blocks * e.block_bytes()], blocks * e.block_len());
        let mut decoded = vec![0.0; n];
        e.decode(bytes, &mut decoded);
        if !e.has_codes() {
            return;
        }
        let (mut codes, mut params) = (vec![0; n], vec![Params::default(); n]);
        e.unpack(bytes, &mut codes, &mut params);
        for ((&code, &p), &x) in codes.iter().zip(&params).zip(&decoded) {
            assert!(same(e.value(p, code), x), "{}: {p:?} {code}: {x}", e.name());
        }
        let mut again = bytes.to_vec();
        e.pack(&mut again, &codes);
        assert_eq!(again, bytes, "{}", e.name());
        let (low, high) = e.code_range();
        for by in [1, -1] {
            let moved: Vec<i32> =
                codes.iter().map(|c| c.saturating_add(by).clamp(low, high)).collect();
            e.pack(&mut again, &moved);
            let (mut found, mut unmoved) = (vec![0; n], vec![Params::default(); n]);
            e.unpack(&again, &mut found, &mut unmoved);
            assert_eq!(found, moved, "{}", e.name());
            let bits = |p: &Params| (p.scale.to_bits(), p.offset.to_bits());
            assert!(params.iter().map(bits).eq(unmoved.iter().map(bits)), "{}", e.name());
            e.decode(&again, &mut decoded);
            for ((&code, &p), &x) in moved.iter().zip(&params).zip(&decoded) {
                assert!(same(e.value(p, code), x), "{}: {p:?} {code}: {x}", e.name());
            }
        }
        for (&p, &x) in params.iter().zip(&decoded) {
            for x in [x, -x, 0.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE] {
                assert!((low..=high).contains(&e.nearest(p, x)), "{}: {p:?} {x}", e.name());
            }
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let of = |(i, e): (usize, &Encoding)| {
            let name = format!("fixtures/codecs/{}.bin", e.name());
            let bytes = std::fs::read(root().join(name)).ok()?;
            let most = bytes.len().min(2 * e.block_bytes());
            Some([&[i as u8][..], &bytes[..most]].concat())
        };
        Encoding::ALL.iter().enumerate().filter_map(of).collect()
    }
}

/// A byte that says which ending, and a file of prompts.
pub mod prompts {
    use super::*;

    const ENDINGS: [&str; 7] = ["txt", "json", "jsonl", "ndjson", "csv", "tsv", "none"];

    pub fn run(bytes: &[u8]) {
        let [first, rest @ ..] = bytes else { return };
        let ending = ENDINGS[usize::from(*first) % ENDINGS.len()];
        let path = dir("prompts").join(format!("in.{ending}"));
        file(&path, rest, 0);
        if let Ok(read) = read_prompts(&path, Set::Harmful) {
            assert!(!read.prompts.is_empty());
            assert!(read.prompts.iter().all(|p| !p.prompt.trim().is_empty()));
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let of = |ending: u8, text: &str| [&[ending], text.as_bytes()].concat();
        vec![
            of(0, "\u{feff}one\n two \r\n\nthree"),
            of(1, r#"["a", {"prompt": "b", "id": 1, "category": "x", "split": "test"}]"#),
            of(2, "\"a\"\n{\"prompt\": \"b\", \"split\": \"train\"}\n{\"goal\": \"c\"}\n"),
            of(3, "{\"Behavior\": \"b\", \"ContextString\": \"c\"}"),
            of(4, "id,prompt,category\r\n1,\"a, \"\"b\"\"\nc\",x\r\n2,d,\r\n"),
            of(4, "prompt\na, b\n\"c\"\n"),
            of(5, "prompt\tsplit\na\ttest\n\"b\tc\"\t\n"),
        ]
    }
}
