//! Pre-tokenizers: how text is split into words before byte-pair merging. `tokenizer.ggml.pre`
//! names one, and each distinct behaviour is one row of a table.
//!
//! The rows give the same tokens as llama.cpp (src/llama-vocab.cpp), since llama.cpp runs these
//! files. llama.cpp matches against text in which each non-ASCII character is replaced by a mark of
//! its Unicode category. The expressions here match the same characters in the text itself.

/// One pass, which splits every piece that the earlier passes left.
#[derive(Clone, Copy)]
pub(super) enum Pass {
    /// Each match, and each text between two matches, becomes a piece.
    Regex(&'static str),
    /// A run of digits is split into threes, counted from the end of the run. The first piece also
    /// holds the text before the run.
    Thousands,
}

/// The behaviour that one or more names of pre-tokenizers stand for.
pub(super) struct Pre {
    names: &'static [&'static str],
    pub passes: &'static [Pass],
    /// A word that is a token becomes that token, even if the merges give other tokens.
    pub ignore_merges: bool,
    /// Whether texts begin with `bos`, if the file doesn't say.
    pub add_bos: bool,
    /// How the vocabulary spells words.
    pub spelling: Spelling,
}

/// How a vocabulary spells text.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Spelling {
    /// One printable character for each byte, as in GPT-2.
    Bytes,
    /// The text itself, with U+2581 for a blank. Characters without a token are spelled as bytes,
    /// such as `<0x0A>`.
    Raw,
    /// As `Raw`, and a run of newlines that is a token becomes that token.
    RawNewlines,
}

macro_rules! contraction {
    () => {
        "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    };
}
macro_rules! blanks {
    () => {
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    };
}
/// Letters, after at most one character that is neither a line break, a letter nor a number.
macro_rules! words {
    () => {
        r"[^\r\n\p{L}\p{N}]?\p{L}+"
    };
}
macro_rules! symbols {
    () => {
        r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    };
}
/// As `words`, but a word also ends where an ASCII capital follows an ASCII small letter.
macro_rules! cased {
    ($after:expr) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+",
            $after,
            r"|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*",
            $after
        )
    };
}
macro_rules! maybe_contraction {
    () => {
        concat!("(?:", contraction!(), ")?")
    };
}
macro_rules! marked_words {
    () => {
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##
    };
}
macro_rules! han {
    () => {
        concat!(
            r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}",
            r"\x{2A700}-\x{2EBEF}\x{2F800}-\x{2FA1F}"
        )
    };
}

const ONE_NUMBER: Pass = Pass::Regex(r"\p{N}");
const THREE_NUMBERS: Pass = Pass::Regex(r"\p{N}{1,3}");
const LINES: Pass = Pass::Regex(r"[^\n]+|\n+");
const GPT2: Pass =
    Pass::Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+");
const LLAMA3: Pass = Pass::Regex(concat!(
    contraction!(),
    "|",
    words!(),
    r"|\p{N}{1,3}|",
    symbols!(),
    "|",
    blanks!()
));
const QWEN2: Pass =
    Pass::Regex(concat!(contraction!(), "|", words!(), r"|\p{N}|", symbols!(), "|", blanks!()));
const BLOOM: Pass =
    Pass::Regex(r" ?[^(\s|.,!?\x{60C}\x{6D4}\x{964}\x{2026}\x{3001}\x{3002}\x{FF0C})]+");
const CHINESE_JAPANESE: Pass = Pass::Regex(r"[\x{3040}-\x{30FF}\x{4E00}-\x{9FA5}]+");
const DEEPSEEK3: &[Pass] = &[
    THREE_NUMBERS,
    CHINESE_JAPANESE,
    Pass::Regex(concat!(marked_words!(), r"| ?[\p{P}\p{S}]+[\r\n]*|", blanks!())),
];
const SPARK: &[Pass] = &[
    THREE_NUMBERS,
    CHINESE_JAPANESE,
    Pass::Regex(concat!(marked_words!(), r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+")),
    ONE_NUMBER,
];
/// Letters of scripts with capitals and small letters, after at most one blank.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}",
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}",
    r"\x{38C}",
    r"\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}",
    r"\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}",
    r"\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}",
    r"\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}",
    r"\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}",
    r"\x{1FD6}-\x{1FDB}",
    r"\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}",
    r"\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}",
    r"\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}",
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}",
    r"\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}",
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}",
    r"\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+",
);
/// llama.cpp first turns non-ASCII blanks into an ASCII blank, so its ranges never match them.
/// The intersection with `[^\s]` has the same effect.
const DEEPSEEK_IDEOGRAPHS: Pass = Pass::Regex(r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}&&[^\s]]+");

