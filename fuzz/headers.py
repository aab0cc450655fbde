#!/usr/bin/env python3
"""Runs the real program on mutated headers of small fixtures.

Each case is a GGUF file or a Hugging Face folder with one to three mutations in what the program
parses: counts, lengths, types, shapes, offsets, metadata, config.json, tokenizer.json, the index,
the chat template. Each case runs `inspect`, `inspect --prompt`, `eval` and the main job; of the
cases that `eval` can run, only one in twenty runs the main job, which takes seconds there.

A case fails on: a panic (exit code 101, or "panicked" on standard error), an end by a signal, an
exit code outside of the contract (0, 1, 3), more than 5 s of processor time or 60 s by the clock,
more than 500 MB of resident memory, an error that is not one line, a file that is written by a run
that does not end with 0, or a change of the input.

    python3 fuzz/headers.py target/release/refusal-patch --cases 10000 --seed 1 --keep /tmp/found

Failed cases are kept in the folder that --keep names. The exit code is 1 where a case failed.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CPU_SECONDS = 5
WALL_SECONDS = 60
RESIDENT = 500 << 20
ADDRESSES = 3 << 30

NUMBERS = [0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
NUMBERS += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
TEMPLATES = [
    "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    "{{ ns.s }}",
    "{{ messages[0].content.replace('', 'a' * 100000).replace('', 'b' * 100000) }}",
    "{{ '%s' | format(messages) | indent(1000000000) }}",
    "{{ range(0, 1000000000, 1) | list | length }}",
    "{{ [1, 2, 3] | batch(1000000000) | list }}",
    "{% raw %}" + "{" * 2000,
    "(" * 3000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "-" * 20000 + "1 }}",
    "{% if 1 %}" * 3000,
    "{{ [" + "[" * 2000 + "]" * 2000 + "] }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "",
    "{{ messages }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%' * 1000) }}",
]
PATTERNS = ["(a+)+$", "(?:a|a)*b", "(x+x+)+y", "((a{0,100}){0,100}){0,100}", "(?=(a+))a*\\1b", "("]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3"]
ARCHITECTURES += ["phi3", "granite", "olmo2", "exaone4", "glm4", "mistral3", "nobody"]


# ------------------------------------------------------------------------------ GGUF

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class Gguf:
    """A GGUF header, cut into its fields: (kind, bytes), in order; then the data."""

    def __init__(self, raw):
        self.raw, self.at = raw, 0
        self.head, self.entries, self.infos = [], [], []
        self.take(self.head, "magic", 4)
        self.take(self.head, "version", 4)
        tensors = self.number(self.head, "count")
        entries = self.number(self.head, "count")
        for _ in range(entries):
            entry = []
            self.string(entry, "key")
            self.value(entry)
            self.entries.append(entry)
        for _ in range(tensors):
            info = []
            self.string(info, "name")
            dims = self.number(info, "dims", 4)
            for _ in range(dims):
                self.take(info, "dim", 8)
            self.take(info, "type", 4)
            self.take(info, "offset", 8)
            self.infos.append(info)
        start = (self.at + 31) // 32 * 32
        self.data = raw[start:]

    def take(self, out, kind, n):
        out.append([kind, self.raw[self.at : self.at + n]])
        self.at += n
        return out[-1][1]

    def number(self, out, kind, n=8):
        return int.from_bytes(self.take(out, kind, n), "little")

    def string(self, out, kind):
        n = self.number(out, "length")
        return self.take(out, kind, n)

    def value(self, out):
        kind = self.number(out, "valuetype", 4)
        if kind == 8:
            self.string(out, "text")
        elif kind == 9:
            inner = self.number(out, "valuetype", 4)
            count = self.number(out, "count")
            if inner == 8:
                for _ in range(count):
                    self.string(out, "text")
            else:
                self.take(out, "numbers", count * SIZES[inner])
        else:
            self.take(out, "scalar", SIZES[kind])

    def bytes(self, sparse):
        head = [f for part in [self.head, *self.entries, *self.infos] for f in part]
        head = b"".join(f[1] for f in head)
        return head + b"\0" * (-len(head) % 32), (b"" if sparse else self.data), len(self.data)


def integer(r, size, old):
    choice = r.randrange(4)
    value = int.from_bytes(old, "little")
    if choice == 0:
        value += r.choice([-1, 1, 2, -2, 8, -8, 32])
    elif choice == 1:
        value ^= 1 << r.randrange(8 * size)
    elif choice == 2:
        value = r.choice(NUMBERS)
    else:
        value = r.getrandbits(8 * size)
    return (value % (1 << (8 * size))).to_bytes(size, "little")


def text(r, old):
    choice = r.randrange(6)
    if choice == 0:
        return b""
    if choice == 1:
        return bytes(r.randrange(256) for _ in range(r.randrange(40)))
    if choice == 2:
        return old * r.choice([2, 3, 50])
    if choice == 3:
        return old[: r.randrange(len(old) + 1)]
    out = bytearray(old)
    for _ in range(r.randrange(1, 4)):
        if out:
            out[r.randrange(len(out))] = r.randrange(256)
    return bytes(out)


def set_text(part, index, value, keep_length):
    part[index][1] = value
    if not keep_length:
        part[index - 1][1] = struct.pack("<Q", len(value))


def find(g, key):
    return next((e for e in g.entries if e[1][1] == key), None)


def mutate_gguf(r, g):
    choice = r.randrange(12)
    parts = [g.head, *g.entries, *g.infos]
    if choice <= 3:
        part = r.choice(parts)
        index = r.randrange(len(part))
        kind, old = part[index]
        if kind in ("key", "text", "name"):
            set_text(part, index, text(r, old), r.random() < 0.2)
        elif kind in ("magic", "numbers"):
            part[index][1] = text(r, old) if r.random() < 0.3 else damaged(r, old)
        else:
            part[index][1] = integer(r, len(old), old)
    elif choice == 4:
        # A number of the model's shape.
        shape = [e for e in g.entries if e[-1][0] == "scalar" and b"." in e[1][1]]
        if shape:
            e = r.choice(shape)
            e[-1][1] = integer(r, len(e[-1][1]), e[-1][1])
    elif choice == 5:
        info = r.choice(g.infos)
        fields = [f for f in info if f[0] in ("dim", "type", "offset", "dims")]
        f = r.choice(fields)
        f[1] = integer(r, len(f[1]), f[1])
    elif choice == 6:
        where = r.choice([g.entries, g.infos])
        if where:
            i = r.randrange(len(where))
            if r.random() < 0.5:
                del where[i]
            else:
                where.insert(r.randrange(len(where)), [list(f) for f in where[i]])
        if r.random() < 0.7:
            g.head[2][1] = struct.pack("<Q", len(g.infos))
            g.head[3][1] = struct.pack("<Q", len(g.entries))
    elif choice == 7:
        e = find(g, b"general.architecture")
        if e:
            set_text(e, -1, r.choice(ARCHITECTURES).encode(), False)
    elif choice == 8:
        e = find(g, b"tokenizer.chat_template")
        if e:
            set_text(e, -1, r.choice(TEMPLATES).encode(), False)
    elif choice == 9:
        keys = [b"tokenizer.ggml.model", b"tokenizer.ggml.pre", b"tokenizer.ggml.tokens"]
        keys += [b"tokenizer.ggml.merges", b"tokenizer.ggml.token_type", b"tokenizer.ggml.scores"]
        e = find(g, r.choice(keys))
        if e:
            f = r.choice(e[3:] or e)
            f[1] = damaged(r, f[1])
    elif choice == 10:
        e = find(g, r.choice([b"general.alignment", b"general.type", b"split.count"]))
        if e is None:
            key = r.choice([b"general.alignment", b"split.count"])
            value = struct.pack("<I", r.choice([0, 1, 3, 8, 64, 2**31, 2**32 - 1]))
            g.entries.append(
                [["length", struct.pack("<Q", len(key))], ["key", key],
                 ["valuetype", struct.pack("<I", 4)], ["scalar", value]]
            )
            g.head[3][1] = struct.pack("<Q", len(g.entries))
    else:
        g.data = g.data[: r.randrange(len(g.data) + 1)] if g.data else g.data


def damaged(r, old):
    out = bytearray(old)
    for _ in range(r.randrange(1, 6)):
        if out:
            out[r.randrange(len(out))] = r.randrange(256)
    return bytes(out)


def gguf_case(r, raw, path):
    g = Gguf(raw)
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        mutate_gguf(r, g)
    head, data, length = g.bytes(r.random() < 0.3)
    if r.random() < 0.05:
        head, data, length = head[: r.randrange(len(head))], b"", 0
    with open(path, "wb") as f:
        f.write(head + data)
        # A hole of the data's size.
        f.truncate(len(head) + length)


# ---------------------------------------------------------------------------- folders


def nodes(value, path=()):
    yield path
    if not isinstance(value, (dict, list)):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        if isinstance(child, (dict, list)) and child:
            yield from nodes(child, path + (key,))
        else:
            yield path + (key,)


def nasty(r, old):
    deep = []
    for _ in range(100):
        deep = [deep]
    values = [None, True, False, -1, 0.5, 1e308, -1e308, 1e-320, "", "x" * 1000, [], {}, deep]
    if isinstance(old, bool) or not isinstance(old, (int, float)):
        return r.choice(values + NUMBERS)
    close = [old + 1, old - 1, old * 2, -old, float(old), str(old)]
    return r.choice(values + NUMBERS + close + close)


def mutate_json(r, value):
    """One node of a tree is replaced, deleted or doubled."""
    path = r.choice(list(nodes(value)))
    if not path:
        return nasty(r, value) if r.random() < 0.2 else value
    at = value
    for key in path[:-1]:
        at = at[key]
    key = path[-1]
    choice = r.randrange(4)
    if choice == 0:
        del at[key]
    elif choice == 1 and isinstance(at, dict):
        at[r.choice(["", "a", str(key) + "x", "\0"])] = at.pop(key)
    elif choice == 2 and isinstance(at, list):
        at.insert(r.randrange(len(at) + 1), at[key])
    elif isinstance(at[key], str) and r.random() < 0.5:
        at[key] = text(r, at[key].encode()).decode("latin-1")
    else:
        at[key] = nasty(r, at[key])
    return value


def tokenizer(vocabulary):
    """A byte-level tokenizer.json of a few tokens."""
    vocab = {chr(97 + i % 26) * (1 + i // 26): i for i in range(vocabulary)}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 1, "content": "bb", "special": True, "single_word": False, "lstrip": False,
             "rstrip": True, "normalized": False}
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+(?!\\S)|."},
                 "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                           "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab,
                  "merges": [["a", "a"], ["b", "b"]]},
    }


PLAIN = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}assistant "


def folder_case(r, source, path):
    os.mkdir(path)
    with open(os.path.join(source, "config.json")) as f:
        config = json.load(f)
    with open(os.path.join(source, "model.safetensors"), "rb") as f:
        raw = f.read()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    vocabulary = config.get("text_config", config).get("vocab_size", 64)
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer(min(vocabulary, 64)),
        "generation_config.json": {"eos_token_id": 2},
        "tokenizer_config.json": {"chat_template": PLAIN, "bos_token": "a",
                                  "added_tokens_decoder": {"1": {"content": "bb", "special": True}}},
    }
    name, index = "model.safetensors", None
    if r.random() < 0.2:
        name = "model-00001-of-00001.safetensors"
        index = {"metadata": {"total_size": len(data)},
                 "weight_map": {k: name for k in header if k != "__metadata__"}}
        files["model.safetensors.index.json"] = index
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        choice = r.randrange(10)
        if choice <= 3:
            header = mutate_json(r, header)
        elif choice <= 5:
            files["config.json"] = mutate_json(r, files["config.json"])
        elif choice == 6:
            files["tokenizer.json"] = mutate_json(r, files["tokenizer.json"])
        elif choice == 7:
            other = r.choice([n for n in files if n != "config.json"])
            files[other] = mutate_json(r, files[other])
        elif choice == 8:
            which = r.random()
            if which < 0.5 and isinstance(files["tokenizer_config.json"], dict):
                files["tokenizer_config.json"]["chat_template"] = r.choice(TEMPLATES)
            elif isinstance(files["tokenizer.json"], dict):
                pattern = {"Regex": r.choice(PATTERNS)}
                files["tokenizer.json"]["pre_tokenizer"] = {
                    "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        else:
            data = data[: r.randrange(len(data) + 1)]
    head = json.dumps(header).encode()
    claimed = struct.pack("<Q", len(head))
    if r.random() < 0.05:
        claimed = integer(r, 8, claimed)
    if r.random() < 0.05:
        head = damaged(r, head)
    with open(os.path.join(path, name), "wb") as f:
        f.write(claimed + head)
        if r.random() < 0.7:
            f.write(data)
        else:
            f.truncate(8 + len(head) + len(data))
    for file, value in files.items():
        bytes_ = json.dumps(value).encode()
        if r.random() < 0.02:
            bytes_ = damaged(r, bytes_)
        with open(os.path.join(path, file), "wb") as f:
            f.write(bytes_)


# --------------------------------------------------------------------------------- runs


def limits():
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(command, cwd):
    """Exit code, what was said, resident bytes, whether it ran out of time."""
    with tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err,
            preexec_fn=limits)
        begun, late = time.monotonic(), False
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - begun > WALL_SECONDS:
                child.kill()
                late = True
            time.sleep(0.002)
        child.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        said = err.read(1 << 16).decode("utf-8", "replace")
        return child.returncode, said, usage.ru_maxrss * 1024, late


def state(folder):
    out = {}
    for dir_, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(dir_, name)
            s = os.stat(path)
            out[os.path.relpath(path, folder)] = (s.st_size, s.st_mtime_ns)
    return out


def wrong(code, said, resident, late):
    """What is wrong with a run, if anything."""
    if code == 101 or "panicked" in said:
        return "panic"
    if late or code == -24 or code == -9:
        return "hang"
    if code < 0:
        return f"signal {-code}"
    if code not in (0, 1, 3):
        return f"exit code {code}"
    if resident > RESIDENT:
        return f"{resident >> 20} MB"
    errors = [l for l in said.splitlines() if l.startswith("error: ")]
    if code == 1 and len(errors) != 1:
        return f"{len(errors)} lines of error"
    return None


def prompts(folder):
    names = []
    for name, many in (("harmful", 64), ("harmless", 64), ("borderline", 4)):
        path = os.path.join(folder, name + ".jsonl")
        with open(path, "w") as f:
            for i in range(many):
                split = "test" if i == 1 else "validation" if i == 2 else "train"
                f.write(json.dumps({"prompt": f"{name[4:]} {i}", "split": split}) + "\n")
        names += ["--" + name, path]
    return names


def sources():
    ggufs, folders = [], []
    for folder in ("tests/data/forward", "fixtures/architectures"):
        folder = os.path.join(ROOT, folder)
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name.endswith(".gguf"):
                with open(path, "rb") as f:
                    ggufs.append((name, f.read()))
            elif os.path.exists(os.path.join(path, "model.safetensors")):
                folders.append((name, path))
    packings = os.path.join(ROOT, "tests/data/packings")
    for name in sorted(os.listdir(packings)):
        path = os.path.join(packings, name)
        if os.path.exists(os.path.join(path, "model.safetensors")):
            folders.append((name, path))
    return ggufs, folders


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--keep", default=None, help="folder for failed cases")
    args = parser.parse_args()
    program = os.path.abspath(args.program)
    ggufs, folders = sources()
    with tempfile.TemporaryDirectory() as work:
        own = prompts(work)
        two = os.path.join(work, "two.txt")
        with open(two, "w") as f:
            f.write("a\nb <s>\n")
        codes, found = collections.Counter(), collections.Counter()
        begun, cases, runs = time.monotonic(), 0, 0
        for case in range(args.cases):
            if time.monotonic() - begun > args.seconds:
                break
            r = random.Random(f"{args.seed} {case}")
            place = os.path.join(work, "case")
            os.mkdir(place)
            if r.random() < 0.5:
                name, raw = r.choice(ggufs)
                model = os.path.join(place, "in.gguf")
                gguf_case(r, raw, model)
            else:
                name, source = r.choice(folders)
                model = os.path.join(place, "in")
                folder_case(r, source, model)
            out = os.path.join(place, "out.gguf" if model.endswith(".gguf") else "out")
            quick = ["--quiet", "--threads", "1", "--max-new-tokens", "1"]
            job = [program, model, out, *quick, *own]
            failed, runs_well = [], False
            for what, command in (
                ("inspect", [program, "inspect", model]),
                ("prompt", [program, "inspect", model, "--prompt", "a <s> aaaaaaaaaaaaaaaa"]),
                ("eval", [program, "eval", model, *quick, "--prompts", two]),
                ("job", job),
            ):
                if what == "job" and runs_well and r.random() >= 0.05:
                    continue
                before = state(place)
                code, said, resident, late = run(command, work)
                after = state(place)
                runs += 1
                codes[what, code] += 1
                runs_well = what == "eval" and code == 0
                problem = wrong(code, said, resident, late)
                if problem is None and before != {k: after.get(k) for k in before}:
                    problem = "the input changed"
                if problem is None and code != 0 and len(after) != len(before):
                    problem = "a file was written"
                if problem:
                    failed.append(what)
                    found[what, problem] += 1
                    last = said.strip().splitlines()[-1:] or [""]
                    print(f"case {case} ({name}), {what}: {problem}: {last[0][:200]}", flush=True)
            cases += 1
            if failed and args.keep:
                kept = os.path.join(args.keep, f"{args.seed}-{case}-{name}")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(place, kept)
            shutil.rmtree(place)
            if cases % 500 == 0:
                print(f"{cases} cases, {time.monotonic() - begun:.0f} s", flush=True)
    print(f"seed {args.seed}: {cases} cases, {runs} runs, {time.monotonic() - begun:.0f} s")
    for (what, code), n in sorted(codes.items()):
        print(f"  {what}: exit code {code}: {n}")
    for (what, problem), n in sorted(found.items()):
        print(f"  FOUND {what}: {problem}: {n}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
