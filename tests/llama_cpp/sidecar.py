"""What llama.cpp makes of a model with a sidecar: log probabilities, greedy answers, the residual stream after each block.

    python3 sidecar.py LIBRARIES REQUEST.json

LIBRARIES: the folder with libllama (node_modules/@node-llama-cpp/linux-x64/bins/linux-x64). REQUEST.json:
{"model": FILE, "lora": FILE or null, "control_vector": FILE or null, "forced": [[[prompt token, ...], [answer token, ...]], ...],
 "prompts": [[token, ...], ...], "max_new_tokens": n, "end": [token, ...], "watch": bool}
Prints {"logprobs": [[ln p of each answer token], ...], "answers": [[token, ...], ...],
        "residual": {block: [values of the last token of the first forced text]}}.
Standard library only.
"""
import ctypes as C
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "data/forward"))
from llama_cpp import LlamaCpp, Session  # noqa: E402


def control_vector(path):
    """(values of block 1, block 2, ... up to the last one named; width), as common/common.cpp loads it."""
    data = Path(path).read_bytes()
    at = 0

    def number(size):
        nonlocal at
        at += size
        return int.from_bytes(data[at - size:at], "little")

    def text():
        nonlocal at
        n = number(8)
        at += n
        return data[at - n:at].decode()

    assert data[:4] == b"GGUF"
    at = 8
    tensors, entries = number(8), number(8)
    for _ in range(entries):
        text()
        kind = number(4)
        at += 0 if kind == 8 else {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}[kind]
        if kind == 8:
            text()
    found = {}
    for _ in range(tensors):
        name = text()
        dims = [number(8) for _ in range(number(4))]
        kind, offset = number(4), number(8)
        assert len(dims) == 1 and kind == 0 and name.startswith("direction."), (name, dims, kind)
        found[int(name.split(".")[1])] = (dims[0], offset)
    start = (at + 31) // 32 * 32
    width = next(iter(found.values()))[0]
    values = [0.0] * (width * max(found))
    for block, (n, offset) in found.items():
        assert block >= 1 and n == width
        values[(block - 1) * n:block * n] = (C.c_float * n).from_buffer_copy(data, start + offset)
    return values, width


def main():
    request = json.loads(Path(sys.argv[2]).read_text())
    vector = request.get("control_vector") and control_vector(request["control_vector"])
    residual = {}
    watch = residual.setdefault if request.get("watch") else None
    session = Session(LlamaCpp(sys.argv[1]), request["model"], request.get("lora"), vector, watch)
    logprobs = []
    for prompt, answer in request.get("forced", []):
        rows = session.decode(prompt + answer, clear=True)[len(prompt) - 1:]
        out = []
        for row, token in zip(rows, answer):
            top = max(row)
            out.append(row[token] - top - math.log(sum(math.exp(x - top) for x in row)))
        logprobs.append(out)
        if len(logprobs) == 1:
            tokens = len(prompt + answer)
            residual = {block: x[len(x) // tokens * (tokens - 1):] for block, x in residual.items()}
    answers = []
    for prompt in request.get("prompts", []):
        row, out = session.decode(prompt, clear=True)[-1], []
        while len(out) < request["max_new_tokens"]:
            token = row.index(max(row))
            if token in request["end"]:
                break
            out.append(token)
            row = session.decode([token])[-1]
        answers.append(out)
    session.close()
    print(json.dumps({"logprobs": logprobs, "answers": answers, "residual": residual}))


if __name__ == "__main__":
    main()
