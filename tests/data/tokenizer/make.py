"""Writes two small vocabularies and the token ids that llama.cpp gives with them.

    python make.py FOLDER_OF_LIBLLAMA

The folder is bins/linux-x64 of the npm package @node-llama-cpp/linux-x64 (tests/llama_cpp/install.sh
brings it). Python needs gguf, numpy, tokenizers, sentencepiece. See README.md for what the files hold.
"""
import ctypes as C
import io
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import gguf
import sentencepiece
import tokenizers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "forward"))
from llama_cpp import LlamaCpp  # noqa: E402

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PRE = re.findall(r'"([^"]+)"', "".join(re.findall(r"names: &\[(.*?)\]", (HERE / "../../../src/text/pre.rs").read_text(), re.S)))
NEWER = {"glm4", "glm5"}  # llama.cpp changed them after v0.5.0
RAW = {"gemma4", "sarvam-moe"}  # spelled as SentencePiece does

# What a pre-tokenizer can tell apart, often side by side.
PIECES = [
    "the", "The", " of", " and", "Hello", "WORLD", "camelCase", "HTMLParser", "iPhone", "don", "I", "we", "they", "Rock",
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'Ve", "'LL", "'D", "'", "''", "\u2019s", "'\u017f",
    "'the", "'storm", "0", "7", "12", "123", "1234", "12345", "1234567", "3.14", "1,000", "\u00bd", "\u00b2", "\u2167", "\u0663\u0664", "\u0967\u0968\u0969",
    "\u00e9t\u00e9", "na\u00efve", "cafe\u0301", "Stra\u00dfe", "\u00dcber", "\u00c5", "\u01f2", "\u02b0", "\u01bb",
    "\u041f\u0440\u0438\u0432\u0435\u0442", "\u043c\u0438\u0440", "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1", "\u1f10\u1f70\u03bd", "\u10d2\u10d0", "\u1c92",
    "\u4f60\u597d", "\u4e16\u754c", "\u9fa6", "\u3007", "\u3400", "\U00020000", "\uf900",
    "\u3053\u3093\u306b\u3061\u306f", "\u30ab\u30bf\u30ab\u30ca", "\u30fb\u30fc", "\uff76\uff9e", "\uff21\uff42", "\uff11\uff12", "\uff01",
    "\ud55c\uad6d\uc5b4", "\u3131", "\u1100\u1161", "\u3105\u3106",
    "\u0645\u0631\u062d\u0628\u0627", "\u0645\u064e", "\u060c", "\u061f", "\u06d4", "\u05e9\u05dc\u05d5\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0915\u094d\u0937", "\u0964", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u1019\u103c", "\u1780\u17d2", "\u0e81", "\u0ca8\u0cbf",
    "\U0001f600", "\U0001f468\u200d\U0001f469", "\U0001f1e9\U0001f1ea", "\u270c\U0001f3fd", "\u2764\ufe0f",
    "!", "?", ".", ",", ";", ":", "...", "\u2026", "-", "--", "\u2014", "_", "__init__", "/", "//", "\\", "(", ")", "[", "]", "{", "}", "()", "[]",
    "+", "=", "==", "<", ">", "=>", "<=", "$", "\u20ac", "%", "&&", "||", "|", "^", "~", "`", "```", "@", "#", "*", '"', "\u201c", "\u201d", "\u00ab", "\u00a7", "\u00b0", "\u00b5",
    "\u3001", "\u3002", "\u300c", "\u30fb", "\uff0c", "\uff1a", "\ufe30",
    " ", " ", " ", "  ", "   ", "    ", "        ", "\t", "\t\t", "\n", "\n", "\n\n", "\n\n\n", "\r\n", "\r", "\r\n\r\n", " \n", "\n ", "\x0b", "\x0c",
    "\u00a0", "\u2003", "\u2028", "\u3000", "\u0085", "\u1680", "\u200b", "\ufeff", "\u00ad", "\x00", "\x01", "\x1c", "\x7f", "\ue000", "\ufffd", "\u0378",
    "\u0301", "\u0308", "\u20dd", "for (int i = 0; ", "def f(x):", "return", "http://a.b/c?d=e", "IMGIMGABZ", "<sentinel:12>",
]
PROSE = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'm sure they'll say: \"No, we've never SEEN it\".",
    "IT'S 10'000 o'clock; YOU'RE late, I'D say.\r\n\r\nWe'Ll see...\n\n\n   Three blanks.",
    "def main(argc, argv):\n    if argc != 2:\n\t\treturn -1  # nothing\n    for i in range(10):\n        print(f\"{i:>3}\")\n",
    "std::vector<std::string> xs{\"a\", \"b\"};\n// a comment\nint x = 0xDEADBEEF + 1e-10;",
    "In 1984 there were 1234567890 of them, 12 345,67 \u20ac each; 3.14159265358979; 00012; 1 22 333 4444 55555 666666",
    "Stra\u00dfenbahnhaltestelle, \u00c4pfel und \u00d6l: Gr\u00fc\u00dfe aus K\u00f6ln! Na\u00efve caf\u00e9 fa\u00e7ade, \u00e9l\u00e8ve.",
    "\u0421\u044a\u0435\u0448\u044c \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u043c\u044f\u0433\u043a\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 \u0431\u0443\u043b\u043e\u043a, \u0434\u0430 \u0432\u044b\u043f\u0435\u0439 \u0447\u0430\u044e. 42-\u0439.",
    "\u6211\u5728\u5317\u4eac\u5927\u5b66\u5b66\u4e60\u4e2d\u6587\u3002\u4eca\u5929\u662f2024\u5e747\u670815\u65e5\uff0c\u661f\u671f\u4e00\uff01\u201c\u4f60\u597d\u201d\uff08\u4e16\u754c\uff09",
    "\u79c1\u306f\u65e5\u672c\u8a9e\u3092\u52c9\u5f37\u3057\u3066\u3044\u307e\u3059\u3002\u30b3\u30f3\u30d4\u30e5\u30fc\u30bf\u306f\u300c\u4fbf\u5229\u300d\u3067\u3059\uff1f",
    "\ub098\ub294 \ud559\uc0dd\uc785\ub2c8\ub2e4. \uc548\ub155\ud558\uc138\uc694!", "\u0627\u0644\u0644\u063a\u0629 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u062c\u0645\u064a\u0644\u0629\u060c \u0623\u0644\u064a\u0633 \u0643\u0630\u0644\u0643\u061f \u0661\u0662\u0663",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e\u0964 \u092f\u0939 \u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948\u0964", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22\u0e43\u0e0a\u0e49\u0e07\u0e48\u0e32\u0e22",
    "\U0001f680\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f\U0001f1e9\U0001f1ea \u270c\U0001f3fd!!! \U0001f914\U0001f914",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n```rust\nfn main() {}\n```\n- [x] done\n* item\n> quote",
    "CamelCaseAndHTTPServerWithJSONApi2XML snake_case_name kebab-case SCREAMING_SNAKE x1y2z3 A1B2",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\Temp\\x.txt $HOME/.bashrc ~/x `ls -la`",
]
TRICKY = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r\n\r\n", "\t", " \n", "\n ", " \n \n ", "a", " a", "  a", "a ", "a  ", "a   b", "\n\na", "a\n\n", " \t\n\r\n  x", "\u3000\u3000x \u00a0y\u2003\u2003z", "\u0085a\u2028b\u1680c",
    "'", "'the 'storm x'dont 'llo 'Re'nt", "\n" * 7, "''s", "'s't're've'm'll'd", "'S'T'RE'VE'M'LL'D", "'Re 'vE 'lL I'M he'S", "'\u017f'\u017fx", "x'sx 'sx\n's", "1's 2'd", "\u2019s don\u2019t",
    "1", "12", "123", "1234", "12345", "123456", "1234567", "12345678901234567890", "a1234567b12c", "1 2 33  444", "1.5e10 -3 +4", "\u0661\u0662\u0663\u0664 \u0967\u0968\u0969\u096a \uff11\uff12\uff13\uff14", "x\u00b2y\u00bd\u2167", "12\n34\r\n56",
    "ABCdefGHI", "aB", "Ab", "ABC", "ABc DEf", "\u00c9t\u00e9\u00c9T\u00c9", "\u01c5\u01f2x", "cafe\u0301s \u0301x \u0301", "e\u0301\u0308E\u0301a\u0301b", "\u0645\u064e\u0631\u064e",
    "!!!\n\n", "?!\r\n\r\nx", " ...", "a.b,c", "a//b/\n/", "{}\n/\n}", "  --  ", "#!$%\n", "!a !A1 $a \u20aca -a", "=====\n-----", "`~^|<>+=$", " (a) [b]\n{c}",
    "\u4f60\u597dabc\u4e16\u754c123", "\u4e00\u9fa5\u9fa6\u3400\u3007\u3005", "\u3042\u30a2\u30fc\u4e00a\u3000\uff01", "\u3001\u3002\u30fbx\u300c\u300d", "\ud55c\uad6da\u3131\u1100", "\u3105\u3106\u2026\u2014\u201cx\u201d\uff1a\uff1b\uff0c", "\U00020000\U0002f800\uf900\u9fff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u2764\ufe0f", "a\u200bb\ufeffc\u00add", "\x00\x01\x1c\x1f\x7f", "\ue000\U0010ffff\ufffd\u0378", "\u202eabc", "IMGIMGABZ<sentinel:12>", "Hello\u2581world \u2581",
    "a" * 70, "9" * 40, " " * 40 + "x", "\n" * 20, "A" * 30 + "a" * 30, "!" * 30, "ab12" * 12,
    "word whole-token wordwhole-token xyzzyq", "Hello world! How are you?",
]
SPECIAL = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>", " <|im_end|> ", "a<|im_end|>b", "<|im_start|><|im_end|>", "<|im_start", "<|im_start|>|im_end|>",
    "x<think>y</think> z", "<think><think>", "<tool", "tool_call", "<tool_call>x", "<|endoftext|>tool_call<think>\n\n", "<s>a</s> b<s>", "<unk>?", "</s>", "<0x41><0x0A>", "[EMPTY_7]",
    "a<|box|>b", "<<box|>><|box|>", "<|<box|>>", "[longest one]", "[longest[longest one]one]", "a\t\tb<think>  c ", "\n\n\n\n x",
]


