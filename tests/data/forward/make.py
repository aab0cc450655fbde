"""Writes tiny random models and what llama.cpp and transformers compute with them.

    python make.py FOLDER_OF_LIBLLAMA [NAME...]

The folder is bins/linux-x64 of the npm package @node-llama-cpp/linux-x64 (tests/llama_cpp/install.sh
brings it). Python needs torch, transformers, gguf, numpy. See README.md for what the files hold.
"""
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from llama_cpp import LlamaCpp

HERE = Path(__file__).parent
Q = gguf.GGMLQuantizationType
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"]
MERGES = (
    "t h|th e|Ġ t|Ġ a|i n|Ġ the|e r|o n|r e|Ġt o|a n|an d|Ġ and|i s|h e|l l|o u|Ġ y|Ġy ou|h o|w ho|Ġ ho|Ġho w"
    "|u s|us er|a s|as s|ass is|assis t|t an|tan t|assis tant|Ġ i|Ġi s|w h|wh a|wha t|H e|He ll|o Ċ|. Ċ"
).split("|")


@dataclass
class Model:
    """One random model; sizes are odd on purpose."""

    name: str
    arch: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: int
    tied: bool
    theta: float = 10000.0
    qkv_bias: bool = False
    writer_bias: bool = False  # attn_output.bias and ffn_down.bias
    qk_norm: bool = False
    factors: dict | None = None  # transformers' "llama3" rope parameters
    linear: float | None = None  # linear rope scaling
    write_head_dim: bool = False
    experts: dict | None = None  # count, used, ffn, shared (width of the shared expert, or 0)
    encodings: dict = field(default_factory=dict)  # the end of a tensor's name -> its encoding; else F16


K_MIX = {
    "token_embd.weight": Q.Q6_K, "attn_q.weight": Q.Q4_K, "attn_k.weight": Q.Q5_K, "attn_v.weight": Q.Q6_K,
    "attn_output.weight": Q.Q4_K, "ffn_gate.weight": Q.Q3_K, "ffn_up.weight": Q.Q2_K, "ffn_down.weight": Q.Q4_K,
    "blk.1.ffn_down.weight": Q.Q6_K,
}
MODELS = [
    Model("llama3", "llama", 96, 6, 2, 16, 160, 2, True, theta=500000.0,
          factors={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}),
    Model("llama-linear", "llama", 80, 5, 5, 16, 128, 2, False, linear=2.0, writer_bias=True),
    Model("qwen2", "qwen2", 64, 4, 1, 16, 144, 3, False, theta=1000000.0, qkv_bias=True),
    Model("qwen3", "qwen3", 64, 4, 2, 32, 96, 3, True, theta=1000000.0, qk_norm=True, write_head_dim=True),
    Model("mistral", "llama", 72, 3, 1, 32, 120, 3, False, write_head_dim=True),
    Model("mixtral", "llama", 64, 4, 2, 16, 80, 2, False, experts={"count": 4, "used": 2, "ffn": 80, "shared": 0}),
    Model("qwen2moe", "qwen2moe", 64, 4, 2, 16, 96, 2, False, qkv_bias=True, experts={"count": 6, "used": 3, "ffn": 40, "shared": 72}),
    Model("qwen3moe", "qwen3moe", 64, 4, 2, 32, 96, 2, True, theta=1000000.0, qk_norm=True, write_head_dim=True,
          experts={"count": 8, "used": 2, "ffn": 48, "shared": 0}),
    Model("llama-q8_0", "llama", 128, 4, 2, 32, 224, 2, True, encodings={"weight": Q.Q8_0}),
    Model("llama-k-quants", "llama", 256, 4, 1, 64, 256, 2, True, theta=500000.0, encodings=K_MIX),
]


def byte_tokens():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


def vocabulary(model):
    tokens = byte_tokens() + ["".join(m.split(" ")) for m in MERGES]
    tokens = list(dict.fromkeys(tokens)) + CONTROL
    known = set(tokens)
    assert all(part in known for m in MERGES for part in m.split(" ")), "a merge of unknown tokens"
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - len(CONTROL)) + [gguf.TokenType.CONTROL] * len(CONTROL)
    return tokens, kinds


