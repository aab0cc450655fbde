"""Writes a small random llama in every packing, and what its two writers are when they are unpacked.

    pip install torch transformers compressed-tensors bitsandbytes safetensors torchao nvidia-modelopt
    python make.py [NAME ...]         (make_sparse.py: what an older compressed-tensors wrote)

compressed-tensors, bitsandbytes, ModelOpt and torchao pack and unpack for themselves. GPTQ, AWQ and FP8 blocks are written and
unpacked here by the formulas of AutoGPTQ (qlinear_cuda_old.py), AutoAWQ (packing_utils.py) and DeepSeek-V3 (fp8_cast_bf16.py): their
quantizers ask for a GPU. gpt-oss' experts are random codes, unpacked by transformers. `expected.safetensors` holds the unpacked
writers in the type in which the library computes them.
"""

import json
import sys

import bitsandbytes.functional as bnb
import torch
from common import LLAMA, by_group, by_row, save, write
from compressed_tensors.compressors import (
    FloatQuantizationCompressor, IntQuantizationCompressor, MXFP4PackedCompressor, MXFP8QuantizationCompressor,
    NVFP4PackedCompressor, PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam


def compressed(compressor, observe, **args):
    """A scheme of compressed-tensors; `observe` gives the (least, largest) weight of each scale."""
    qargs = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=qargs)
    config = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"],
              "format": {PackedQuantizationCompressor: "pack-quantized", IntQuantizationCompressor: "int-quantized",
                         FloatQuantizationCompressor: "float-quantized", NVFP4PackedCompressor: "nvfp4-pack-quantized",
                         MXFP4PackedCompressor: "mxfp4-pack-quantized", MXFP8QuantizationCompressor: "mxfp8-quantized"}[compressor],
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(qargs.model_dump_json(exclude_none=True))}}}

    def pack(w):
        low, high = observe(w)
        whole_scale = {}
        if qargs.strategy == "tensor_group":
            whole_scale = {"weight_global_scale": generate_gparam(low.float().amin(), high.float().amax())}
        scale, zero = calculate_qparams(low, high, qargs, *whole_scale.values())
        state = compressor.compress({"weight": w, "weight_scale": scale.to(w.dtype), "weight_zero_point": zero} | whole_scale, scheme)
        plain = compressor.decompress(dict(state), scheme)["weight"]
        return {k: v for k, v in state.items() if v is not None}, plain
    return config, pack


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


def modelopt():
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "kv_cache_scheme": None,
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}}}

    def pack(w):
        q, scale, second = NVFP4QTensor.quantize(w.clone(), 16)
        plain = q.dequantize(dtype=w.dtype, scale=scale, double_scale=second, block_sizes={-1: 16})
        return {"weight": q._quantized_data, "weight_scale": scale, "weight_scale_2": second}, plain
    return config, pack


def torchao(make):
    """`make` gives torchao's configuration; the tensors' names are those under which transformers saves them."""
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from transformers import TorchAoConfig
    kind = make(quantization)

    def pack(w):
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        linear.weight.data = w
        quantization.quantize_(linear, kind)
        parts, metadata = flatten_tensor_state_dict({"m.weight": linear.weight.data})
        return {k.removeprefix("m."): v for k, v in parts.items()}, linear.weight.dequantize(), metadata["m.weight"]
    return TorchAoConfig(kind).to_dict(), pack


def gpt_oss():
    """Two experts of gpt-oss, for the decoder of their matrices alone."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    torch.manual_seed(1)
    at = "model.layers.0.mlp.experts."
    state, expected = {}, {}
    for name, rows, cols in (("gate_up_proj", 128, 64), ("down_proj", 64, 96)):
        blocks = torch.randint(0, 256, (2, rows, cols // 32, 16), dtype=torch.uint8)
        scales = torch.randint(112, 124, (2, rows, cols // 32), dtype=torch.uint8)
        state |= {f"{at}{name}_blocks": blocks, f"{at}{name}_scales": scales}
        expected[at + name] = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    save("gpt-oss", LLAMA | config, state, expected)


INT, FLOAT, PACKED = IntQuantizationCompressor, FloatQuantizationCompressor, PackedQuantizationCompressor
PACKINGS = {
    "ct-w4a16": lambda: compressed(PACKED, by_group(32), num_bits=4, type="int", symmetric=True, strategy="group", group_size=32),
    "ct-w4a16-asym": lambda: compressed(PACKED, by_group(32), num_bits=4, type="int", symmetric=False, strategy="group", group_size=32),
    "ct-w8a16": lambda: compressed(PACKED, by_row, num_bits=8, type="int", symmetric=True, strategy="channel"),
    "ct-int8": lambda: compressed(INT, by_row, num_bits=8, type="int", symmetric=True, strategy="channel"),
    "ct-fp8-tensor": lambda: compressed(FLOAT, whole, num_bits=8, type="float", symmetric=True, strategy="tensor"),
    "ct-fp8-channel": lambda: compressed(FLOAT, by_row, num_bits=8, type="float", symmetric=True, strategy="channel"),
    "ct-fp8-block": lambda: compressed(FLOAT, by_block(32), num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[32, 32]),
    "gptq-2": lambda: gptq(2, 32),
    "gptq-3": lambda: gptq(3, 32),
    "gptq-4": lambda: gptq(4, 32),
    "gptq-4-act": lambda: gptq(4, 32, act_order=True),
    "gptq-4-v2": lambda: gptq(4, 32, v2=True),
    "gptq-8": lambda: gptq(8, 64),
    "awq": lambda: awq(32),
    "fp8-block": lambda: fp8_blocks(32),
    "nf4": lambda: four_bits("nf4", False),
    "nf4-nested": lambda: four_bits("nf4", True),
    "fp4": lambda: four_bits("fp4", False),
    "bnb-int8": lambda: eight_bits(),
    "ct-nvfp4": lambda: compressed(NVFP4PackedCompressor, by_group(16), num_bits=4, type="float", symmetric=True, strategy="tensor_group",
                                   group_size=16, scale_dtype="torch.float8_e4m3fn"),
    "ct-mxfp4": lambda: compressed(MXFP4PackedCompressor, by_group(32), num_bits=4, type="float", symmetric=True, strategy="group",
                                   group_size=32, scale_dtype="torch.uint8"),
    "ct-mxfp8": lambda: compressed(MXFP8QuantizationCompressor, by_group(32), num_bits=8, type="float", symmetric=True, strategy="group",
                                   group_size=32, scale_dtype="torch.uint8"),
    "modelopt-nvfp4": modelopt,
    "ao-int8": lambda: torchao(lambda q: q.Int8WeightOnlyConfig(version=2)),
    "ao-fp8": lambda: torchao(lambda q: q.Float8WeightOnlyConfig(version=2)),
    "ao-int4-unpacked": lambda: torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32), version=2)),
}


def main():
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [*PACKINGS, "gpt-oss"]
    for name in wanted:
        if name == "gpt-oss":
            gpt_oss()
        else:
            write(name, *PACKINGS[name]())


if __name__ == "__main__":
    main()