def random_texts(seed, count, pieces):
    r = random.Random(seed)
    return ["".join(r.choice(PIECES) for _ in range(r.randint(2, pieces))) for _ in range(count)]


def byte_letters():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


# The longer of two overlapping ones wins; a control token has its type wrong; one is user-defined, with blanks.
EXTRA = [
    ("<|im_start|>", CONTROL), ("<|im_end|>", NORMAL), ("<|endoftext|>", CONTROL), ("<think>", USER), ("</think>", USER), ("tool_call", USER),
    ("<tool", CONTROL), ("<|box|>", CONTROL), ("<box|>>", CONTROL), ("[longest one]", CONTROL), ("[longest", USER), ("\t\t", USER), ("<|unused_1|>", UNUSED),
    ("<|channel|>", CONTROL), ("\n" * 7, NORMAL),
]


def add_extra(vocab):
    """llama.cpp takes no two tokens of one spelling."""
    for text, kind in EXTRA:
        if text in vocab["tokens"]:
            vocab["types"][vocab["tokens"].index(text)] = kind
            continue
        vocab["tokens"].append(text)
        vocab["types"].append(kind)
        if "scores" in vocab:
            vocab["scores"].append(-1000.0)


def bpe():
    """Merges that pay no heed to words, so that nearly every wrong cut shows."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=byte_letters(), show_progress=False, special_tokens=[], max_token_length=12
    )
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.train_from_iterator(PROSE * 2 + random_texts(1, 3000, 6), trainer)
    model = json.loads(t.to_str())["model"]
    tokens = [text for text, _ in sorted(model["vocab"].items(), key=lambda x: x[1])]
    merges = [" ".join(m) for m in model["merges"]]
    # Tokens that no merge makes (ignore_merges shows), merges of what is no token, and an empty token.
    words = [w for w in ["\u0120whole-token", "whole", "xyzzyq", "\u0120world", "Hello", "\u00e4\u00bd\u0142\u00e5\u00a5\u00bd"] if w not in tokens]
    tokens += words + [""]
    merges += ["q q", "z z", "\u0120 nowhere", "nospace", "a  b"]
    vocab = {"tokens": tokens, "types": [NORMAL] * len(tokens), "merges": merges}
    add_extra(vocab)
    return vocab


def spm():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE * 2 + random_texts(2, 3000, 6)), model_writer=model, vocab_size=1300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_by_whitespace=False,
        split_by_unicode_script=False, split_by_number=False, split_digits=False, max_sentencepiece_length=10,
        character_coverage=0.995, num_threads=1, minloglevel=2, hard_vocab_limit=False, train_extremely_large_corpus=False,
    )
    p = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kind = lambda i: UNKNOWN if p.is_unknown(i) else CONTROL if p.is_control(i) else BYTE if p.is_byte(i) else NORMAL  # noqa: E731
    n = p.get_piece_size()
    vocab = {
        "tokens": [p.id_to_piece(i) for i in range(n)],
        "types": [kind(i) for i in range(n)],
        "scores": [round(p.get_score(i), 3) for i in range(n)],
    }
    add_extra(vocab)
    return vocab


def raw_bpe(spm_vocab):
    """The SentencePiece vocabulary with merges: Gemma 4's shape."""
    tokens, scores, types = (spm_vocab[k] for k in ("tokens", "scores", "types"))
    known = {t: i for i, (t, k) in enumerate(zip(tokens, types)) if k == NORMAL}
    pairs = []
    for t, i in known.items():
        pairs += [(-scores[i], t[:cut] + " " + t[cut:]) for cut in range(1, len(t)) if t[:cut] in known and t[cut:] in known]
    return {"tokens": tokens, "types": types, "merges": [m for _, m in sorted(pairs)]}