def random_blocks(rng, kind, rows, columns, std):
    """Random bytes as blocks of `kind`, their scales set so that the values have mean 0 and deviation `std`.

    Unlike quantized random floats, these use every code, every sub-block scale and both signs of a scale.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    # Where the 16-bit scales sit, and by how many scales the mean code is lifted (stored as dmin).
    at, dmin, middle = {
        Q.Q8_0: (0, None, 0), Q.Q2_K: (80, 82, 1.5), Q.Q3_K: (108, None, 0), Q.Q4_K: (0, 2, 7.5), Q.Q5_K: (0, 2, 15.5), Q.Q6_K: (208, None, 0),
    }[kind]
    jitter = rng.uniform(0.7, 1.3, len(raw))

    def scale(d):
        raw[:, at:at + 2] = (d * jitter).astype("<f2").view(np.uint8).reshape(-1, 2)
        if dmin is not None:
            raw[:, dmin:dmin + 2] = (d * middle * jitter).astype("<f2").view(np.uint8).reshape(-1, 2)
        return gguf.quants.dequantize(raw, kind)

    scale(std / scale(0.01).std() * 0.01)
    return raw.reshape(rows, -1)


def weights(model):
    """Every tensor: name -> (encoding, stored array); matrices are [rows, columns]."""
    rng = np.random.default_rng(sum(map(ord, model.name)))
    m, out = model, {}
    vocab = len(vocabulary(m)[0])
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim

    def matrix(name, rows, columns, std):
        ends = [e for e in m.encodings if name.endswith(e)]
        kind = m.encodings[max(ends, key=len)] if ends else Q.F16
        if kind == Q.F16:
            out[name] = kind, rng.normal(0, std, (rows, columns)).astype(np.float16)
        else:
            out[name] = kind, random_blocks(rng, kind, rows, columns, std)

    def vector(name, size, mean, std):
        out[name] = Q.F32, rng.normal(mean, std, size).astype(np.float32)

    head = 2.5 / m.hidden**0.5
    embedding = head if m.tied else 1.0
    branch = embedding * (2.0 if m.tied else 1.0)
    matrix("token_embd.weight", vocab, m.hidden, embedding)
    if m.factors:
        out["rope_freqs.weight"] = Q.F32, llama3_factors(m)
    for i in range(m.layers):
        b = f"blk.{i}."
        vector(b + "attn_norm.weight", m.hidden, 1.0, 0.2)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            matrix(f"{b}attn_{name}.weight", rows, m.hidden, (1.4 if name != "v" else 1.0) / m.hidden**0.5)
            if m.qkv_bias:
                vector(f"{b}attn_{name}.bias", rows, 0.0, 0.5)
        if m.qk_norm:
            vector(b + "attn_q_norm.weight", m.head_dim, 1.3, 0.2)
            vector(b + "attn_k_norm.weight", m.head_dim, 1.3, 0.2)
        matrix(b + "attn_output.weight", m.hidden, q, 1.5 * branch / q**0.5)
        vector(b + "ffn_norm.weight", m.hidden, 1.0, 0.2)
        if m.experts:
            mixture(m, b, matrix, vector, out, branch)
            continue
        matrix(b + "ffn_gate.weight", m.ffn, m.hidden, 1.2 / m.hidden**0.5)
        matrix(b + "ffn_up.weight", m.ffn, m.hidden, 1.2 / m.hidden**0.5)
        matrix(b + "ffn_down.weight", m.hidden, m.ffn, 1.5 * branch / m.ffn**0.5)
        if m.writer_bias:
            vector(b + "attn_output.bias", m.hidden, 0.0, 0.3)
            vector(b + "ffn_down.bias", m.hidden, 0.0, 0.3)
    vector("output_norm.weight", m.hidden, 1.0, 0.2)
    if not m.tied:
        matrix("output.weight", vocab, m.hidden, head)
    return out


def mixture(m, b, matrix, vector, out, branch):
    """A block's router and experts; the router is 32-bit, as converters leave it."""
    e = m.experts
    vector(b + "ffn_gate_inp.weight", (e["count"], m.hidden), 0.0, 2.0 / m.hidden**0.5)
    for role, rows, columns, std in (
        ("gate", e["ffn"], m.hidden, 1.2 / m.hidden**0.5), ("up", e["ffn"], m.hidden, 1.2 / m.hidden**0.5),
        ("down", m.hidden, e["ffn"], 2.0 * branch / e["ffn"]**0.5),
    ):
        name = f"{b}ffn_{role}_exps.weight"
        matrix(name, e["count"] * rows, columns, std)
        kind, stored = out[name]
        out[name] = kind, stored.reshape(e["count"], rows, -1)
        if e["shared"]:
            rows, columns = (m.hidden, e["shared"]) if role == "down" else (e["shared"], m.hidden)
            matrix(f"{b}ffn_{role}_shexp.weight", rows, columns, std)
    if e["shared"]:
        vector(b + "ffn_gate_inp_shexp.weight", m.hidden, 0.0, 2.0 / m.hidden**0.5)


