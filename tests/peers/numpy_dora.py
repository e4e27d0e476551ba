#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""DoRA by its definition in numpy: what merge writes, what init writes as magnitudes, what is refused; and GPT-2's storage."""
import json
import os
import subprocess
import sys
import tempfile

from support import bf16, np, read_safetensors, run, tiny_adapter, tiny_llama, write_safetensors

program = sys.argv[1]


def row_norms(w):
    return np.linalg.norm(w, axis=1)


def put_bf16(path, tensors):
    header, at, blob = {}, 0, b""
    for n, w in tensors.items():
        part = (np.ascontiguousarray(w).view(np.uint32) >> 16).astype("<u2").tobytes()
        header[n] = {"dtype": "BF16", "shape": list(w.shape), "data_offsets": [at, at + len(part)]}
        at, blob = at + len(part), blob + part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    open(path, "wb").write(len(text).to_bytes(8, "little") + text + blob)


def refused(*args, parts=()):
    r = subprocess.run([program, *map(str, args)], capture_output=True, text=True)
    assert r.returncode == 1 and len(r.stderr.splitlines()) == 1 and all(p in r.stderr for p in parts), (args, r.returncode, r.stderr)


with tempfile.TemporaryDirectory() as d:
    rng = np.random.default_rng(3)
    W = tiny_llama(d + "/model")
    factors = tiny_adapter(d + "/plain", W, True)
    tensors = read_safetensors(d + "/plain/adapter_model.safetensors")
    config = json.load(open(d + "/plain/adapter_config.json"))
    magnitudes = {}
    for name, (s, a, b) in factors.items():
        w = W[name].astype(np.float64)
        along = w.T if "embed" in name else w  # of an embedding, the factors are those of the transposed table
        magnitudes[name] = (row_norms(along) * rng.uniform(0.7, 1.4, len(along))).astype(np.float32)

    def adapter(name, change=None, b_scale=1.0, of=magnitudes, **settings):
        t = {k: v * np.float32(b_scale) if "lora_B" in k or "embedding_B" in k else v for k, v in tensors.items()}
        for n, m in of.items():
            t[f"base_model.model.{n[:-7]}.lora_magnitude_vector"] = m
        if change:
            change(t)
        os.makedirs(d + "/" + name, exist_ok=True)
        write_safetensors(f"{d}/{name}/adapter_model.safetensors", t)
        json.dump({**config, "use_dora": True, **settings}, open(f"{d}/{name}/adapter_config.json", "w"))
        return d + "/" + name

    def expected(base, name, b_scale=1.0):
        """m·(W + s·B·A)/‖W + s·B·A‖ by rows"""
        s, a, b = factors[name]
        w = base[name].astype(np.float64)
        v = (w.T if "embed" in name else w) + s * b_scale * b @ a
        v = magnitudes[name].astype(np.float64)[:, None] * v / row_norms(v)[:, None]
        return v.T if "embed" in name else v

    # f32: to the rounding of the arithmetic (r products and the weight in f32, the rest in double)
    report = json.loads(run(program, "merge", d + "/model", adapter("dora"), "-o", d + "/merged", "--json"))
    got = read_safetensors(d + "/merged/model.safetensors")
    assert report["applied"] == len(factors)
    for name, w in W.items():
        if name not in factors:
            assert np.array_equal(got[name], w), name
            continue
        want = expected(W, name)
        assert np.abs(got[name] - want).max() <= 1e-5 * np.abs(want).max(), name
        entry = next(m for m in report["modules"] if m["name"] == name[:-7])
        intended, effective = want - w, got[name].astype(np.float64) - w
        assert abs(entry["intended_norm"] / np.linalg.norm(intended) - 1) < 1e-5 and entry["correlation"] > 1 - 1e-6, entry
    # bf16: the nearest ones, but where the arithmetic before the rounding decides
    half = {n: bf16(w) for n, w in W.items()}
    os.makedirs(d + "/half")
    put_bf16(d + "/half/model.safetensors", half)
    run(program, "merge", d + "/half", d + "/dora", "-o", d + "/half_merged")
    got = read_safetensors(d + "/half_merged/model.safetensors")
    for name in factors:
        want = expected(half, name)
        off = 1e-5 * np.abs(want).max()
        assert (bf16(want - off) <= got[name]).all() and (got[name] <= bf16(want + off)).all(), name

    # the limits are those of every merge: an update that bf16 rounds away is refused, reported by a dry run, forced by a flag
    for n in magnitudes:
        along = half[n].T if "embed" in n else half[n]
        magnitudes[n] = row_norms(along.astype(np.float64)).astype(np.float32)
    tiny = adapter("tiny", b_scale=1e-5)
    args = ("merge", d + "/half", tiny, "-o", d + "/tiny_merged")
    refused(*args, parts=["--allow-lossy", "correlate"])
    assert not os.path.exists(d + "/tiny_merged/model.safetensors")
    dry = json.loads(run(program, *args, "--dry-run", "--json"))
    assert dry["least_correlation"] < 0.9 and dry["lost"] > 0.5, dry
    assert json.loads(run(program, *args, "--allow-lossy", "--json"))["least_correlation"] == dry["least_correlation"]
    # what is not finite is refused when it is read, whatever reads it; a result out of the type's range when it is merged
    q = "model.layers.0.self_attn.q_proj"
    for bad in (np.nan, np.inf):
        wrong = adapter("wrong", of={**magnitudes, q + ".weight": np.where(np.arange(64) == 3, bad, magnitudes[q + ".weight"]).astype(np.float32)})
        refused("merge", d + "/model", wrong, "-o", d + "/bad", "--allow-lossy", parts=[q, "not finite"])
        refused("inspect", wrong, parts=[q, "not finite"])
    wrong = adapter("wrong", of={**magnitudes, q + ".weight": np.full(64, 3e38, np.float32)}, b_scale=1e-5)
    os.makedirs(d + "/f16")
    t16 = {n: w.astype(np.float16) for n, w in W.items()}
    header, at = {}, 0
    for n, w in t16.items():
        header[n] = {"dtype": "F16", "shape": list(w.shape), "data_offsets": [at, at + w.nbytes]}
        at += w.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    open(d + "/f16/model.safetensors", "wb").write(len(text).to_bytes(8, "little") + text + b"".join(w.tobytes() for w in t16.values()))
    refused("merge", d + "/f16", wrong, "-o", d + "/bad", "--allow-lossy", parts=[q, "not finite"])
    wrong = adapter("wrong", of={**magnitudes, q + ".weight": np.ones(63, np.float32)})
    refused("merge", d + "/model", wrong, "-o", d + "/bad", parts=[q, "63"])
    biased = adapter("biased", lambda t: t.update({f"base_model.model.{q}.lora_B.bias": np.full(64, np.nan, np.float32)}), lora_bias=True)
    refused("inspect", biased, parts=[q, "not finite"])
    assert not os.path.exists(d + "/bad/model.safetensors")

    # init --dora: magnitudes are the row norms of what the layer starts from, W or Q + s·B·A; their number counts
    for base_of, method, extra in [("model", "kaiming", []), ("model", "pissa", []), ("model", "loftq", ["--bits", 2]), ("half", "loftq", ["--bits", 2, "--dtype", "bf16"]),
                                   ("model", "qpissa", ["--bits", 3])]:
        out = f"{d}/init_{base_of}_{method}"
        args = ("init", method, d + "/" + base_of, "-o", out, "--rank", 4, "--alpha", 8, "--dora", "--targets", "q_proj,down_proj", "--json", *extra)
        promised = json.loads(run(program, *args, "--dry-run"))["parameters"]
        report = json.loads(run(program, *args))
        t = read_safetensors(out + "/adapter_model.safetensors")
        assert report["parameters"] == promised == sum(v.size for v in t.values()) == json.loads(run(program, "inspect", out, "--json"))["parameters"]
        base = read_safetensors((out + "/base" if method != "kaiming" else d + "/" + base_of) + "/model.safetensors")
        for key, a in t.items():
            if not key.endswith("lora_A.weight"):
                continue
            name = key[len("base_model.model.") : -len(".lora_A.weight")]
            start = base[name + ".weight"].astype(np.float64) + 2 * t[key.replace("lora_A", "lora_B")].astype(np.float64) @ a
            m = t[key.replace("lora_A.weight", "lora_magnitude_vector")]
            off = 2.0**-8 if base_of == "half" else 1e-5  # stored as the factors are
            assert np.abs(m / row_norms(start) - 1).max() <= off, (method, name)
            if method == "loftq":  # W's would be others
                source = W if base_of == "model" else half
                assert np.abs(m / row_norms(source[name + ".weight"]) - 1).max() > 3 * off, name

    # GPT-2: linear layers lie in x out, the table lies as every embedding does, whatever fan_in_fan_out says (as in PEFT)
    gpt = {"wte.weight": rng.standard_normal((50, 16)).astype(np.float32), "h.0.attn.c_attn.weight": rng.standard_normal((16, 48)).astype(np.float32)}
    os.makedirs(d + "/gpt")
    write_safetensors(d + "/gpt/model.safetensors", gpt)
    t = {"wte.lora_embedding_A": rng.standard_normal((2, 50)), "wte.lora_embedding_B": rng.standard_normal((16, 2)),
         "h.0.attn.c_attn.lora_A.weight": rng.standard_normal((2, 16)), "h.0.attn.c_attn.lora_B.weight": rng.standard_normal((48, 2))}
    t = {"base_model.model." + k: v.astype(np.float32) for k, v in t.items()}
    os.makedirs(d + "/gpt_adapter")
    write_safetensors(d + "/gpt_adapter/adapter_model.safetensors", t)
    json.dump({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}, open(d + "/gpt_adapter/adapter_config.json", "w"))
    run(program, "merge", d + "/gpt", d + "/gpt_adapter", "-o", d + "/gpt_merged")
    got = read_safetensors(d + "/gpt_merged/model.safetensors")
    v = list(t.values())
    assert np.allclose(got["wte.weight"], gpt["wte.weight"] + 1.5 * (v[1] @ v[0]).T, atol=1e-5)
    assert np.allclose(got["h.0.attn.c_attn.weight"], gpt["h.0.attn.c_attn.weight"] + 1.5 * (v[3] @ v[2]).T, atol=1e-5)
    run(program, "init", "gaussian", d + "/gpt", "-o", d + "/gpt_init", "--rank", 2, "--targets", "all", "--fan-in-fan-out")
    run(program, "merge", d + "/gpt", d + "/gpt_init", "-o", d + "/gpt_merged")
print("numpy agrees about DoRA")
