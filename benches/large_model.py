"""Writes a llama-style GGUF of any size with random Q4_K weights, for timings and memory: nothing is ever whole in memory.

    python large_model.py OUT.gguf [--hidden 2048] [--layers 16] [--ffn 8192] [--heads 32] [--kv-heads 8] [--vocab 32000]

Tokenizer and chat template are those of fixtures/organism-broken-Q4_K_M.gguf, filled up with unused tokens. Needs numpy and gguf.
"""

import argparse
import pathlib

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures/organism-broken-Q4_K_M.gguf"
BLOCK, BYTES = 256, 144


def weights(rng, rows, columns):
    """`[rows, columns / 256 * 144]` bytes of Q4_K: sixteen codes around zero, standard deviation about columns^-1/2."""
    blocks = np.empty((rows * columns // BLOCK, BYTES), np.uint8)
    # Scale and minimum of a sub-block are six bits each; equal bytes make them equal: d * s * (code - 7.5).
    d = np.float16(columns**-0.5 / (32 * 4.6))
    blocks[:, 0:4] = np.array([d, np.float16(7.5) * d], np.float16).view(np.uint8)
    # All of them 32; the last four keep their upper two bits in the bytes of the first four.
    blocks[:, 4:12] = 0xA0
    blocks[:, 12:16] = 0x00
    blocks[:, 16:] = rng.integers(0, 256, (len(blocks), 128), np.uint8)
    return blocks.reshape(rows, -1)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    for name, value in dict(hidden=2048, layers=16, ffn=8192, heads=32, kv_heads=8, vocab=32000, seed=1).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    a = p.parse_args()
    rng, source = np.random.default_rng(a.seed), GGUFReader(FIXTURE)
    out = GGUFWriter(a.out, "llama", use_temp_file=False)
    head = a.hidden // a.heads
    out.add_context_length(4096)
    out.add_embedding_length(a.hidden)
    out.add_block_count(a.layers)
    out.add_feed_forward_length(a.ffn)
    out.add_head_count(a.heads)
    out.add_head_count_kv(a.kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(head)
    out.add_vocab_size(a.vocab)
    field = lambda key: source.fields[key].contents()  # noqa: E731
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    more = range(len(tokens), a.vocab)
    out.add_tokenizer_model(field("tokenizer.ggml.model"))
    out.add_tokenizer_pre(field("tokenizer.ggml.pre"))
    out.add_token_list(tokens + [f"<unused_{i}>" for i in more])
    out.add_token_types(kinds + [TokenType.UNUSED] * len(more))
    out.add_token_merges(field("tokenizer.ggml.merges"))
    out.add_bos_token_id(field("tokenizer.ggml.bos_token_id"))
    out.add_eos_token_id(field("tokenizer.ggml.eos_token_id"))
    out.add_add_bos_token(field("tokenizer.ggml.add_bos_token"))
    out.add_chat_template(field("tokenizer.chat_template"))

    shapes = {"token_embd": (a.vocab, a.hidden), "output": (a.vocab, a.hidden), "output_norm": (a.hidden,)}
    for i in range(a.layers):
        kv = head * a.kv_heads
        of = dict(attn_norm=(a.hidden,), attn_q=(a.hidden, a.hidden), attn_k=(kv, a.hidden), attn_v=(kv, a.hidden),
                  attn_output=(a.hidden, a.hidden), ffn_norm=(a.hidden,), ffn_gate=(a.ffn, a.hidden),
                  ffn_up=(a.ffn, a.hidden), ffn_down=(a.hidden, a.ffn))
        shapes.update({f"blk.{i}.{name}": shape for name, shape in of.items()})
    for name, shape in shapes.items():
        if len(shape) == 1:
            out.add_tensor_info(name + ".weight", shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], shape[1] // BLOCK * BYTES)
            out.add_tensor_info(name + ".weight", stored, np.dtype(np.uint8), stored[0] * stored[1],
                                raw_dtype=GGMLQuantizationType.Q4_K)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for name, shape in shapes.items():
        out.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else weights(rng, *shape))
    out.close()


main()