def llama3_factors(m):
    """rope_freqs.weight, as llama.cpp's converter writes it for Llama 3.x."""
    f = m.factors
    low, high = (f["original_max_position_embeddings"] / f[k] for k in ("low_freq_factor", "high_freq_factor"))
    out = []
    for i in range(0, m.head_dim, 2):
        wavelength = 2 * np.pi * m.theta ** (i / m.head_dim)
        if wavelength < high:
            out.append(1.0)
        elif wavelength > low:
            out.append(f["factor"])
        else:
            smooth = (f["original_max_position_embeddings"] / wavelength - f["low_freq_factor"]) / (f["high_freq_factor"] - f["low_freq_factor"])
            out.append(1 / ((1 - smooth) / f["factor"] + smooth))
    return np.array(out, dtype=np.float32)


def floats(kind, stored):
    return stored.astype(np.float32) if kind in (Q.F32, Q.F16) else gguf.quants.dequantize(stored, kind)


def write_gguf(model, tensors, path, as_f32=False):
    m, tokens = model, vocabulary(model)
    w = gguf.GGUFWriter(path, m.arch)
    w.add_name(f"random {m.name}")
    w.add_context_length(1024)
    w.add_embedding_length(m.hidden)
    w.add_block_count(m.layers)
    w.add_feed_forward_length(m.ffn)
    w.add_head_count(m.heads)
    w.add_head_count_kv(m.kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(m.theta)
    if m.write_head_dim:
        w.add_key_length(m.head_dim)
        w.add_value_length(m.head_dim)
    if m.arch == "llama":
        w.add_rope_dimension_count(m.head_dim)
        w.add_vocab_size(len(tokens[0]))
    if m.experts:
        w.add_expert_count(m.experts["count"])
        w.add_expert_used_count(m.experts["used"])
        if m.arch != "llama":
            w.add_expert_feed_forward_length(m.experts["ffn"])
        if m.experts["shared"]:
            w.add_expert_shared_feed_forward_length(m.experts["shared"])
    if m.linear:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(m.linear)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("llama-bpe" if m.arch == "llama" else "qwen2")
    w.add_token_list(tokens[0])
    w.add_token_types(tokens[1])
    w.add_token_merges(MERGES)
    w.add_bos_token_id(tokens[0].index("<|begin_of_text|>" if m.arch == "llama" else "<|endoftext|>"))
    w.add_eos_token_id(tokens[0].index("<|im_end|>"))
    w.add_add_bos_token(m.arch == "llama")
    w.add_chat_template(TEMPLATE)
    for name, (kind, stored) in tensors.items():
        if as_f32:
            w.add_tensor(name, floats(kind, stored))
        else:
            w.add_tensor(name, stored, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def half_split(rows, heads):
    """q/k rows from GGUF's llama order (rope pairs side by side) to Hugging Face's (halves)."""
    shape = rows.shape
    return rows.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def transformers_logits(model, tensors, sequences):
    m = model
    rope = {"rope_type": "default", "rope_theta": m.theta}
    if m.factors:
        rope |= {"rope_type": "llama3", **m.factors}
    if m.linear:
        rope |= {"rope_type": "linear", "factor": m.linear}
    kind = {"llama": "Mixtral" if m.experts else "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen2moe": "Qwen2Moe", "qwen3moe": "Qwen3Moe"}[m.arch]
    more = {"attention_bias": m.writer_bias, "mlp_bias": m.writer_bias} if kind == "Llama" else {}
    if m.experts:
        e, norm = m.experts, {"norm_topk_prob": m.arch == "qwen3moe"} if m.arch != "llama" else {}
        more = {"num_local_experts" if m.arch == "llama" else "num_experts": e["count"], "num_experts_per_tok": e["used"]} | norm
        if m.arch != "llama":
            more |= {"moe_intermediate_size": e["ffn"], "shared_expert_intermediate_size": e["shared"]}
    config = getattr(transformers, kind + "Config")(
        vocab_size=len(vocabulary(m)[0]), hidden_size=m.hidden, intermediate_size=m.ffn, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim, rms_norm_eps=1e-5,
        max_position_embeddings=1024, rope_parameters=rope, tie_word_embeddings=m.tied, attn_implementation="eager", **more,
    )
    config._experts_implementation = "eager"
    net = getattr(transformers, kind + "ForCausalLM")(config).float().eval()
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {
        "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        **{f"ffn_{r}_shexp": f"mlp.shared_expert.{r}_proj" for r in ("gate", "up", "down")},
    }
    state = {}
    for name, (encoding, stored) in tensors.items():
        if name == "rope_freqs.weight":
            continue
        values, parts = floats(encoding, stored), name.split(".")
        if name.endswith("_exps.weight"):  # gate and up are one parameter
            experts = f"model.layers.{parts[1]}.mlp.experts."
            if parts[2] == "ffn_down_exps":
                state[experts + "down_proj"] = torch.from_numpy(np.array(values))
            elif parts[2] == "ffn_up_exps":
                gate = floats(*tensors[name.replace("_up_", "_gate_")])
                state[experts + "gate_up_proj"] = torch.from_numpy(np.concatenate([gate, values], 1))
            continue
        if parts[2:3] == ["ffn_gate_inp_shexp"]:
            values = values[None]
        if m.arch == "llama" and parts[-2] in ("attn_q", "attn_k"):
            values = half_split(values, m.heads if parts[-2] == "attn_q" else m.kv_heads)
        full = top[parts[0]] if parts[0] in top else f"model.layers.{parts[1]}.{names[parts[2]]}"
        state[f"{full}.{parts[-1]}"] = torch.from_numpy(np.array(values))
    if m.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all(n.endswith(".bias") for n in missing), (missing, unexpected)
    with torch.no_grad():
        for n in missing:  # biases that transformers has and the file lacks
            net.get_parameter(n).zero_()
        return [net(torch.tensor([ids])).logits[0].numpy() for ids in sequences]


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def top10(logprobs):
    return [[[[int(i), round(float(row[i]), 6)] for i in np.argsort(-row, kind="stable")[:10]] for row in seq] for seq in logprobs]


def sequences(model):
    rng = np.random.default_rng(7 + len(model.name))
    size = len(vocabulary(model)[0])
    return [rng.integers(0, size, n).tolist() for n in (5, 17, 40)]


def main():
    torch.set_num_threads(1)
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    reference = LlamaCpp(sys.argv[1])
    for m in MODELS:
        if sys.argv[2:] and m.name not in sys.argv[2:]:
            continue
        tensors, ids, path = weights(m), sequences(m), HERE / f"{m.name}.gguf"
        write_gguf(m, tensors, path)
        stored = reference.logits(path, ids)
        with tempfile.TemporaryDirectory() as temporary:
            twin = Path(temporary) / "f32.gguf"
            write_gguf(m, tensors, twin, as_f32=True)
            exact = reference.logits(twin, ids)
        logits = transformers_logits(m, tensors, ids)
        stored, exact, torched = ([log_softmax(np.asarray(x, np.float32)) for x in part] for part in (stored, exact, logits))
        golden = {"sequences": ids, "llama_cpp": top10(stored), "llama_cpp_f32": top10(exact), "transformers": top10(torched)}
        path.with_suffix(".json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")

        def apart(a, b):
            # Only where a top-10 comparison looks: the tail's log probabilities differ more and matter to nobody.
            return max(np.abs(np.take_along_axis(x - y, np.argsort(-y, -1)[:, :10], -1)).max() for x, y in zip(a, b))

        print(f"{m.name:15} {path.stat().st_size:7} bytes, vocabulary {len(vocabulary(m)[0])}, logits' deviation {np.concatenate(logits).std():.2f},"
              f" mean top logprob {np.mean([x.max(-1).mean() for x in torched]):.2f}, max |difference| from transformers:"
              f" {apart(exact, torched):.1e} with F32 weights, {apart(stored, torched):.1e} as stored")


if __name__ == "__main__":
    main()
