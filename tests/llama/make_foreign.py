#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes fixtures/foreign_*: checkpoints as others write them, and the logits numpy computes from the stored weights in double.

    /usr/bin/python3 make_foreign.py          (numpy)

foreign_bf16   three shards and an index, bf16, grouped queries, Llama 3.1's positions, keys the library does not know
foreign_f16    one file, f16, the head tied to the embedding, linear positions, head_dim left to its default

Nothing here is shared with the C++ side: the file format, the roundings and the forward pass are written again.
"""
import json
import os
import struct

import numpy as np

TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [0, 10, 7, 8, 8, 2, 9, 10, 4, 1]]


def to_bf16(x):
    """Nearest, ties to even: the bits, and the value they stand for."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    high = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return high.tobytes(), (high.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_f16(x):
    half = np.asarray(x).astype("<f2")
    return half.tobytes(), half.astype(np.float64)


def write_file(path, tensors, dtype):
    """tensors: name -> (shape, bytes)."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(data for _, data in tensors.values()))


def shapes(c):
    d, f, hd = c["hidden_size"], c["intermediate_size"], c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    yield "model.embed_tokens", (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, shape in [("input_layernorm", (d,)), ("mlp.down_proj", (d, f)), ("mlp.gate_proj", (f, d)), ("mlp.up_proj", (f, d)),
                            ("post_attention_layernorm", (d,)), ("self_attn.k_proj", (kv, d)), ("self_attn.o_proj", (d, q)),
                            ("self_attn.q_proj", (q, d)), ("self_attn.v_proj", (kv, d))]:
            yield p + name, shape
    yield "model.norm", (d,)
    if not c.get("tie_word_embeddings"):
        yield "lm_head", (c["vocab_size"], d)


def frequencies(c, hd):
    f = c["rope_theta"] ** (-np.arange(0, hd, 2) / hd)
    s = c["rope_scaling"]
    if s.get("rope_type", s.get("type")) == "linear":
        return f / s["factor"]
    turns = s["original_max_position_embeddings"] * f / (2 * np.pi)
    keep = np.clip((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"]), 0, 1)
    assert keep.max() == 1 and keep.min() == 0 and ((keep > 0) & (keep < 1)).any()
    return f * (keep + (1 - keep) / s["factor"])


def logits(c, w, tokens):
    """Position by position and head by head, as one would say it."""
    heads, groups = c["num_attention_heads"], c["num_attention_heads"] // c["num_key_value_heads"]
    hd = c.get("head_dim", c["hidden_size"] // heads)
    turn = frequencies(c, hd)

    def norm(x, name):
        return np.array([row / np.sqrt(np.mean(row * row) + c["rms_norm_eps"]) * w[name] for row in x])

    def rotated(x, position):  # one head's vector: pairs (i, i + hd/2) as complex numbers
        z = (x[: hd // 2] + 1j * x[hd // 2 :]) * np.exp(1j * position * turn)
        return np.concatenate([z.real, z.imag])

    x = np.array([w["model.embed_tokens"][t] for t in tokens])
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, p + "input_layernorm")
        q, k, v = (h @ w[p + f"self_attn.{n}_proj"].T for n in "qkv")
        out = np.zeros((len(tokens), heads * hd))
        for t in range(len(tokens)):
            for head in range(heads):
                kv = slice(head // groups * hd, (head // groups + 1) * hd)
                query = rotated(q[t, head * hd : (head + 1) * hd], t)
                scores = np.array([query @ rotated(k[s, kv], s) for s in range(t + 1)]) / np.sqrt(hd)
                p_ = np.exp(scores - scores.max())
                out[t, head * hd : (head + 1) * hd] = (p_ / p_.sum()) @ v[: t + 1, kv]
        x = x + out @ w[p + "self_attn.o_proj"].T
        h = norm(x, p + "post_attention_layernorm")
        gate = h @ w[p + "mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "mlp.up_proj"].T)) @ w[p + "mlp.down_proj"].T
    return norm(x, "model.norm") @ w["model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"].T


def make(directory, config, dtype, shards):
    os.makedirs(directory, exist_ok=True)
    rng = np.random.default_rng(7)
    stored, w = {}, {}
    for name, shape in shapes(config):
        x = 1 + 0.2 * rng.standard_normal(shape) if len(shape) == 1 else rng.standard_normal(shape) / np.sqrt(shape[1]) * 1.5
        data, w[name] = (to_bf16 if dtype == "BF16" else to_f16)(x)
        stored[name + ".weight"] = (shape, data)
    with open(os.path.join(directory, "config.json"), "w", encoding="ascii") as f:
        json.dump(config, f, indent=2)
    names = list(stored)
    if shards == 1:
        write_file(os.path.join(directory, "model.safetensors"), stored, dtype)
    else:
        where = {}
        for s in range(shards):
            file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
            part = names[s::shards]  # dealt out, so that every layer lies in several shards
            write_file(os.path.join(directory, file), {n: stored[n] for n in part}, dtype)
            where.update({n: file for n in part})
        total = sum(len(data) for _, data in stored.values())
        with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="ascii") as f:
            json.dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, f, indent=2)
    with open(os.path.join(directory, "logits.csv"), "w", encoding="ascii") as f:
        for tokens in TOKENS:
            for token, row in zip(tokens, logits(config, w, tokens)):
                f.write(",".join([str(token)] + [f"{x:.17g}" for x in row]) + "\n")


if __name__ == "__main__":
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")
    common = {"model_type": "llama", "vocab_size": 11, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2,
              "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    make(os.path.join(here, "foreign_bf16"), {
        "_name_or_path": "somebody/model", "architectures": ["LlamaForCausalLM"], **common, "head_dim": 8, "bos_token_id": 1,
        "eos_token_id": [2, 7], "initializer_range": 0.02, "max_position_embeddings": 131072, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 100,
                         "rope_type": "llama3"},
        "rope_theta": 100.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
    }, "BF16", 3)
    make(os.path.join(here, "foreign_f16"), {
        "architectures": ["LlamaForCausalLM"], **common, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 50.0, "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }, "F16", 1)
