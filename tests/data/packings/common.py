"""What the scripts here share: the shape of the model, and how a folder is written."""

import json
import pathlib

import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
HIDDEN, FFN, HEADS, KV, VOCAB = 64, 128, 4, 2, 32
LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 128, "vocab_size": VOCAB, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}


def by_group(n):
    return lambda w: (w.reshape(len(w), -1, n).amin(-1), w.reshape(len(w), -1, n).amax(-1))


def by_row(w):
    return w.amin(1, keepdim=True), w.amax(1, keepdim=True)


def save(name, config, state, expected, metadata=None):
    out = HERE / name
    out.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, out / "model.safetensors", {"format": "pt"} | (metadata or {}))
    save_file({k: v.contiguous() for k, v in expected.items()}, out / "expected.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(name, sum(f.stat().st_size for f in out.iterdir()))


def write(name, quantization, pack):
    """A llama of random weights; `pack` gives a matrix' tensors, what they are when they are unpacked, and metadata, if any."""
    torch.manual_seed(1)
    state = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN),
             "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN), "model.layers.0.post_attention_layernorm.weight": torch.ones(HIDDEN)}
    state = {k: v.bfloat16() for k, v in state.items()}
    expected, metadata = {}, {}
    for module, shape in LINEARS.items():
        parts, plain, *more = pack((torch.randn(shape) * 0.05).bfloat16())
        at = f"model.layers.0.{module}"
        state |= {f"{at}.{k}": v for k, v in parts.items()}
        metadata |= {f"{at}.weight": m for m in more}
        if module in WRITERS:
            expected[at + ".weight"] = plain
    if metadata:
        plain = [k for k in state if k.rsplit(".", 1)[0] + ".weight" not in metadata]
        metadata |= {k: json.dumps({"_type": "Tensor"}) for k in plain}
        metadata["tensor_names"] = json.dumps(list(metadata))
    save(name, LLAMA | {"quantization_config": quantization}, state, expected, metadata)
