"""Times `refusal-patch eval` against llama.cpp as whole processes: the same model, prompts and greedy answers, by turns.

    python3 whole.py MODEL.gguf [--prompts 64] [--new-tokens 32] [--runs 5] [--threads 2] [--sequences 8]

Prints wall seconds, processor seconds and peak memory (median, lowest and highest) of both and the median of the paired ratios. Needs a build (`cargo build --release`) and tests/llama_cpp/install.sh. Standard library only.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
OURS = ROOT / "target/release/refusal-patch"


def timed(command):
    """(wall seconds, processor seconds, peak MiB) of a process."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    assert status == 0, f"{command}: status {status}"
    return time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    for name, value in dict(prompts=64, new_tokens=32, runs=5, threads=2, sequences=8).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts, tokens = pathlib.Path(folder, "prompts.jsonl"), pathlib.Path(folder, "tokens.json")
        built_in = (ROOT / "src/text/prompts.jsonl").read_text().splitlines()
        built_in = [line for line in built_in if json.loads(line)["set"] == "harmless"]
        prompts.write_text("\n".join(built_in[:: max(len(built_in) // a.prompts, 1)][: a.prompts]))
        ours = [OURS, "eval", a.model, "--prompts", prompts, "--max-new-tokens", str(a.new_tokens), "--threads", str(a.threads), "--json", "--quiet"]
        seen = json.loads(subprocess.run(ours, check=True, capture_output=True).stdout)["prompts"]
        tokens.write_text(json.dumps({"prompts": [{"id": p["id"], "tokens": p["tokens"]} for p in seen], "max_new_tokens": a.new_tokens}))
        print(f"{a.model}: {len(seen)} prompts, {sum(len(p['tokens']) for p in seen)} tokens, at most {a.new_tokens} new ones each")
        theirs = ["node", ROOT / "tests/llama_cpp/refusals.mjs", a.model, tokens, "--threads", str(a.threads), "--sequences", str(a.sequences)]
        runs = [(timed(ours), timed(theirs)) for _ in range(a.runs)]
    for name, of in ("refusal-patch", 0), ("llama.cpp", 1):
        columns = list(zip(*(pair[of] for pair in runs)))
        cell = lambda c, unit: f"{statistics.median(c):8.1f} {unit} ({min(c):.1f} to {max(c):.1f})"  # noqa: E731
        print(f"{name:14}", *(cell(c, unit) for c, unit in zip(columns, ("s", "s processor", "MiB"))), sep="  ")
    for at, what in enumerate(("wall time", "processor time")):
        print(f"{what}, refusal-patch / llama.cpp: {statistics.median(a[at] / b[at] for a, b in runs):.2f}")


main()
