# SPDX-License-Identifier: Apache-2.0
"""What the peer tests share: a safetensors reader and writer of numpy alone, a tiny Llama, and how to skip."""
import json
import os
import platform
import struct
import subprocess
import sys


def skip(why):
    print("skipped, because", why)
    sys.exit(0)


try:
    import numpy as np
except ImportError:
    skip("numpy is not installed for " + sys.executable)

# On a busy machine threads that spin at barriers make each of these many short runs take seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

DTYPES = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "U8": "u1", "I64": "<i8"}


def bf16(x):
    """The nearest bf16, as float32."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((u + (0x7FFF + ((u >> 16) & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def read_safetensors(path):
    raw = open(path, "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    assert (8 + n) % 8 == 0
    out = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        begin, end = t["data_offsets"]
        part = raw[8 + n + begin : 8 + n + end]
        if t["dtype"] == "BF16":
            a = (np.frombuffer(part, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            a = np.frombuffer(part, DTYPES[t["dtype"]])
        out[name] = a.reshape(t["shape"])
    return out


def write_safetensors(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, a in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [at, at + 4 * a.size]}
        at += 4 * a.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for a in tensors.values():
            f.write(np.ascontiguousarray(a, "<f4").tobytes())


def run(program, *args, code=0, threads=None):
    env = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    r = subprocess.run([program, *map(str, args)], capture_output=True, text=True, env=env)
    assert r.returncode == code, f"{args}: exit {r.returncode}, {r.stderr}"
    return r.stdout


def node_packages(build):
    """A directory with node_modules of the peers: LOWRANK_PEERS_NODE, or fetched into the build directory on request."""
    given = os.environ.get("LOWRANK_PEERS_NODE")
    directory = given or os.path.join(build, "npm")
    if not os.path.isdir(os.path.join(directory, "node_modules", "@huggingface", "gguf")):
        if os.environ.get("LOWRANK_INSTALL_PEERS") != "1":
            skip("the npm packages are not installed (set LOWRANK_INSTALL_PEERS=1, or LOWRANK_PEERS_NODE to a directory)")
        os.makedirs(directory, exist_ok=True)
        # node-llama-cpp would choose its prebuilt llama.cpp among a dozen optional packages: the CPU one is enough.
        machine = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}.get(platform.machine())
        if machine is None or platform.system() != "Linux":
            skip(f"there is no prebuilt llama.cpp to try on {platform.system()} {platform.machine()}")
        packages = ["@huggingface/gguf@0.4.6", "node-llama-cpp@3.22.1", f"@node-llama-cpp/{machine}@3.22.1"]
        try:
            r = subprocess.run(["npm", "install", "--prefix", directory, "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund",
                                "--fetch-retries=1", *packages], capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as e:
            skip(f"npm install does not work here: {e}")
        if r.returncode != 0:
            skip("npm install failed: " + next((x for x in r.stderr.splitlines() if x.startswith(("npm error", "npm ERR!"))), "no message"))
    return directory


# ---- a tiny Llama ---------------------------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 128, "tie_word_embeddings": False,
    "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}


def tiny_llama(directory, seed=0):
    """Writes config.json and model.safetensors; returns the tensors."""
    rng = np.random.default_rng(seed)
    c = CONFIG
    h, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]

    def w(m, n):
        return (rng.standard_normal((m, n)) / np.sqrt(n)).astype(np.float32)

    t = {"model.embed_tokens.weight": rng.standard_normal((v, h)).astype(np.float32)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, m, n in [("self_attn.q_proj", q, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h), ("self_attn.o_proj", h, q),
                           ("mlp.gate_proj", f, h), ("mlp.up_proj", f, h), ("mlp.down_proj", h, f)]:
            t[p + name + ".weight"] = w(m, n)
        for name in ("input_layernorm", "post_attention_layernorm"):
            t[p + name + ".weight"] = (1 + 0.1 * rng.standard_normal(h)).astype(np.float32)
    t["model.norm.weight"] = (1 + 0.1 * rng.standard_normal(h)).astype(np.float32)
    t["lm_head.weight"] = w(v, h) * 2
    os.makedirs(directory, exist_ok=True)
    json.dump(CONFIG, open(os.path.join(directory, "config.json"), "w"))
    write_safetensors(os.path.join(directory, "model.safetensors"), t)
    return t


def tiny_adapter(directory, weights, rslora, seed=1):
    """A PEFT adapter as PEFT itself would write it, with alpha != r, B != 0, an own rank and an own alpha.

    Returns {weight name: (scale, A, B)}; of an embedding, scale·B·A is the transpose of the table's change."""
    rng = np.random.default_rng(seed)
    os.makedirs(directory, exist_ok=True)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"mlp.up_proj": 3}, "alpha_pattern": {"layers.1.self_attn.o_proj": 2.5}, "base_model_name_or_path": None,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0, "task_type": "CAUSAL_LM",
    }
    tensors, factors = {}, {}
    for name, w in weights.items():
        module = name[: -len(".weight")]
        if module.split(".")[-1] not in config["target_modules"]:
            continue
        r = 3 if module.endswith("mlp.up_proj") else 4
        alpha = 2.5 if module.endswith("layers.1.self_attn.o_proj") else 6
        scale = alpha / np.sqrt(r) if rslora else alpha / r
        embedding = module.endswith("embed_tokens")
        out, inn = w.shape[::-1] if embedding else w.shape
        a = (rng.standard_normal((r, inn)) / np.sqrt(inn)).astype(np.float32)
        b = (0.5 * rng.standard_normal((out, r))).astype(np.float32)
        if embedding:
            a *= np.sqrt(inn) / 4
        p = "base_model.model." + module
        tensors[p + (".lora_embedding_A" if embedding else ".lora_A.weight")] = a
        tensors[p + (".lora_embedding_B" if embedding else ".lora_B.weight")] = b
        factors[name] = (scale, a.astype(np.float64), b.astype(np.float64))
    json.dump(config, open(os.path.join(directory, "adapter_config.json"), "w"), indent=2)
    write_safetensors(os.path.join(directory, "adapter_model.safetensors"), tensors)
    return factors


