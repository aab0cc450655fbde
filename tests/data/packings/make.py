"""Writes a small random llama in every packing, and what its two writers are when they are unpacked.

    pip install torch transformers compressed-tensors bitsandbytes safetensors
    python make.py

compressed-tensors and bitsandbytes pack and unpack for themselves. GPTQ, AWQ and FP8 blocks are written and unpacked here by the
formulas of AutoGPTQ (qlinear_cuda_old.py), AutoAWQ (packing_utils.py) and DeepSeek-V3 (fp8_cast_bf16.py): their quantizers ask
for a GPU. `expected.safetensors` holds the unpacked writers in the type in which the library computes them.
"""

import json
import pathlib

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import FloatQuantizationCompressor, IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
HIDDEN, FFN, HEADS, KV, VOCAB = 64, 128, 4, 2, 32
LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def compressed(compressor, observe, **args):
    """A scheme of compressed-tensors; `observe` gives the (least, largest) weight of each scale."""
    qargs = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=qargs)
    config = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"],
              "format": {PackedQuantizationCompressor: "pack-quantized", IntQuantizationCompressor: "int-quantized",
                         FloatQuantizationCompressor: "float-quantized"}[compressor],
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(qargs.model_dump_json(exclude_none=True))}}}

    def pack(w):
        scale, zero = calculate_qparams(*observe(w), qargs)
        state = compressor.compress({"weight": w, "weight_scale": scale.to(w.dtype), "weight_zero_point": zero}, scheme)
        plain = compressor.decompress(dict(state), scheme)["weight"]
        return {k: v for k, v in state.items() if v is not None}, plain
    return config, pack


def by_group(n):
    return lambda w: (w.reshape(len(w), -1, n).amin(-1), w.reshape(len(w), -1, n).amax(-1))


def by_row(w):
    return w.amin(1, keepdim=True), w.amax(1, keepdim=True)


def whole(w):
    return w.amin().reshape(1), w.amax().reshape(1)