def write(path, model, vocab, pre=None, keys=()):
    w = gguf.GGUFWriter(path, "llama")
    w.add_tokenizer_model(model)
    if pre is not None:
        w.add_tokenizer_pre(pre)
    w.add_token_list(vocab["tokens"])
    w.add_token_types(vocab["types"])
    if "merges" in vocab:
        w.add_eos_token_id(vocab["tokens"].index("<|endoftext|>"))
    if "merges" in vocab:
        w.add_token_merges(vocab["merges"])
    if "scores" in vocab:
        w.add_token_scores(vocab["scores"])
    for key, value in keys:
        w.add_bool(key, value) if isinstance(value, bool) else w.add_uint32(key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


class Vocab:
    def __init__(self, llama, path):
        self.lib = lib = llama.lib
        for name, result, arguments in [
            ("llama_tokenize", C.c_int32, [C.c_void_p, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32, C.c_bool, C.c_bool]),
            ("llama_vocab_is_eog", C.c_bool, [C.c_void_p, C.c_int32]),
            ("llama_vocab_get_add_bos", C.c_bool, [C.c_void_p]),
        ]:
            call = getattr(lib, name)
            call.restype, call.argtypes = result, arguments
        mp = lib.llama_model_default_params()
        mp.vocab_only, mp.n_gpu_layers = True, 0
        self.model = lib.llama_model_load_from_file(str(path).encode(), mp)
        if not self.model:
            raise SystemExit(f"llama.cpp refuses {path}")
        self.vocab = lib.llama_model_get_vocab(self.model)

    def ids(self, text, special):
        data = text.encode()
        out = (C.c_int32 * (len(data) * 2 + 16))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), out, len(out), False, special)
        assert n >= 0
        return list(out[:n])

    def facts(self):
        n = self.lib.llama_vocab_n_tokens(self.vocab)
        ends = [i for i in range(n) if self.lib.llama_vocab_is_eog(self.vocab, i)]
        return {"add_bos": self.lib.llama_vocab_get_add_bos(self.vocab), "ends": ends}

    def close(self):
        self.lib.llama_model_free(self.model)


