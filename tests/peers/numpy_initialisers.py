#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The initialisers that look at data, `lowrank init corda | eva | lora_ga`, against numpy's SVD of what they decompose."""
import json
import os
import re
import subprocess
import sys
import tempfile

from support import bf16, np, read_safetensors, run, tiny_llama, write_safetensors

program = sys.argv[1]
rng = np.random.default_rng(11)
RANK = 4


def factors(directory):
    t = read_safetensors(os.path.join(directory, "adapter_model.safetensors"))
    return {n[len("base_model.model.") : -len(".lora_A.weight")]: (a.astype(np.float64), t[n.replace("lora_A", "lora_B")].astype(np.float64))
            for n, a in t.items() if n.endswith(".lora_A.weight")}


def config(directory):
    return json.load(open(os.path.join(directory, "adapter_config.json")))


def scale_of(c, module):
    """As PEFT resolves it: the first pattern that matches the whole name or what follows a dot."""
    def pattern(key, otherwise):
        return next((v for k, v in c[key].items() if re.fullmatch(rf"(.*\.)?({k})", module)), otherwise)
    r = pattern("rank_pattern", c["r"])
    alpha = pattern("alpha_pattern", c["lora_alpha"])
    return r, alpha / (np.sqrt(r) if c["use_rslora"] else r)


def energy(m):
    return (m**2).sum()