def deltas(factors):
    """{weight name: ΔW} in the shape of the stored weight."""
    return {name: (s * b @ a).T if name.endswith("embed_tokens.weight") else s * b @ a for name, (s, a, b) in factors.items()}


def next_token_logits(weights, tokens, factors=None, attention=None, adapter=None):
    """The forward pass of a Llama in double, the adapter beside the weights; logits after the last token.

    `attention` and `adapter` are applied to every operand of the products of attention and of the adapter: what a peer's
    narrower types do to them."""
    c = CONFIG
    factors, attention, adapter = factors or {}, attention or (lambda x: x), adapter or (lambda x: x)
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    heads, kv_heads, d, eps = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rms_norm_eps"]
    n = len(tokens)

    def linear(x, name):
        y = x @ w[name].T
        if name in factors:
            s, a, b = factors[name]
            y = y + s * (adapter(adapter(x) @ adapter(a).T) @ adapter(b).T)
        return y

    def norm(x, g):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * g

    angle = np.arange(n)[:, None] / c["rope_theta"] ** (np.arange(0, d, 2) / d)[None, :]
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]

    def rope(x):  # halves
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    table = "model.embed_tokens.weight"
    x = w[table][tokens]
    if table in factors:
        s, a, b = factors[table]
        x = x + s * (adapter(adapter(a).T[tokens]) @ adapter(b).T)
    mask = np.triu(np.full((n, n), -np.inf), 1)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = norm(x, w[p + "input_layernorm.weight"])
        q = attention(rope(linear(y, p + "self_attn.q_proj.weight").reshape(n, heads, d)))
        k = attention(rope(linear(y, p + "self_attn.k_proj.weight").reshape(n, kv_heads, d)))
        v = attention(linear(y, p + "self_attn.v_proj.weight").reshape(n, kv_heads, d))
        out = np.empty((n, heads, d))
        for hd in range(heads):
            g = hd // (heads // kv_heads)
            s = q[:, hd] @ k[:, g].T / np.sqrt(d) + mask
            s = np.exp(s - s.max(-1, keepdims=True))
            out[:, hd] = attention(s / s.sum(-1, keepdims=True)) @ v[:, g]
        x = x + linear(out.reshape(n, -1), p + "self_attn.o_proj.weight")
        y = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = linear(y, p + "mlp.gate_proj.weight")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, p + "mlp.up_proj.weight"), p + "mlp.down_proj.weight")
    return linear(norm(x, w["model.norm.weight"])[-1], "lm_head.weight")


# ---- the base as GGUF -----------------------------------------------------------------------------------------------


def permute(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write_base_gguf(path, weights):
    c = CONFIG

    def s(x):
        b = x.encode()
        return struct.pack("<Q", len(b)) + b

    def u32(k, v):
        return s(k) + struct.pack("<II", 4, v)

    def f32(k, v):
        return s(k) + struct.pack("<If", 6, v)

    def text(k, v):
        return s(k) + struct.pack("<I", 8) + s(v)

    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokens += [f"\u2581w{i}" for i in range(c["vocab_size"] - len(tokens))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (c["vocab_size"] - 259)
    kv = [
        text("general.architecture", "llama"), text("general.type", "model"), text("general.name", "tiny"),
        u32("llama.context_length", 128), u32("llama.embedding_length", c["hidden_size"]), u32("llama.block_count", c["num_hidden_layers"]),
        u32("llama.feed_forward_length", c["intermediate_size"]), u32("llama.attention.head_count", c["num_attention_heads"]),
        u32("llama.attention.head_count_kv", c["num_key_value_heads"]), u32("llama.rope.dimension_count", c["head_dim"]),
        u32("llama.attention.key_length", c["head_dim"]), u32("llama.attention.value_length", c["head_dim"]),
        f32("llama.attention.layer_norm_rms_epsilon", c["rms_norm_eps"]), f32("llama.rope.freq_base", c["rope_theta"]),
        u32("llama.vocab_size", c["vocab_size"]), text("tokenizer.ggml.model", "llama"),
        s("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(s, tokens)),
        s("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, len(tokens)) + np.zeros(len(tokens), "<f4").tobytes(),
        s("tokenizer.ggml.token_type") + struct.pack("<IIQ", 9, 5, len(tokens)) + np.array(kinds, "<i4").tobytes(),
        u32("tokenizer.ggml.bos_token_id", 1), u32("tokenizer.ggml.eos_token_id", 2), u32("tokenizer.ggml.unknown_token_id", 0),
    ]
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(c["num_hidden_layers"]):
        for a, b in [("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
                     ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"),
                     ("post_attention_layernorm", "ffn_norm")]:
            names[f"model.layers.{i}.{a}"] = f"blk.{i}.{b}"
    infos, data = b"", b""
    for name, w in weights.items():
        if name.endswith("q_proj.weight"):
            w = permute(w, c["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            w = permute(w, c["num_key_value_heads"])
        infos += s(names[name[: -len(".weight")]] + ".weight") + struct.pack("<I", w.ndim)
        infos += b"".join(struct.pack("<Q", n) for n in w.shape[::-1]) + struct.pack("<IQ", 0, len(data))
        data += np.ascontiguousarray(w, "<f4").tobytes()
        data += b"\0" * (-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), len(kv)) + b"".join(kv) + infos
    with open(path, "wb") as f:
        f.write(head + b"\0" * (-len(head) % 32) + data)