def main():
    llama = LlamaCpp(sys.argv[1])
    b, s = bpe(), spm()
    r = raw_bpe(s)
    cases = [(pre, "gemma4" if pre == "gemma4" else "gpt2", r if pre in RAW else b, pre, ()) for pre in PRE if pre not in NEWER]
    cases += [("spm", "llama", s, None, ()), ("spm-no-prefix", "llama", s, None, (("tokenizer.ggml.add_space_prefix", False),))]
    texts = TRICKY + PROSE + random_texts(3, 40, 8)
    answers = {}
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model, vocab, pre, keys in cases:
            path = Path(folder) / "vocab.gguf"
            write(path, model, vocab, pre, keys)
            v = Vocab(llama, path)
            facts[name] = v.facts()
            answers[name] = [v.ids(t, False) for t in texts + SPECIAL] + [v.ids(t, True) for t in SPECIAL]
            v.close()
    names = list(answers)
    rows = []
    for i, (text, special) in enumerate([(t, False) for t in texts + SPECIAL] + [(t, True) for t in SPECIAL]):
        distinct, which = [], []
        for name in names:
            ids = answers[name][i]
            if ids not in distinct:
                distinct.append(ids)
            which.append(distinct.index(ids))
        rows.append({"text": text, "special": special, "ids": distinct, "which": which})
    dump = lambda x: json.dumps(x, ensure_ascii=True, separators=(",", ":"))  # noqa: E731
    (HERE / "bpe.json").write_text(dump(b) + "\n")
    (HERE / "spm.json").write_text(dump({**s, "merges": r["merges"]}) + "\n")
    lines = ",\n".join(dump(row) for row in rows)
    (HERE / "golden.json").write_text(f'{{"names":{dump(names)},\n"facts":{dump(facts)},\n"rows":[\n{lines}\n]}}\n')
    print(len(names), "tokenizers,", len(rows), "texts,", len({tuple(map(tuple, a)) for a in answers.values()}), "distinct")


if __name__ == "__main__":
    main()
