#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with LLaMA-2-7B's names and shapes (or a 1B model's), bf16, sharded, for timing the `lowrank` program. Needs numpy only.

    make_checkpoint.py DIR                 # 13.5 GB, 3 shards
    make_checkpoint.py DIR --shape 1b      # 2.2 GB: width 2048, 16 layers, 4 query heads a key-value head
    make_checkpoint.py DIR --scale 8       # every width an eighth, 4 layers
    make_checkpoint.py DIR --tuned OTHER   # OTHER: the same model after a pretended fine-tune of rank 8 on every matrix

Weights are a decaying spectrum over noise, 0.02·(N(0,1) + Σ_{k≤64} √m·k^-0.7·u_k·v_kᵀ) for m×n, so that a truncated SVD has
something to find and something to fight. The noise is drawn from one pool at random offsets: every matrix is independent
noise to any algorithm here, and generating stays at disk speed.
"""
import argparse
import json
import os
import struct

import numpy as np


# hidden, inner, vocabulary, layers, query heads, key-value heads
SHAPES = {"7b": (4096, 11008, 32000, 32, 32, 32), "1b": (2048, 8192, 32000, 16, 32, 8)}


def tensors(scale, shape="7b"):
    hidden, inner, vocab = (x // scale for x in SHAPES[shape][:3])
    layers = SHAPES[shape][3] if scale == 1 else 4
    kv = hidden * SHAPES[shape][5] // SHAPES[shape][4]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (hidden,)
        yield p + "mlp.down_proj.weight", (hidden, inner)
        yield p + "mlp.gate_proj.weight", (inner, hidden)
        yield p + "mlp.up_proj.weight", (inner, hidden)
        yield p + "post_attention_layernorm.weight", (hidden,)
        for q in "kqvo":
            yield p + f"self_attn.{q}_proj.weight", (kv if q in "kv" else hidden, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def bf16(x):
    """Round to nearest even, as uint16."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((u + (0x7FFF + ((u >> 16) & 1))) >> 16).astype(np.uint16)


class Weights:
    def __init__(self, seed, pool=1 << 26):
        self.rng = np.random.default_rng(seed)
        self.pool = self.rng.standard_normal(pool, dtype=np.float32)

    def orthonormal(self, n, k):
        return np.linalg.qr(self.rng.standard_normal((n, k)).astype(np.float32))[0]

    def matrix(self, shape, factors):
        if len(shape) == 1:
            return np.ones(shape, np.float32), None
        m, n = shape
        w = np.empty(m * n, np.float32)
        at = 0
        while at < w.size:
            start = int(self.rng.integers(0, self.pool.size // 2))
            count = min(w.size - at, self.pool.size - start)
            w[at : at + count] = self.pool[start : start + count]
            at += count
        w = w.reshape(shape)
        k = min(64, m, n)
        sigma = np.sqrt(m) * np.arange(1, k + 1, dtype=np.float32) ** -0.7
        w += (self.orthonormal(m, k) * sigma) @ self.orthonormal(n, k).T
        w *= 0.02
        if not factors:
            return w, None
        r = min(8, m, n)
        return w, (self.orthonormal(m, r) * np.linspace(2, 0.5, r, dtype=np.float32)) @ self.orthonormal(n, r).T


def write_shard(path, group, weights, tuned):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in group:
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    files = [open(p, "wb") for p in ([path[0]] + ([path[1]] if tuned else []))]
    for f in files:
        f.write(struct.pack("<Q", len(text)) + text)
    for name, shape in group:
        w, delta = weights.matrix(shape, tuned)
        files[0].write(bf16(w).tobytes())
        if tuned:
            files[1].write(bf16(w if delta is None else w + delta).tobytes())
    for f in files:
        f.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--scale", type=int, default=1, help="divide every width by this (1, 2, 4, ... 32)")
    parser.add_argument("--shard-bytes", type=float, default=5e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", metavar="DIR", help="also write the tuned model there")
    o = parser.parse_args()
    directories = [o.directory] + ([o.tuned] if o.tuned else [])
    for d in directories:
        os.makedirs(d, exist_ok=True)
    groups, size = [[]], 0
    for name, shape in tensors(o.scale, o.shape):
        n = 2 * int(np.prod(shape))
        if size + n > o.shard_bytes and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += n
    weights = Weights(o.seed, 1 << (26 if o.scale == 1 else 22))
    where, total = {}, 0
    for i, group in enumerate(groups):
        name = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        write_shard([os.path.join(d, name) for d in directories], group, weights, o.tuned is not None)
        for tensor, shape in group:
            where[tensor] = name
            total += 2 * int(np.prod(shape))
        print(name, len(group), "tensors", flush=True)
    hidden, inner, vocab, layers, heads, kv_heads = SHAPES[o.shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": vocab // o.scale,
        "hidden_size": hidden // o.scale, "intermediate_size": inner // o.scale,
        "num_hidden_layers": layers if o.scale == 1 else 4, "num_attention_heads": max(1, heads // o.scale),
        "num_key_value_heads": max(1, kv_heads // o.scale), "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }
    for d in directories:
        with open(os.path.join(d, "config.json"), "w") as f:
            json.dump(config, f, indent=2)
        if len(groups) > 1:
            with open(os.path.join(d, "model.safetensors.index.json"), "w") as f:
                json.dump({"metadata": {"total_size": total}, "weight_map": where}, f, indent=2)


if __name__ == "__main__":
    main()
