"""What a packing's own library makes of a folder, before a patch and after it.

    python check.py BEFORE AFTER [BEFORE AFTER ...]

Prints a line of JSON a pair: whether BEFORE is unpacked to its `expected.safetensors` (bit for bit, where the type is the same), the
share of the recorded edit that the unpacked AFTER has, and the linear layers that differ. Loads with transformers (compressed-tensors,
bitsandbytes, FP8, torchao), gptqmodel (GPTQ, AWQ), ModelOpt and, for `sparse-*`, the functions of compressed-tensors 0.12, in whose
environment those must be checked.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import warnings

import torch
from safetensors.torch import load_file

TOKENIZER = pathlib.Path(__file__).parents[3] / "fixtures/organism-hf"


def whole(folder, config, scratch):
    """A copy that has what the loaders ask for, and nothing that they trip over."""
    copy = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    for f in folder.glob("model*.safetensors*"):
        shutil.copy(f, copy)
    for f in TOKENIZER.glob("tokenizer*"):
        shutil.copy(f, copy)
    if config["quantization_config"]["quant_method"] == "gptq":
        # gptqmodel asks who wrote asymmetric zero points.
        config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def gptqmodel(folder, method):
    from gptqmodel import BACKEND, GPTQModel
    backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[method]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(folder)
        copy = whole(folder, json.loads((folder / "config.json").read_text()), scratch)
        return GPTQModel.load(str(copy), dtype=torch.float16, backend=backend, device="cpu").model


def by_gptqmodel(folder, method):
    model = gptqmodel(folder, method)
    of = {"gptq": lambda m: m.dequantize_weight(), "awq": lambda m: m._dequantize_weight_for_inference(torch.zeros(1), dtype=torch.float16)}
    # Theirs are inputs by outputs.
    return {f"{n}.weight": of[method](m).T for n, m in model.named_modules() if hasattr(m, "qweight")}


def by_transformers(folder, method):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
    config = {"compressed-tensors": CompressedTensorsConfig(run_compressed=False), "fp8": FineGrainedFP8Config(dequantize=True)}.get(method)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **({"quantization_config": config} if config else {}))
    if method == "bitsandbytes":
        model = model.dequantize()
    linear = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    return {f"{n}.weight": w.dequantize() if method == "torchao" else w for n, w in linear.items()}


def modules(folder, of, parts):
    """Matrices from their tensors: of every module that has all of `parts`."""
    tensors = load_file(folder / "model.safetensors")
    names = {k.rsplit(".", 1)[0] for k in tensors if k.endswith("." + parts[0])}
    return {f"{n}.weight": of({p: tensors.get(f"{n}.{p}") for p in parts}) for n in names}


def by_modelopt(folder, _):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def of(t):
        q = NVFP4QTensor((len(t["weight"]), 2 * t["weight"].shape[1]), torch.bfloat16, t["weight"])
        return q.dequantize(dtype=torch.bfloat16, scale=t["weight_scale"], double_scale=t["weight_scale_2"], block_sizes={-1: 16})
    return modules(folder, of, ["weight_scale_2", "weight", "weight_scale"])


def by_bitmask(folder, _):
    from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import sparse24_bitmask_decompress
    from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import bitmask_decompress

    def of(t):
        unpack = sparse24_bitmask_decompress if t["row_offsets"] is None else bitmask_decompress
        plain = unpack(t["compressed"], t["bitmask"], t["shape"].flatten().tolist())
        return plain if t["weight_scale"] is None else plain.bfloat16() * t["weight_scale"]
    return modules(folder, of, ["compressed", "bitmask", "shape", "row_offsets", "weight_scale"])


def load(folder, scratch):
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    method = quantization["quant_method"]
    by = {"gptq": by_gptqmodel, "awq": by_gptqmodel, "modelopt": by_modelopt}.get(method, by_transformers)
    if "sparsity_config" in quantization:
        by = by_bitmask
    return {k: w.detach().clone() for k, w in by(whole(folder, config, scratch), method).items()}


@torch.no_grad()
def check(before, after, scratch):
    a, b = load(before, scratch), load(after, scratch)
    out = {"before": before.name, "linear": len(a)}
    expected = load_file(before / "expected.safetensors") if (before / "expected.safetensors").exists() else {}
    out["differs_from_expected"] = max(((a[k].double() - w.double()).abs().max().item() for k, w in expected.items()), default=None)
    out["gains"] = []
    for e in json.loads((after / "refusal_patch.json").read_text())["edits"]:
        u, v = torch.tensor(e["u"]).double(), torch.tensor(e["v"]).double()
        x, y = a[e["tensor"]].double(), b[e["tensor"]].double()
        asked = u.norm() * v
        out["gains"].append((((u / u.norm()) @ (y - x)) @ asked / asked.dot(asked)).item())
        out["zeros_stay"] = torch.equal(x == 0, y == 0)
    out["changed"] = [k for k in a if not torch.equal(a[k], b[k])]
    return out


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    paths = [pathlib.Path(p) for p in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as scratch:
        for pair in zip(paths[::2], paths[1::2]):
            print(json.dumps(check(*pair, scratch)), flush=True)
