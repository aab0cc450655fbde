"""Writes the packings of pruned matrices, which compressed-tensors had until 0.12.

    pip install torch safetensors compressed-tensors==0.12.2
    python make_sparse.py
"""

import torch
from common import write
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskTensor, get_24_bytemasks
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor


def bitmask(two_of_four, float8=False):
    config = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "float-quantized" if float8 else "dense",
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}} if float8 else {},
              "sparsity_config": {"format": "sparse-24-bitmask" if two_of_four else "sparse-bitmask", "targets": ["Linear"],
                                  "sparsity_structure": "2:4" if two_of_four else "unstructured"}}

    def pack(w):
        w = w * (get_24_bytemasks(w) if two_of_four else w.abs() > w.abs().float().quantile(0.6))
        parts = {}
        if float8:
            parts["weight_scale"] = (w.abs().amax(1, keepdim=True).float() / 448).bfloat16()
            w = (w.float() / parts["weight_scale"].float()).to(torch.float8_e4m3fn)
        packed = (Sparse24BitMaskTensor if two_of_four else BitmaskTensor).from_dense(w)
        parts |= {k.removeprefix("m."): v for k, v in packed.dict("m").items()}
        plain = packed.decompress()
        return parts, plain.bfloat16() * parts["weight_scale"] if float8 else plain
    return config, pack


for name, of in {"ct-sparse": bitmask(False), "ct-sparse-24": bitmask(True), "ct-sparse-24-fp8": bitmask(True, True)}.items():
    write(name, *of)
