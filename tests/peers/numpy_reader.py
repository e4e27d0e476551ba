#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""numpy alone reads what the program writes, and finds the arithmetic right: init, merge, extract, resize, undo, npz."""
import json
import os
import subprocess
import sys
import tempfile

from support import bf16, deltas, np, read_safetensors, run, tiny_adapter, tiny_llama, write_safetensors

program = sys.argv[1]
here = os.path.dirname(os.path.abspath(__file__))


def factors(directory):
    t = read_safetensors(os.path.join(directory, "adapter_model.safetensors"))
    out = {}
    for name, a in t.items():
        if name.endswith(".lora_A.weight"):
            module = name[len("base_model.model.") : -len(".lora_A.weight")]
            out[module] = (a.astype(np.float64), t[name.replace("lora_A", "lora_B")].astype(np.float64))
    return out


def relative(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


with tempfile.TemporaryDirectory() as d:
    # A bf16 checkpoint in shards: everything but the targets is copied, base + B·A is the weight up to bf16's rounding.
    subprocess.run([sys.executable, os.path.join(here, "..", "..", "benchmarks", "make_checkpoint.py"), d + "/model", "--scale", "32",
                    "--shard-bytes", "3e5", "--tuned", d + "/tuned"], check=True, capture_output=True)
    index = json.load(open(d + "/model/model.safetensors.index.json"))["weight_map"]
    shards = sorted(set(index.values()))
    assert len(shards) > 2

    def load(directory):
        return {k: v for s in shards for k, v in read_safetensors(os.path.join(directory, s)).items()}

    W, tuned = load(d + "/model"), load(d + "/tuned")
    for method, extra in [("pissa", []), ("pissa", ["--dtype", "bf16"]), ("olora", []), ("milora", []), ("loftq", ["--bits", "4"]), ("qpissa", ["--bits", "3"])]:
        out = f"{d}/{method}{len(extra)}"
        report = json.loads(run(program, "init", method, d + "/model", "-o", out, "--rank", 8, "--alpha", 20, "--seed", 3, "--json", *extra))
        assert report["applied"] == 28, report["applied"]
        assert json.load(open(out + "/base/model.safetensors.index.json"))["weight_map"] == index
        base, f = load(out + "/base"), factors(out)
        config = json.load(open(out + "/adapter_config.json"))
        assert config["r"] == 8 and config["lora_alpha"] == 20 and config["init_lora_weights"] is True
        assert sorted(config["target_modules"]) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert list(base) == list(W)
        adapted = 0
        for name, w in W.items():
            if name[:-7] not in f:
                assert np.array_equal(base[name], w), name
                continue
            adapted += 1
            a, b = f[name[:-7]]
            whole = base[name] + 20 / 8 * (b @ a)
            if method in ("loftq", "qpissa"):
                entry = next(m for m in report["modules"] if m["name"] == name[:-7])
                # what is on disk is off by the reported error, and by the rounding of the dequantised base to bf16
                slack = 2.0**-8 * np.linalg.norm(base[name])
                assert abs(np.linalg.norm(whole - w) - entry["error"]) <= slack, name
                assert entry["error"] <= entry["plain_quantisation_error"] * (1 + 1e-6)
            else:
                assert np.abs(whole - w).max() <= 2.0**-8 * np.abs(base[name]).max(), name
            if method == "pissa":  # the factors hold the leading singular values, as LAPACK finds them
                s = np.linalg.svd(w.astype(np.float64), compute_uv=False)[:8]
                captured = np.linalg.svd(20 / 8 * (b @ a), compute_uv=False)[:8]
                assert (s**2).sum() - (captured**2).sum() <= (1e-4 if not extra else 2e-2) * (s**2).sum(), name
        assert adapted == 28
    # the same seed gives the same bytes
    run(program, "init", "pissa", d + "/model", "-o", d + "/again", "--rank", 8, "--alpha", 20, "--seed", 3)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first = open(d + "/pissa0/" + name, "rb").read()
        assert first.replace(b"/pissa0/", b"/again/") == open(d + "/again/" + name, "rb").read(), name

    # extract finds the rank-8 update of the pretended fine-tune; merging it gives the tuned model up to bf16's rounding
    report = json.loads(run(program, "extract", d + "/model", d + "/tuned", "-o", d + "/extracted", "--rank", 8, "--json"))
    assert report["relative_error"] < 0.1, report["relative_error"]
    for module, (a, b) in factors(d + "/extracted").items():
        assert relative(b @ a, tuned[module + ".weight"].astype(np.float64) - W[module + ".weight"]) < 0.15, module
    run(program, "merge", d + "/model", d + "/extracted", "-o", d + "/merged")
    merged = load(d + "/merged")
    for module, (a, b) in factors(d + "/extracted").items():
        # The program sums in f32 and rounds once to bf16. A sum of r products and the weight, in whatever order, is off by at most
        # (r + 2) roundings of the sum of magnitudes; rounding is monotone, so the result lies between the rounded ends.
        w = W[module + ".weight"].astype(np.float64)
        off = (len(a) + 2) * 2.0**-24 * (np.abs(w) + np.abs(b) @ np.abs(a))
        got = merged[module + ".weight"]
        assert (bf16(w + b @ a - off) <= got).all() and (got <= bf16(w + b @ a + off)).all(), module
    for threads in (1, 2, 3):
        again = d + f"/merged{threads}"
        run(program, "merge", d + "/model", d + "/extracted", "-o", again, threads=threads)
        for shard in shards:
            assert open(d + "/merged/" + shard, "rb").read() == open(again + "/" + shard, "rb").read(), (threads, shard)

    # resize and combine against numpy's SVD
    run(program, "resize", d + "/extracted", "-o", d + "/small", "--rank", 3)
    run(program, "combine", d + "/extracted", d + "/small", "-o", d + "/both", "--weights", "0.5,2", "--method", "cat")
    small, both = factors(d + "/small"), factors(d + "/both")
    config = json.load(open(d + "/small/adapter_config.json"))
    for module, (a, b) in factors(d + "/extracted").items():
        u, s, vt = np.linalg.svd(b @ a)
        sa, sb = small[module]
        scale = config["lora_alpha"] / config["r"]
        assert relative(scale * sb @ sa, (u[:, :3] * s[:3]) @ vt[:3]) < 1e-5, module
        ca, cb = both[module]
        assert relative(cb @ ca, 0.5 * b @ a + 2 * scale * sb @ sa) < 1e-5, module

    # undo: a "trained" adapter on the residual base becomes one on the original base
    rng = np.random.default_rng(0)
    os.makedirs(d + "/trained")
    t = read_safetensors(d + "/pissa0/adapter_model.safetensors")
    write_safetensors(d + "/trained/adapter_model.safetensors", {k: v + 0.01 * rng.standard_normal(v.shape).astype(np.float32) for k, v in t.items()})
    open(d + "/trained/adapter_config.json", "w").write(open(d + "/pissa0/adapter_config.json").read())
    run(program, "undo", d + "/trained", "--initial", d + "/pissa0", "-o", d + "/undone")
    f0, f1, config = factors(d + "/pissa0"), factors(d + "/trained"), json.load(open(d + "/undone/adapter_config.json"))
    for module, (a, b) in factors(d + "/undone").items():
        want = 20 / 8 * (f1[module][1] @ f1[module][0] - f0[module][1] @ f0[module][0])
        assert relative(config["lora_alpha"] / config["r"] * b @ a, want) < 1e-4, module

    # npz
    run(program, "convert", d + "/extracted", "--to", "npz", "-o", d + "/x.npz")
    with np.load(d + "/x.npz") as z:
        for module, (a, b) in factors(d + "/extracted").items():
            assert np.array_equal(z[module + ".lora_A"], a) and np.array_equal(z[module + ".lora_B"], b)
            assert z[module + ".scale"].shape == (1,)

    # adapters with embeddings, patterns and both scalings merge as PEFT defines them
    for rslora in (False, True):
        weights = tiny_llama(d + "/tiny")
        changes = deltas(tiny_adapter(d + "/tiny_adapter", weights, rslora))
        run(program, "merge", d + "/tiny", d + "/tiny_adapter", "-o", d + "/tiny_merged")
        got = read_safetensors(d + "/tiny_merged/model.safetensors")
        for name, w in weights.items():
            assert np.allclose(got[name], w + changes.get(name, 0), rtol=1e-5, atol=1e-5), name

    # exit codes: 1 with one line for wrong input, 2 for usage
    for args, code, part in [
        (["inspect", d + "/nowhere"], 1, "nowhere"), (["merge", d + "/tiny", d + "/extracted", "-o", d + "/bad"], 1, "adapter modules match"),
        (["init", "pissa", d + "/model", "-o", d + "/bad", "--targets", "nothing_like_it"], 1, "nothing_like_it"),
        (["init", "pissa", d + "/model", "-o", d + "/bad", "--rank", "4000"], 1, "rank"), (["init", "nonsense", d + "/model", "-o", d + "/bad"], 2, "nonsense"),
        (["merge", d + "/model", d + "/extracted", "-o", d + "/model"], 1, "both input and output"), (["frobnicate"], 2, ""), (["init", "loftq", d + "/model", "-o", d + "/bad", "--block-size", "0"], 2, "block-size"),
        (["init", "loftq", d + "/model", "-o", d + "/bad", "--block-size", "48"], 2, "power of two"), (["init", "pissa", d + "/model", "-o", d + "/bad", "--rank", "0"], 2, "rank"), (["resize", d + "/extracted", "-o", d + "/bad"], 2, "exactly one"),
    ]:
        r = subprocess.run([program, *args], capture_output=True, text=True)
        lines = r.stderr.splitlines()
        assert r.returncode == code and len(lines) == 1 and part in lines[0], (args, r.returncode, r.stderr)
        assert not os.path.exists(d + "/bad/adapter_config.json")
print("numpy reads everything")