with tempfile.TemporaryDirectory() as d:
    weights = tiny_llama(d + "/model")
    targets = [n[:-7] for n in weights if re.search(r"(q_proj|v_proj|down_proj)\.weight$", n)]
    W = {m: weights[m + ".weight"].astype(np.float64) for m in targets}
    # Inputs with a mean, each module's own spectrum; gradients of full rank with another one.
    X = {}
    for k, m in enumerate(targets):
        n = W[m].shape[1]
        mix = np.linalg.qr(rng.standard_normal((n, n)))[0]
        X[m] = (rng.standard_normal((150, n)) * (0.75 + 0.03 * k) ** np.arange(n) @ mix + 0.2).astype(np.float32)
    G = {}
    for m in targets:
        u, s, vt = np.linalg.svd(rng.standard_normal(W[m].shape), full_matrices=False)
        G[m] = (u * 0.8 ** np.arange(len(s)) @ vt).astype(np.float32)
    np.savez(d + "/x.npz", **X)
    write_safetensors(d + "/x.safetensors", X)
    write_safetensors(d + "/c.safetensors", {m + ".covariance": (x.astype(np.float64).T @ x / len(x)).astype(np.float32) for m, x in X.items()})
    write_safetensors(d + "/g.safetensors", {m + ".weight": g for m, g in G.items()})
    np.savez(d + "/g.npz", **G)
    common = ["--rank", RANK, "--alpha", 6, "--targets", "q_proj,v_proj,down_proj", "--seed", 3]

    def residual_holds(out, scale, w_of=W, base_name="/base/model.safetensors"):
        base = read_safetensors(out + base_name)
        for m, (a, b) in factors(out).items():
            w = w_of[m]
            # base is W − s·B·A rounded to f32 after r + 1 operations; it and s·B·A are no larger than the sums of magnitudes
            off = (RANK + 3) * 2.0**-24 * (np.abs(w) + 2 * scale * np.abs(b) @ np.abs(a))
            assert (np.abs(base[m + ".weight"] + scale * b @ a - w) <= off).all(), m
        for name, w in weights.items():
            if name[:-7] not in targets:
                assert np.array_equal(base[name], w), name

    # corda: s·B·A = U·Uᵀ·W with U the leading (or last) left singular vectors of W·C
    for mode in ("instruction", "knowledge"):
        outs = {}
        for data in ("x.npz", "x.safetensors", "c.safetensors"):
            out = f"{d}/corda_{mode}_{data}"
            report = json.loads(run(program, "init", "corda", d + "/model", "-o", out, *common, "--activations", d + "/" + data, "--mode", mode, "--json"))
            assert report["applied"] == len(targets) and report["base_changed"] and config(out)["init_lora_weights"] is True
            residual_holds(out, 6 / RANK)
            outs[data] = factors(out)
            for m, (a, b) in outs[data].items():
                x = X[m].astype(np.float64)
                C = x.T @ x / len(x)
                C += 0.01 * np.trace(C) / len(C) * np.eye(len(C))
                s = np.linalg.svd(W[m] @ C, compute_uv=False)
                update = 6 / RANK * b @ a
                q = np.linalg.qr(b)[0]
                assert np.linalg.norm(update - q @ (q.T @ W[m])) < 1e-5 * np.linalg.norm(W[m]), m  # f32 factors
                got = energy(update @ C)
                if mode == "instruction":
                    assert (1 - 1e-4) * energy(s[:RANK]) <= got <= (1 + 1e-5) * energy(s[:RANK]), m
                    assert np.allclose((b**2).sum(0), s[:RANK] * RANK / 6, rtol=1e-3), m  # B = U·√(S/s)
                else:  # never less than the smallest possible
                    assert (1 - 1e-3) * energy(s[-RANK:]) <= got <= energy(s[-RANK:]) + 1e-6 * energy(s), (m, got, energy(s[-RANK:]))
        for m in targets:  # the same data in another file is the same data; a covariance, but for its rounding
            assert all(np.array_equal(p, q) for p, q in zip(outs["x.npz"][m], outs["x.safetensors"][m]))

    # eva: A the principal directions of the inputs, B = 0, ranks where they explain most
    explained = {}
    for m in targets:
        x = X[m].astype(np.float64)
        s = np.linalg.svd(x - x.mean(0), compute_uv=False)
        explained[m] = s**2 / energy(s)
    best = sorted(((v, m) for m in targets for v in explained[m][: 2 * RANK]), reverse=True)[: RANK * len(targets)]
    want = {m: sum(1 for _, x in best if x == m) for m in targets}
    assert len(set(want.values())) > 1, "the ranks must differ for the test to say anything"
    for rslora in (False, True):
        out = f"{d}/eva{rslora}"
        report = json.loads(run(program, "init", "eva", d + "/model", "-o", out, *common, "--activations", d + "/x.npz", "--json", *(["--rslora"] if rslora else [])))
        assert not report["base_changed"] and not os.path.exists(out + "/base")
        assert {e["name"]: e["rank"] for e in report["modules"]} == want, (report["modules"], want)
        c = config(out)
        for m, (a, b) in factors(out).items():
            r, scale = scale_of(c, m)
            assert r == len(a) == want[m] and abs(scale - 6 / (np.sqrt(RANK) if rslora else RANK)) < 1e-6 * scale, m
            assert not b.any() and b.shape == (W[m].shape[0], r)
            assert np.abs(a @ a.T - np.eye(r)).max() < 1e-5, m
            x = X[m].astype(np.float64)
            top = explained[m][:r].sum()
            got = energy((x - x.mean(0)) @ a.T) / energy(x - x.mean(0))
            assert (1 - 1e-4) * top <= got <= (1 + 1e-5) * top, m
        assert report["parameters"] == sum(want[m] * sum(W[m].shape) for m in targets)
    # equal ranks; whitened; second moments instead of inputs
    run(program, "init", "eva", d + "/model", "-o", d + "/eva1", *common, "--activations", d + "/x.npz", "--rho", 1, "--no-centre", "--whiten")
    run(program, "init", "eva", d + "/model", "-o", d + "/evac", *common, "--activations", d + "/c.safetensors", "--rho", 1)
    assert config(d + "/eva1")["rank_pattern"] == {} and config(d + "/eva1")["r"] == RANK
    for m in targets:
        s = np.linalg.svd(X[m].astype(np.float64), compute_uv=False)[:RANK]
        white, plain = factors(d + "/eva1")[m][0], factors(d + "/evac")[m][0]
        assert np.allclose(np.linalg.norm(white, axis=1), s**-0.5, rtol=1e-3), m
        assert np.abs(plain @ plain.T - np.eye(RANK)).max() < 1e-5
        assert energy(X[m] @ plain.T) >= (1 - 1e-4) * energy(s), m
    # a module whose inputs never vary explains nothing, gets nothing, and is no target any more
    still = dict(X)
    still[targets[0]] = np.ones_like(X[targets[0]])
    np.savez(d + "/still.npz", **still)
    r = subprocess.run([program, "init", "eva", d + "/model", "-o", d + "/still", *map(str, common), "--activations", d + "/still.npz"], capture_output=True, text=True)
    assert r.returncode == 0 and "1 modules explain too little" in r.stderr, r.stderr
    c = config(d + "/still")
    assert set(factors(d + "/still")) == set(targets[1:])
    assert sorted(c["target_modules"]) == sorted(targets[1:]), c["target_modules"]

    # lora_ga: A from the first r right singular vectors of the gradient, B from the left ones that follow
    for data, extra, gamma in [("g.safetensors", [], 16), ("g.npz", ["--gamma", 4], 4)]:
        out = f"{d}/ga{gamma}"
        run(program, "init", "lora_ga", d + "/model", "-o", out, *common, "--gradients", d + "/" + data, *extra)
        residual_holds(out, 6 / RANK)
        for m, (a, b) in factors(out).items():
            s = np.linalg.svd(G[m].astype(np.float64), compute_uv=False)
            unit = W[m].shape[0] ** 0.25 / np.sqrt(gamma)
            a, b = a / unit, b / unit
            assert np.abs(a @ a.T - np.eye(RANK)).max() < 1e-5 and np.abs(b.T @ b - np.eye(RANK)).max() < 1e-5, m
            assert abs(energy(G[m] @ a.T) / energy(s[:RANK]) - 1) < 1e-4, m
            assert abs(energy(b.T @ G[m]) / energy(s[RANK : 2 * RANK]) - 1) < 1e-4, m

    # bf16 factors and a bf16 base: the base is formed from the rounded factors
    half = {n: bf16(w) for n, w in weights.items()}
    header = {"__metadata__": {"format": "pt"}}
    os.makedirs(d + "/half")
    at, blob = 0, b""
    for n, w in half.items():
        part = (np.ascontiguousarray(w).view(np.uint32) >> 16).astype("<u2").tobytes()
        header[n] = {"dtype": "BF16", "shape": list(w.shape), "data_offsets": [at, at + len(part)]}
        at, blob = at + len(part), blob + part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    open(d + "/half/model.safetensors", "wb").write(len(text).to_bytes(8, "little") + text + blob)
    for method, data in [("corda", ["--activations", d + "/x.npz"]), ("lora_ga", ["--gradients", d + "/g.npz"])]:
        out = f"{d}/half_{method}"
        run(program, "init", method, d + "/half", "-o", out, *common, *data, "--dtype", "bf16")
        base = read_safetensors(out + "/base/model.safetensors")
        for m, (a, b) in factors(out).items():
            assert np.array_equal(bf16(a), a) and np.array_equal(bf16(b), b)
            exact = half[m + ".weight"] - 6 / RANK * b @ a
            off = (RANK + 3) * 2.0**-24 * (np.abs(half[m + ".weight"]) + 6 / RANK * np.abs(b) @ np.abs(a))
            assert (bf16(exact - off) <= base[m + ".weight"]).all() and (base[m + ".weight"] <= bf16(exact + off)).all(), m

    # weights stored in x out (GPT-2): the gradient lies as the weight does
    flipped = {n: np.ascontiguousarray(w.T) if n[:-7] in targets else w for n, w in weights.items()}
    os.makedirs(d + "/flipped")
    write_safetensors(d + "/flipped/model.safetensors", flipped)
    np.savez(d + "/gt.npz", **{m: np.ascontiguousarray(g.T) for m, g in G.items()})
    for method, data, straight in [("lora_ga", ["--gradients", d + "/gt.npz"], "ga16"), ("corda", ["--activations", d + "/x.npz"], "corda_instruction_x.npz")]:
        out = f"{d}/flipped_{method}"
        run(program, "init", method, d + "/flipped", "-o", out, *common, *data, "--fan-in-fan-out")
        for m, (a, b) in factors(out).items():
            p, q = factors(f"{d}/{straight}")[m]
            for x, y in ((a, p), (b.T, q.T)):  # the same vectors, but for signs
                cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
                assert (np.abs(cosines) > 1 - 1e-4).all(), (method, m, cosines)
            base = read_safetensors(out + "/base/model.safetensors")[m + ".weight"].T
            assert np.abs(base + 6 / RANK * b @ a - W[m]).max() < 1e-5, m

    # wrong data: one line that names the file and the module, nothing written
    first = targets[0]
    broken = {"missing": {m: x for m, x in X.items() if m != first}, "narrow": {**X, first: X[first][:, :-1]}, "cube": {**X, first: X[first][None]},
              "empty": {**X, first: X[first][:0]}, "nan": {**X, first: np.where(np.arange(X[first].size).reshape(X[first].shape) == 77, np.nan, X[first])},
              "both": {**X, first + ".covariance": np.eye(W[first].shape[1])}, "words": {**X, first: X[first].astype(np.int64)},
              "few": {**X, first: X[first][: RANK - 1]}, "crooked": {**{m: x for m, x in X.items() if m != first}, first + ".covariance": np.triu(np.ones((64, 64)))}}
    for name, arrays in broken.items():
        np.savez(f"{d}/{name}.npz", **arrays)
    np.savez(d + "/zero.npz", **{**G, first: np.zeros_like(G[first])})
    np.savez(d + "/turned.npz", **{**G, targets[-1]: G[targets[-1]].T})
    open(d + "/x.txt", "w").write("x")
    cases = [("corda", "--activations", n + ".npz", 1, first) for n in broken if n != "few"] + [("eva", "--activations", n + ".npz", 1, first) for n in broken if n != "few"]
    cases += [("eva", "--activations", "few.npz", 1, "too few for rank"), ("corda", "--activations", "nowhere.npz", 1, "nowhere.npz"), ("eva", "--activations", "x.txt", 1, "x.txt"),
              ("lora_ga", "--gradients", "zero.npz", 1, first), ("lora_ga", "--gradients", "turned.npz", 1, targets[-1]), ("lora_ga", "--gradients", "x.npz", 1, first),
              ("lora_ga", "--activations", "x.npz", 2, "--"), ("pissa", "--activations", "x.npz", 2, "--activations"), ("pissa", "--gradients", "g.npz", 2, "--gradients"),
              ("corda", "--gradients", "g.npz", 2, "--gradients"), ("lora_ga", "--gradients", "", 1, "")]
    for method, option, file, code, part in cases:
        extra = ["--rho", "1"] if file == "few.npz" else []
        r = subprocess.run([program, "init", method, d + "/model", "-o", d + "/bad", *map(str, common), option, d + "/" + file, *extra, "-q"], capture_output=True, text=True)
        lines = r.stderr.splitlines()
        assert r.returncode == code and len(lines) == 1 and part in lines[0], (method, file, r.returncode, r.stderr)
        assert not os.path.exists(d + "/bad/adapter_config.json") and not os.path.exists(d + "/bad/base/model.safetensors")
    r = subprocess.run([program, "init", "lora_ga", d + "/model", "-o", d + "/bad", "--rank", "20", "--targets", "v_proj", "--gradients", d + "/g.npz", "-q"], capture_output=True, text=True)
    assert r.returncode == 1 and "twice the rank" in r.stderr, r.stderr
print("numpy agrees with corda, eva and lora_ga")