const BYTES: Pre = Pre {
    names: &[],
    passes: &[],
    ignore_merges: false,
    add_bos: false,
    spelling: Spelling::Bytes,
};

const TABLE: &[Pre] = &[
    Pre {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        passes: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
        ..BYTES
    },
    Pre { names: &["glm4", "glm5"], passes: &[LLAMA3], ignore_merges: true, ..BYTES },
    Pre { names: &["dbrx", "smaug-bpe", "chatglm-bpe"], passes: &[LLAMA3], ..BYTES },
    Pre {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
            "bailingmoe",
            "bailingmoe2",
            "llada-moe",
        ],
        passes: &[QWEN2],
        ..BYTES
    },
    Pre {
        names: &["qwen35"],
        passes: &[Pass::Regex(concat!(
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|",
            blanks!()
        ))],
        ..BYTES
    },
    Pre {
        names: &[
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        passes: &[GPT2],
        ..BYTES
    },
    Pre {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        passes: &[ONE_NUMBER, GPT2],
        ..BYTES
    },
    Pre {
        names: &["tekken"],
        passes: &[Pass::Regex(concat!(
            cased!(""),
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
            blanks!()
        ))],
        ignore_merges: true,
        add_bos: true,
        ..BYTES
    },
    Pre {
        names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        passes: &[Pass::Regex(concat!(
            cased!(maybe_contraction!()),
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
            blanks!()
        ))],
        ..BYTES
    },
    Pre {
        names: &["kimi-k2"],
        passes: &[Pass::Regex(concat!(
            "[",
            han!(),
            r"]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^",
            han!(),
            "]]+",
            maybe_contraction!(),
            r"|\p{N}{1,3}|",
            symbols!(),
            "|",
            blanks!()
        ))],
        ..BYTES
    },
    Pre {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        passes: DEEPSEEK3,
        ..BYTES
    },
    Pre { names: &["spark2_5"], passes: SPARK, ..BYTES },
    Pre {
        names: &["deepseek-llm"],
        passes: &[
            Pass::Regex(r"[\r\n]"),
            Pass::Regex(DEEPSEEK_LETTERS),
            Pass::Regex(
                r"\s?[!-/:-~\x{2018}-\x{201F}\x{3001}\x{3002}\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}]+",
            ),
            Pass::Regex(r"\s+$"),
            DEEPSEEK_IDEOGRAPHS,
            Pass::Regex(r"\p{N}+"),
        ],
        ..BYTES
    },
    Pre {
        names: &["deepseek-coder"],
        passes: &[
            Pass::Regex(r"[\r\n]"),
            Pass::Regex(r"\s?\p{L}+"),
            Pass::Regex(r"\s?\p{P}+"),
            DEEPSEEK_IDEOGRAPHS,
            ONE_NUMBER,
        ],
        ..BYTES
    },
    Pre {
        names: &["youtu"],
        passes: &[
            Pass::Regex(concat!(
                r"[\x{3131}-\x{318E}\x{AC00}-\x{D7A3}]+",
                r"|[\x{2014}\x{2018}\x{2019}\x{201C}\x{201D}\x{2026}\x{3001}-\x{303F}",
                r"\x{FE30}-\x{FE4F}\x{FF01}\x{FF0C}\x{FF1A}\x{FF1B}]+",
                r"|[\x{3105}-\x{312F}]+|[\x{3040}-\x{30FF}\x{4E00}-\x{9FA5}]+"
            )),
            Pass::Regex(concat!(
                r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                maybe_contraction!(),
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
                blanks!()
            )),
        ],
        ignore_merges: true,
        ..BYTES
    },
    Pre {
        names: &["tiny_aya", "cohere2moe"],
        passes: &[
            Pass::Thousands,
            Pass::Regex(concat!(
                r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                maybe_contraction!(),
                r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
                blanks!()
            )),
        ],
        ..BYTES
    },
    Pre {
        names: &["afmoe"],
        passes: &[
            Pass::Thousands,
            Pass::Regex(concat!(
                r"[\x{E40}-\x{EFF}\x{1000}-\x{109F}\x{1100}-\x{11FF}\x{1780}-\x{17FF}",
                r"\x{2F00}-\x{2FDF}\x{3040}-\x{30FF}",
                r"\x{3400}-\x{4DBF}\x{4E00}-\x{FAFF}\x{FF65}-\x{FF9F}]+"
            )),
            Pass::Regex(concat!(marked_words!(), r"| ?[\p{P}\p{S}]+[\r\n]*|", blanks!())),
        ],
        ..BYTES
    },
    Pre { names: &["laguna"], passes: &[LINES, QWEN2], ..BYTES },
    Pre {
        names: &["minicpm5"],
        passes: &[
            THREE_NUMBERS,
            Pass::Regex(concat!(
                contraction!(),
                "|",
                words!(),
                r"|\p{N}+|",
                symbols!(),
                "|",
                blanks!()
            )),
        ],
        ignore_merges: true,
        ..BYTES
    },
    Pre {
        names: &["exaone-moe"],
        passes: &[Pass::Regex(concat!(
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?",
            r"|\s*[\r\n]|\s+(?!\S)|\s+"
        ))],
        ..BYTES
    },
    Pre {
        names: &["seed-coder"],
        passes: &[Pass::Regex(concat!(
            contraction!(),
            "|",
            words!(),
            r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|",
            blanks!()
        ))],
        ..BYTES
    },
    Pre {
        names: &["ufakzeka"],
        passes: &[Pass::Regex(concat!(words!(), r"|\p{N}|", symbols!(), "|", blanks!()))],
        ..BYTES
    },
    Pre {
        names: &["jais-2"],
        passes: &[Pass::Regex(concat!(
            contraction!(),
            "|",
            words!(),
            r"|\p{N}{1,3}|",
            symbols!(),
            r"|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)",
            r"|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s"
        ))],
        ..BYTES
    },
    Pre {
        names: &["falcon"],
        passes: &[Pass::Regex(r"[\p{P}\$\+<=>\^~\|`]+"), GPT2, Pass::Regex("[0-9][0-9][0-9]")],
        ..BYTES
    },
    Pre { names: &["bloom", "poro-chat", "gpt3-finnish"], passes: &[BLOOM], ..BYTES },
    Pre { names: &["viking"], passes: &[BLOOM, ONE_NUMBER], ..BYTES },
    Pre {
        names: &["chameleon"],
        passes: &[
            Pass::Regex("<sentinel:[0-9]+>"),
            Pass::Regex("IMGIMG[A-I]{1,4}Z"),
            Pass::Regex(r"[\t\n]|    |  "),
            ONE_NUMBER,
            Pass::Regex(r"[\p{P}!-/:-@\[-`{-~]"),
            GPT2,
        ],
        add_bos: true,
        ..BYTES
    },
    Pre {
        names: &["superbpe"],
        passes: &[Pass::Regex(r"\p{N}+"), Pass::Regex("(?=([0-9]{3})+(?![0-9]))")],
        ..BYTES
    },
    Pre {
        names: &["gemma4"],
        passes: &[LINES],
        add_bos: true,
        spelling: Spelling::RawNewlines,
        ..BYTES
    },
    Pre { names: &["sarvam-moe"], passes: &[LINES], spelling: Spelling::Raw, ..BYTES },
    Pre {
        names: &["default"],
        passes: &[
            Pass::Regex(r"[\p{P}\$\+<=>\^~\|]+"),
            GPT2,
            Pass::Regex(r"\p{N}+"),
            Pass::Regex("[0-9][0-9][0-9]"),
        ],
        ..BYTES
    },
];

impl Pre {
    /// Whether a file may lack `tokenizer.ggml.merges`.
    pub fn optional_merges(&self) -> bool {
        self.names.contains(&"kimi-k2")
    }
}

/// The row of the table that has this name.
pub(super) fn find(name: &str) -> Option<&'static Pre> {
    TABLE.iter().find(|p| p.names.contains(&name))
}

/// The names of all rows, in alphabetical order.
pub(super) fn names() -> Vec<&'static str> {
    let mut names: Vec<_> = TABLE.iter().flat_map(|p| p.names.iter().copied()).collect();
    names.sort_unstable();
    names
}