def by_block(n):
    def observe(w):
        b = w.reshape(w.shape[0] // n, n, w.shape[1] // n, n)
        return b.amin((1, 3)), b.amax((1, 3))
    return observe


def pack_words(codes, bits):
    """Codes down dimension 0, without gaps, the first in the lowest bits."""
    k, n = codes.shape
    stream = torch.zeros(k * bits // 32, n, dtype=torch.int64)
    for i in range(k):
        for b in range(bits):
            at = i * bits + b
            stream[at // 32] |= ((codes[i].long() >> b) & 1) << (at % 32)
    return torch.where(stream >= 2**31, stream - 2**32, stream).int()


def groups_of(w, size, bits, index=None):
    """Asymmetric codes [in, out], scales and zeros [groups, out]."""
    k = w.shape[1]
    index = torch.arange(k) // size if index is None else index
    g = int(index.max()) + 1
    scales, zeros, codes = torch.empty(g, len(w)).half(), torch.empty(g, len(w)).int(), torch.empty(k, len(w)).int()
    for i in range(g):
        part = w[:, index == i].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[i] = ((high - low) / (2**bits - 1)).half()
        # A zero point of 0 can't be stored by GPTQ's first version.
        zeros[i] = (-low / scales[i].float()).round().clamp(1, 2**bits - 1).int()
        codes[index == i] = ((part / scales[i].float()[:, None]).round() + zeros[i][:, None]).clamp(0, 2**bits - 1).int().T
    return codes, scales, zeros, index


def gptq(bits, size, v2=False, act_order=False):
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order, "sym": False,
              "checkpoint_format": "gptq_v2" if v2 else "gptq"}

    def pack(w):
        k = w.shape[1]
        index = (torch.randperm(k) // size) if act_order else None
        codes, scales, zeros, index = groups_of(w, size, bits, index)
        state = {"qweight": pack_words(codes, bits), "qzeros": pack_words((zeros - (0 if v2 else 1)).T, bits).T.contiguous(),
                 "scales": scales, "g_idx": index.int()}
        return state, (scales[index] * (codes - zeros[index])).T
    return config, pack


def awq(size):
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(x):
        out = torch.zeros(x.shape[0], x.shape[1] // 8, dtype=torch.int64)
        for i in range(8):
            out |= x[:, order[i]::8].long() << (4 * i)
        return torch.where(out >= 2**31, out - 2**32, out).int()

    def pack(w):
        codes, scales, zeros, index = groups_of(w, size, 4)
        return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}, (scales[index] * (codes - zeros[index])).T
    return config, pack


def fp8_blocks(n):
    config = {"quant_method": "fp8", "weight_block_size": [n, n], "activation_scheme": "dynamic"}

    def pack(w):
        scale = torch.maximum(*(x.abs() for x in by_block(n)(w.float()))) / 448
        wide = scale.repeat_interleave(n, 0).repeat_interleave(n, 1)
        q = (w.float() / wide).to(torch.float8_e4m3fn)
        return {"weight": q, "weight_scale_inv": scale}, q.float() * wide
    return config, pack


def four_bits(kind, nested):
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}

    def pack(w):
        q, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
        parts = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        return {"weight": q} | parts, bnb.dequantize_4bit(q, state)
    return config, pack


def eight_bits():
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}

    def pack(w):
        q, scb, _ = bnb.int8_vectorwise_quant(w.half())
        return {"weight": q, "SCB": scb}, bnb.int8_vectorwise_dequant(q, scb)
    return config, pack


INT, FLOAT, PACKED = IntQuantizationCompressor, FloatQuantizationCompressor, PackedQuantizationCompressor
PACKINGS = {
    "ct-w4a16": compressed(PACKED, by_group(32), num_bits=4, type="int", symmetric=True, strategy="group", group_size=32),
    "ct-w4a16-asym": compressed(PACKED, by_group(32), num_bits=4, type="int", symmetric=False, strategy="group", group_size=32),
    "ct-w8a16": compressed(PACKED, by_row, num_bits=8, type="int", symmetric=True, strategy="channel"),
    "ct-int8": compressed(INT, by_row, num_bits=8, type="int", symmetric=True, strategy="channel"),
    "ct-fp8-tensor": compressed(FLOAT, whole, num_bits=8, type="float", symmetric=True, strategy="tensor"),
    "ct-fp8-channel": compressed(FLOAT, by_row, num_bits=8, type="float", symmetric=True, strategy="channel"),
    "ct-fp8-block": compressed(FLOAT, by_block(32), num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[32, 32]),
    "gptq-2": gptq(2, 32),
    "gptq-3": gptq(3, 32),
    "gptq-4": gptq(4, 32),
    "gptq-4-act": gptq(4, 32, act_order=True),
    "gptq-4-v2": gptq(4, 32, v2=True),
    "gptq-8": gptq(8, 64),
    "awq": awq(32),
    "fp8-block": fp8_blocks(32),
    "nf4": four_bits("nf4", False),
    "nf4-nested": four_bits("nf4", True),
    "fp4": four_bits("fp4", False),
    "bnb-int8": eight_bits(),
}


def main():
    torch.set_num_threads(1)
    for name, (quantization, pack) in PACKINGS.items():
        torch.manual_seed(1)
        state = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN),
                 "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN), "model.layers.0.post_attention_layernorm.weight": torch.ones(HIDDEN)}
        state = {k: v.bfloat16() for k, v in state.items()}
        expected = {}
        for module, shape in LINEARS.items():
            parts, plain = pack((torch.randn(shape) * 0.05).bfloat16())
            at = f"model.layers.0.{module}"
            state |= {f"{at}.{k}": v.contiguous() for k, v in parts.items()}
            if module in WRITERS:
                expected[at + ".weight"] = plain.contiguous()
        out = HERE / name
        out.mkdir(exist_ok=True)
        save_file(state, out / "model.safetensors", {"format": "pt"})
        save_file(expected, out / "expected.safetensors")
        (out / "config.json").write_text(json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": FFN,
            "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": 128, "vocab_size": VOCAB, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "quantization_config": quantization}, indent=1) + "\n")
        print(name, sum(f.stat().st_size for f in out.iterdir()))


if __name__ == "__main__":
    main()
