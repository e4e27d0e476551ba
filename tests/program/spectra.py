# SPDX-License-Identifier: Apache-2.0
"""The numbers of the scans against Python's own: truncated spectra, adapters, comparisons, intruders, storage; and where reports go.

    spectra.py LOWRANK
"""
import csv
import io
import json
import math
import os
import shutil
import struct
import subprocess
import tempfile

from scan_support import *

work = tempfile.mkdtemp(prefix="lowrank-spectra-")
at = lambda name: os.path.join(work, name)


def matrices(*args, code=0):
    """What a scan's JSON says, by name."""
    out = at("out.json")
    if os.path.exists(out):
        os.remove(out)
    run(*args, "--json", out, "--fresh", "-q", code=code)
    return {j["name"]: j for j in json.load(open(out))["matrices"]}


def report(*args, code=0):
    matrices(*args, code=code)
    return json.load(open(at("out.json")))


def bounded(j, what):
    """Every metric that is there lies between its bounds, which are ordered; an exact pair is never withheld."""
    for key, value in j["metrics"].items():
        low, high = j["bounds"][key]
        if low is None:  # a condition number that is infinite
            check(key == "condition_number" and high is None and value is None, f"{what}: {key}: {low}, {high}, {value}")
            continue
        check(low is not None and (high is None or low <= high), f"{what}: bounds of {key}: {low}, {high}")
        slack = 0 if j["method"] == "truncated" else 1e-12 * abs(high or 0)
        if value is not None:
            check(low - slack <= value and (high is None or value <= high + slack), f"{what}: {key} {value} in [{low}, {high}]")
        else:
            check(low != high, f"{what}: {key} is known to be {low}, and null")


def truth_bounded(j, s, what):
    bounded(j, what)
    for key, truth in metrics_of(s).items():
        low, high = j["bounds"][key]
        check(low * (1 - 1e-5) <= truth <= high * (1 + 1e-5), f"{what}: the true {key} {truth} in [{low}, {high}]")
        if j["metrics"][key] is not None:
            check(abs(j["metrics"][key] - truth) <= 2e-3 * truth and (not key.startswith("energy") or j["metrics"][key] == truth),
                  f"{what}: {key} is {truth}, not {j['metrics'][key]}")


def close(a, b, tolerance):
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def svgs(path):
    return open(path).read().count("<svg")


def page_rows(path):
    """The last table of a page: heading → cell texts."""
    text = open(path).read()
    table = text[text.rindex("<table"):]
    strip = lambda cells: ["".join(piece.split(">", 1)[-1] for piece in cell.split("<")) for cell in cells]
    heads = strip(h.split("</th>")[0].partition(">")[2] for h in table.split("<th ")[1:])
    rows = [strip(c.split("</td>")[0].partition(">")[2] for c in row.split("<td")[1:]) for row in table.split("<tr>")[2:]]
    return [list(zip(heads, row)) for row in rows]


try:
    # --top: a metric that the leading values do not determine is null, never that of the leading values alone.
    identity = [float(i == j) for i in range(40) for j in range(40)]
    shapes = {"head.weight": (48, 40), "flat.weight": (40, 40), "noise.weight": (30, 44), "zero.weight": (20, 30), "exact.weight": (36, 24)}
    values = {"head.weight": rounded(add(low_rank(48, 40, 12, 1.0), noise(48, 40, 0.05))), "flat.weight": identity,
              "noise.weight": rounded(noise(30, 44)), "zero.weight": [0.0] * 600, "exact.weight": rounded(low_rank(36, 24, 5, 1.0))}
    save(at("top.safetensors"), {k: ("F32", list(shapes[k]), values[k]) for k in shapes})
    spectra = {k: jacobi_values(values[k], *shapes[k]) for k in shapes}
    whole = matrices("spectrum", at("top.safetensors"))
    for name, s in spectra.items():
        truth_bounded(whole[name], s, name)
    for top in ("1", "6", "12", "16"):
        for name, j in matrices("spectrum", at("top.safetensors"), "--top", top, "--values").items():
            truth_bounded(j, spectra[name], f"--top {top}: {name}")
            check(j["method"] == "truncated" and len(j["singular_values"]) == int(top), f"--top {top}: {name}: so many values")
            check(j["curve"][-1][0] == int(top) and j["curve"][0][0] == 1, f"--top {top}: {name}: their curve")
            for key, ratio in j["ratio"].items():
                check(ratio is None or j["metrics"][key] is not None, f"--top {top}: {name}: no ratio without its metric, {key}")
            if name == "flat.weight":
                check(j["bounds"]["effective_rank"][0] > 39.9 and j["metrics"]["effective_rank"] > 39.9, f"--top {top}: a flat spectrum is flat")
            if name == "noise.weight":
                check(j["metrics"]["effective_rank"] is None and j["metrics"]["stable_rank"] is not None, f"--top {top}: what noise leaves open")
    table = run("spectrum", at("top.safetensors"), "--top", "6", "-q").stdout
    check("nan" not in table, f"no nan in the table: {table}")

    # The page of such a scan: pictures, worst offenders, bounds in cells, errors.
    layers = {f"model.layers.{i}.{name}.weight": ("F32", [24, 20], rounded(noise(24, 20, 0.1))) for i in range(3) for name in ("q_proj", "k_proj")}
    save(at("layers.safetensors"), layers)
    run("spectrum", at("layers.safetensors"), "--top", "4", "--html", at("top.html"), "--png", "--svg", "--pictures", work, "-q")
    html = open(at("top.html")).read()
    if shutil.which("gnuplot"):
        check(svgs(at("top.html")) == 2, f"heat map and spectra of a --top scan: {svgs(at('top.html'))}")
        for picture in ("heat.png", "spectra.png"):
            check(open(at(picture), "rb").read(8) == b"\x89PNG\r\n\x1a\n", f"--png writes {picture}")
    check("Highest stable rank" in html and "<b>–</b>" not in html, "worst offenders, and a median")
    for row in page_rows(at("top.html")):
        cells = dict(row)
        check("…" in cells["effective"] and "…" in cells["r₉₀"] and float(cells["error"]) < 1e-3, f"bounds and errors in cells: {cells}")

    # Reports that are damaged: a line that names the file, no crash, no page.
    good = {"spectrum": report("spectrum", at("layers.safetensors")), "intruders": report("intruders", at("layers.safetensors"), at("layers.safetensors")),
            "compare": report("compare", at("layers.safetensors"), at("layers.safetensors"), "-k", "2")}
    damaged = [{"command": "spectrum", "matrices": [{}]}, {"command": "inspect", "matrices": []}, {"command": 3, "matrices": []},
               {"command": "spectrum"}, {"command": "spectrum", "matrices": {}}, {"command": "spectrum", "matrices": [7]}, [], {},
               {"command": "intruders", "matrices": [{"name": "x", "rows": 1, "cols": 1}]}]
    for command, whole in good.items():
        for key in ("name", "rows", "cols") + (("count", "vectors", "energy_share", "full_svd") if command == "intruders" else ()):
            for wrong in (None, {}, "x" if key != "name" else 5, []):
                broken = json.loads(json.dumps(whole))
                if wrong is None:
                    del broken["matrices"][1][key]
                elif key != "vectors" or wrong != []:
                    broken["matrices"][1][key] = wrong
                else:
                    continue
                damaged.append(broken)
        damaged.append({**whole, "failed": [{"name": "x"}]})
        damaged.append({**whole, "skipped": [{}]})
        damaged.append({**whole, "seconds": "long"})
        for curve in ([[1]], [["a", 1]], [3], "x"):
            broken = json.loads(json.dumps(whole))
            broken["matrices"][0]["curve"] = curve
            damaged.append(broken)
    for i, broken in enumerate(damaged):
        json.dump(broken, open(at("damaged.json"), "w"))
        r = run("report", at("damaged.json"), "-o", at("damaged.html"), code=1)
        check(at("damaged.json") in r.stderr and not os.path.exists(at("damaged.html")), f"damaged report {i}: {r.stderr.strip()[:200]}")
    json.dump(good["spectrum"], open(at("fine.json"), "w"))
    json.dump({"command": "spectrum", "matrices": [{}]}, open(at("damaged.json"), "w"))
    for order in (["fine.json", "damaged.json"], ["damaged.json", "fine.json"]):
        r = run("report", *map(at, order), "-o", at("damaged.html"), code=1)
        check(at("damaged.json") in r.stderr, f"and which of two it is: {r.stderr.strip()}")

    # Differences of 16-bit checkpoints: each side's rounding is that of its own type.
    w = rounded(noise(60, 40, 0.1))
    widths = {"BF16": 7, "F16": 10, "F32": None}
    def kept_as(dtype):
        if dtype == "BF16":
            return [struct.unpack("<f", struct.pack("<I", bf16(x) << 16))[0] for x in w]
        return [struct.unpack("<e", struct.pack("<e", x))[0] for x in w] if dtype == "F16" else w
    for dtype in widths:
        save(at(dtype + ".safetensors"), {"w.weight": (dtype, [60, 40], w)})
    for tuned in widths:
        for base in widths:
            if tuned == base:
                continue
            j = matrices("spectrum", at(tuned + ".safetensors"), "--base", at(base + ".safetensors"))["w.weight"]
            variance = 0.0
            for dtype in (tuned, base):
                if widths[dtype]:
                    ulps = [2.0 ** (math.frexp(x)[1] - 1 - widths[dtype]) if x else 0 for x in kept_as(dtype)]
                    variance += sum(u * u for u in ulps) / len(ulps) / 12
            check(close(j["rounding"]["std"], math.sqrt(variance), 1e-6), f"{tuned} − {base}: rounding {j['rounding']}, {math.sqrt(variance)}")
            check(j["verdict"] == "no signal", f"{tuned} − {base}: pure rounding: {j['verdict']}")
            check(j["metrics"]["spectral_norm"] > 0.5 * j["rounding"]["edge"], f"{tuned} − {base}: and the edge is no larger than it must be")
            check(j["rounding"]["both_rounded"] == ("F32" not in (tuned, base)), f"{tuned} − {base}: which sides")

    # Doubles stay doubles: here the update is below float's precision, and there the weight below its range.
    m, n = 16, 12
    u, v = noise(m, 1), noise(n, 1)
    w = noise(m, n)
    near = [w[i * n + j] + 1e-11 * u[i] * v[j] for i in range(m) for j in range(n)]
    far = [w[i * n + j] + 1e-11 * v[j] * u[(i + 3) % m] for i in range(m) for j in range(n)]
    save(at("wide.safetensors"), {"w.weight": ("F64", [m, n], w), "tiny.weight": ("F64", [m, n], [1e-60 * x for x in w])})
    save(at("near.safetensors"), {"w.weight": ("F64", [m, n], near), "tiny.weight": ("F64", [m, n], [1e-60 * (x + 5 * u[k // n] * v[k % n]) for k, x in enumerate(w)])})
    save(at("far.safetensors"), {"w.weight": ("F64", [m, n], far), "tiny.weight": ("F64", [m, n], [1e-60 * x for x in far])})
    j = matrices("compare", at("near.safetensors"), at("far.safetensors"), "--base", at("wide.safetensors"), "-k", "1")["w.weight"]
    d1, d2 = [a - b for a, b in zip(near, w)], [a - b for a, b in zip(far, w)]
    expected = math.sqrt(sum((a - b) ** 2 for a, b in zip(near, far)) / sum(x * x for x in d1))
    shifted = [u[(i + 3) % m] for i in range(m)]
    check(close(j["relative_difference"], expected, 1e-9), f"A − B in double: {j['relative_difference']}, {expected}")
    check(close(j["left"]["phi"], dot(u, shifted) ** 2 / dot(u, u) ** 2, 1e-3), f"subspaces of tiny updates: {j['left']['phi']}")
    check(close(j["right"]["phi"], 1, 1e-4), f"and on the right: {j['right']['phi']}")
    j = matrices("compare", at("wide.safetensors"), at("near.safetensors"), "-k", "1")
    check(close(j["w.weight"]["relative_difference"], math.sqrt(sum(x * x for x in d1) / sum(x * x for x in w)), 1e-6), "a difference below float's precision")
    check(1 < j["tiny.weight"]["relative_difference"] < 100, "and of values below its range")
    j = matrices("intruders", at("wide.safetensors"), at("near.safetensors"), "--k", "3")
    check(j["w.weight"]["intruders"] == [] and j["tiny.weight"]["energy_share"] < 1, f"intruders in double: {j['tiny.weight']['energy_share']}")

    # Three dimensions: stacks of experts are matrices each, a one-dimensional convolution is one folded matrix.
    conv, experts = rounded(noise(16, 12)), rounded(noise(3 * 6, 5))
    save(at("three.safetensors"), {"conv1d.weight": ("F32", [16, 1, 12], conv), "mlp.experts.gate_up_proj": ("F32", [3, 6, 5], experts),
                                   "block_sparse_moe.input_linear.weight": ("F32", [3, 6, 5], experts), "conv2d.weight": ("F32", [4, 2, 3, 2], conv[:48]),
                                   "mlp.experts.gate_up_proj[1]": ("F32", [2, 2], [1.0, 0.0, 0.0, 2.0])})
    run("spectrum", at("three.safetensors"), "--json", at("three.json"), "--values", "-q", code=1)
    three = json.load(open(at("three.json")))
    expected = {"conv1d.weight": (16, 12, conv), "conv2d.weight": (4, 12, conv[:48]), "mlp.experts.gate_up_proj[1]": (2, 2, [1.0, 0.0, 0.0, 2.0]),
                **{f"block_sparse_moe.input_linear.weight[{e}]": (6, 5, experts[30 * e:30 * e + 30]) for e in range(3)},
                **{f"mlp.experts.gate_up_proj[{e}]": (6, 5, experts[30 * e:30 * e + 30]) for e in (0, 2)}}
    check([j["name"] for j in three["matrices"]] == sorted(expected), f"what is a matrix: {[j['name'] for j in three['matrices']]}")
    for j in three["matrices"]:
        m, n, a = expected[j["name"]]
        s = jacobi_values(a, m, n)
        check((j["rows"], j["cols"]) == (m, n) and max(abs(x - y) for x, y in zip(s, j["singular_values"])) <= 1e-6 * s[0], f"values of {j['name']}")
    clash = [x for x in three["skipped"] if x["name"] == "mlp.experts.gate_up_proj[1]"]
    check(len(clash) == 1 and "slice" in clash[0]["reason"], f"a name that means two things is listed: {three['skipped']}")

    # A damaged description of one 4-bit weight: that one fails, with its name.
    tensors, stands = {}, {}
    for name in ("l.0.weight", "l.1.weight", "l.2.weight"):
        parts, stands[name] = pack_nf4(name, 12, 10, rounded(noise(12, 10, 0.1)), nested=False)
        tensors.update(parts)
    plain = {k: ("F32", [12, 10], rounded(v)) for k, v in stands.items()}
    save(at("plain.safetensors"), plain)
    state = "l.1.weight.quant_state.bitsandbytes__nf4"
    for text in (b"{", b"[]", b"{}", b'{"quant_type":"nf4","shape":[12]}', b'{"quant_type":"nf9","shape":[12,10]}', b'{"quant_type":"nf4","shape":[0,10]}', b"\xff\xfe"):
        save(at("hurt.safetensors"), {**tensors, state: ("U8", [len(text)], text)})
        for args in (["spectrum", at("hurt.safetensors")], ["spectrum", at("hurt.safetensors"), "--base", at("plain.safetensors")],
                     ["spectrum", at("plain.safetensors"), "--base", at("hurt.safetensors")],
                     ["compare", at("hurt.safetensors"), at("plain.safetensors")], ["intruders", at("plain.safetensors"), at("hurt.safetensors")]):
            r = report(*args, code=1)
            check([x["name"] for x in r["matrices"]] == ["l.0.weight", "l.2.weight"], f"{args[0]}: the others are well: {text}")
            check([x["name"] for x in r["failed"]] == ["l.1.weight"] and "hurt.safetensors" in r["failed"][0]["reason"], f"{args[0]}: {text}: {r['failed']}")

    # int8 of bitsandbytes: weight·SCB/127 a row.
    q = [rng.randrange(-127, 128) for _ in range(14 * 9)]
    scb = rounded([rng.uniform(0.1, 2) for _ in range(14)])
    int8 = {"l.0.weight": ("I8", [14, 9], q), "l.0.SCB": ("F32", [14], scb), "l.0.weight_format": ("U8", [], bytes([0])), "l.0.bias": ("F32", [14], scb),
            "other.weight": ("I8", [2, 2], [1, 2, 3, 4])}
    meant = rounded([x * scb[k // 9] / 127 for k, x in enumerate(q)])
    save(at("int8.safetensors"), int8)
    save(at("meant.safetensors"), {"l.0.weight": ("F32", [14, 9], meant)})
    for args, key in ((["spectrum", at("int8.safetensors"), "--base", at("meant.safetensors")], "scale"),
                      (["intruders", at("int8.safetensors"), at("meant.safetensors"), "--k", "3"], "base_scale"),
                      (["compare", at("int8.safetensors"), at("meant.safetensors"), "-k", "3"], "a_scale")):
        r = run(*args, "--json", at("i8.json"))
        check("1 quantised weights are dequantised" in r.stderr, f"{args[0]} says that it dequantises: {r.stderr}")
        whole = json.load(open(at("i8.json")))
        j = whole["matrices"][0]
        check(len(whole["matrices"]) == 1 and j["dequantised"] is True and j[key] == "l.0.SCB, one a row", f"{args[0]}: {j.get(key)}")
        check([x["name"] for x in whole["skipped"]] == ["l.0.bias", "other.weight"] or args[0] == "intruders", f"{args[0]}: {whole['skipped']}")
        check(j.get("verdict", "zero") == "zero" and j.get("intruders", []) == [] and j.get("relative_difference", 0) == 0, f"{args[0]}: the values meant")
    for part, bad in (("l.0.SCB", ("F32", [13], scb[:13])), ("l.0.SCB", ("F32", [14], [math.inf] + scb[1:])), ("l.0.weight_format", ("U8", [], bytes([2])))):
        save(at("bad8.safetensors"), {**int8, part: bad})
        r = report("spectrum", at("bad8.safetensors"), code=1)
        check(r["failed"][0]["name"] == "l.0.weight" and part in r["failed"][0]["reason"], f"what is wrong with {part}: {r['failed']}")

    # Values that are not finite are named with their place, in every command.
    bad = dict(layers)
    name = "model.layers.1.q_proj.weight"
    bad[name] = ("F32", [24, 20], bad[name][2][:65] + [-math.inf] + bad[name][2][66:])
    save(at("inf.safetensors"), bad)
    for args in (["spectrum", at("inf.safetensors")], ["spectrum", at("inf.safetensors"), "--top", "3"],
                 ["compare", at("layers.safetensors"), at("inf.safetensors")], ["intruders", at("inf.safetensors"), at("layers.safetensors")]):
        r = report(*args, code=1)
        check(len(r["failed"]) == 1 and r["failed"][0]["name"] == name and "inf in row 3, column 5" in r["failed"][0]["reason"], f"{args[0]}: {r['failed']}")

    # Adapters: linear layers, an embedding, and the same in GPT-2's order; the oracle forms the product.
    for fan in (False, True):
        r_, alpha, stored, meant, factors = 3, 6, {}, {}, {}
        for name, m, n in (("model.wte", 8, 30), ("model.layers.0.q_proj", 18, 14), ("model.layers.1.q_proj", 14, 18), ("model.layers.1.sq", 12, 12)):
            embedding = name.endswith("wte")
            w = rounded(noise(m, n, 0.3))
            meant[name] = (m, n, w, embedding)
            flip = embedding or fan
            stored[name + ".weight"] = ("F32", [n, m] if flip else [m, n], transposed(w, m, n) if flip else w)
            factors[name] = (rounded(noise(r_, n)), rounded(noise(m, r_, 0.5)), n, m, embedding)
        save(at("gpt.safetensors"), {**stored, "unused.weight": ("F32", [3, 3], noise(3, 3))})
        updates = save_adapter(at("adapter"), factors, r_, alpha, fan_in_fan_out=fan)
        j = matrices("spectrum", at("gpt.safetensors"), "--adapter", at("adapter"), "--values", "--side-by-side", "--alignment", "2", "--csv", at("a.csv"))
        check(sorted(j) == sorted(meant), f"fan_in_fan_out {fan}: every module: {sorted(j)}")
        found = matrices("intruders", at("gpt.safetensors"), at("adapter"), "--k", "6", "--epsilon", "0.6")
        run("merge", at("gpt.safetensors"), at("adapter"), "-o", at("merged"), "-q")
        merged = matrices("spectrum", at("merged/model.safetensors"), "--values")
        for name, (m, n, w, embedding) in meant.items():
            what, e, d = f"fan_in_fan_out {fan}: {name}", j[name], updates[name]
            s, left, right = jacobi(d, m, n)
            s, left, right = s[:r_], left[:r_], right[:r_]
            check((e["rows"], e["cols"]) == (m, n) and max(abs(a - b) for a, b in zip(s, e["singular_values"])) <= 1e-5 * s[0], f"{what}: values")
            check(e["verdict"] == "signal" and e["method"] == "factors", f"{what}: {e['verdict']}, {e['method']}")
            bounded(e, what)
            for key, truth in metrics_of(s).items():
                check(close(e["metrics"][key], truth, 1e-4), f"{what}: {key}")
            size = math.sqrt(dot(w, w))
            check(close(e["relative_norm"], math.sqrt(dot(d, d)) / size, 1e-5), f"{what}: relative norm")
            s0, left0, right0 = jacobi(w, m, n)
            s1, left1, _ = jacobi(add(w, d), m, n)
            for side, values_ in (("base", s0), ("tuned", s1)):
                for key, truth in metrics_of(values_).items():
                    check(close(e[side]["metrics"][key], truth, 1e-4), f"{what}: {side} {key}")
            check(max(abs(a - b) for a, b in zip(s1, merged[name + ".weight"]["singular_values"])) <= 1e-5 * s1[0], f"{what}: merge adds the same update")
            # Where the update points.
            a = e["alignment"]
            total = sum(x * x for x in s)
            shares = {"left": sum(dot(left0[i], left[k]) ** 2 * s[k] ** 2 for i in range(2) for k in range(r_)) / total,
                      "right": sum(dot(right0[i], right[k]) ** 2 * s[k] ** 2 for i in range(2) for k in range(r_)) / total,
                      "both": sum(sum(dot(left0[i], left[k]) * s[k] * dot(right0[l], right[k]) for k in range(r_)) ** 2 for i in range(2) for l in range(2)) / total}
            for key, truth in shares.items():
                check(abs(a[key] - truth) <= 1e-4 and a[key + "_by_k"][-1] == a[key], f"{what}: alignment {key}: {a[key]}, {truth}")
            check(close(a["left_noise"], 2 / m, 1e-9) and close(a["right_noise"], 2 / n, 1e-9) and close(a["both_noise"], 4 / m / n, 1e-9), f"{what}: noise")
            core = sum(dot(left[i], [dot(w[row * n:row * n + n], right[k]) for row in range(m)]) ** 2 for i in range(r_) for k in range(r_))
            check(close(a["amplification"], math.sqrt(total / core), 1e-3), f"{what}: amplification {a['amplification']}, {math.sqrt(total / core)}")
            # Intruders, exactly.
            cosines = [max(abs(dot(x, y)) for y in left0[:min(m, n)]) for x in left1[:6]]
            check(all(abs(c - 0.6) > 1e-4 for c in cosines), f"{what}: the oracle is not on the edge")
            expected = [i for i, c in enumerate(cosines) if c < 0.6]
            check(found[name]["intruders"] == expected, f"{what}: intruders {found[name]['intruders']}, {expected}")
            check(abs(found[name]["energy_share"] - sum(s1[i] ** 2 for i in expected) / sum(x * x for x in s1)) < 1e-4, f"{what}: energy share")
    rows = list(csv.DictReader(open(at("a.csv"))))
    for row in rows:
        e = j[row["name"]]
        for column, value in (("effective_rank", e["metrics"]["effective_rank"]), ("noise_effective_rank", e["noise"]["effective_rank"]),
                              ("ratio_effective_rank", e["ratio"]["effective_rank"]), ("effective_rank_lo", e["bounds"]["effective_rank"][0]),
                              ("effective_rank_hi", e["bounds"]["effective_rank"][1]), ("base_energy_rank_90", e["base"]["metrics"]["energy_rank_90"]),
                              ("tuned_stable_rank_hi", e["tuned"]["bounds"]["stable_rank"][1]), ("alignment_amplification", e["alignment"]["amplification"]),
                              ("base_noise_level_edge", e["base"]["noise_level"]["edge"])):
            check((float(row[column]) if row[column] else None) == value, f"CSV of {row['name']}: {column}")
    # An adapter's module without a weight, or with one of another shape, is listed.
    save(at("misfit.safetensors"), {**{k: v for k, v in stored.items() if "wte" not in k}, "model.layers.1.sq.weight": ("F32", [5, 12], noise(5, 12))})
    for args in (["spectrum", at("misfit.safetensors"), "--adapter", at("adapter")], ["intruders", at("misfit.safetensors"), at("adapter")]):
        r = report(*args, code=1)
        check({x["name"] for x in r["skipped"]} == {"model.wte", "model.layers.1.sq"} and len(r["matrices"]) == 2, f"{args[0]}: misfits: {r['skipped']}")

    # Comparisons, of adapters and of checkpoints with a base, against angles from Python's vectors.
    second = {k: (rounded(add(a, noise(r_, n, 0.4))), rounded(add(b, noise(m, r_, 0.2))), n, m, e) for k, (a, b, n, m, e) in factors.items()}
    others = save_adapter(at("second"), second, r_, alpha, fan_in_fan_out=True)
    sums = lambda table: {k + ".weight": ("F32", [meant[k][0], meant[k][1]], rounded(add(meant[k][2], table[k]))) for k in meant}
    save(at("a.safetensors"), sums(updates))
    save(at("b.safetensors"), sums(others))
    save(at("w.safetensors"), {k + ".weight": ("F32", [m, n], w) for k, (m, n, w, _) in meant.items()})
    from_factors = matrices("compare", at("adapter"), at("second"), "-k", "2")
    from_weights = matrices("compare", at("a.safetensors"), at("b.safetensors"), "--base", at("w.safetensors"), "-k", "2", "--csv", at("c.csv"))
    sides = matrices("spectrum", at("a.safetensors"), "--base", at("w.safetensors"), "--side-by-side", "--alignment", "2", "--html", at("sides.html"))
    for name, (m, n, w, _) in meant.items():
        (_, u1, v1), (_, u2, v2) = jacobi(updates[name], m, n), jacobi(others[name], m, n)
        for j, tolerance in ((from_factors[name], 1e-4), (from_weights[name + ".weight"], 1e-3)):
            for side, x, y in (("left", u1, u2), ("right", v1, v2)):
                g = [[dot(x[i], y[k]) for k in range(2)] for i in range(2)]
                phi = sum(c * c for row in g for c in row) / 2
                cosines = jacobi_values([c for row in g for c in row], 2, 2)
                angles = [math.acos(min(1.0, c)) for c in cosines]
                check(abs(j[side]["phi"] - phi) < tolerance and abs(j[side]["grid"][0][0] - g[0][0] ** 2) < tolerance, f"compare {name}: {side} φ {j[side]['phi']}, {phi}")
                check(all(abs(a - b) < 10 * tolerance for a, b in zip(sorted(angles), j[side]["angles"])), f"compare {name}: {side} angles")
                check(abs(j[side]["grassmann"] - math.sqrt(sum(a * a for a in angles))) < 20 * tolerance, f"compare {name}: {side} Grassmann")
                check(abs(j[side]["chordal"] - math.sqrt(sum(math.sin(a) ** 2 for a in angles))) < 20 * tolerance, f"compare {name}: {side} chordal")
            d = [a - b for a, b in zip(updates[name], others[name])]
            check(close(j["relative_difference"], math.sqrt(dot(d, d) / dot(updates[name], updates[name])), 1e-4), f"compare {name}: difference")
            check(0 <= j["error"] < 1e-4, f"compare {name}: error {j['error']}")
        for side, values_ in (("base", w), ("tuned", add(w, updates[name]))):
            check(close(sides[name + ".weight"][side]["metrics"]["effective_rank"], metrics_of(jacobi_values(values_, m, n))["effective_rank"], 1e-4), f"{name}: {side}")
        a = sides[name + ".weight"]["alignment"]
        leads, _, _ = jacobi(updates[name], m, n)
        energy = sum(x * x for x in leads[:2])
        left0 = jacobi(w, m, n)[1]
        share = sum(dot(left0[i], u1[k]) ** 2 * leads[k] ** 2 for i in range(2) for k in range(2)) / energy
        check(abs(a["left"] - share) < 1e-3 and close(a["captured_energy"], energy / sum(x * x for x in leads), 1e-4), f"{name}: alignment {a['left']}, {share}")
    for row in csv.DictReader(open(at("c.csv"))):
        e = from_weights[row["name"]]
        check(float(row["left_phi"]) == e["left"]["phi"] and float(row["right_grassmann"]) == e["right"]["grassmann"], "CSV of compare")
        check([float(x) for x in row["left_angles"].split()] == e["left"]["angles"], "CSV of compare: angles")
    if shutil.which("gnuplot"):
        check("<title>" in open(at("sides.html")).read() and 'id="sides-' in open(at("sides.html")).read(), "the three spectra are drawn")
    check("amplification" in open(at("sides.html")).read(), "and the alignment is in the table")
    run("spectrum", at("w.safetensors"), "--side-by-side", code=2)
    run("spectrum", at("w.safetensors"), "--alignment", "2", code=2)

    # One intruder at a known place: base diagonal, one strong direction spread over all of it.
    n = 16
    w = [float((n - i) * (i == j)) for i in range(n) for j in range(n)]
    direction, target = [1 / 4.0] * n, [1 / 4.0 * (-1) ** i for i in range(n)]
    tuned = [w[i * n + j] + 40 * direction[i] * target[j] for i in range(n) for j in range(n)]
    save(at("diagonal.safetensors"), {"d.weight": ("F32", [n, n], w), "same.weight": ("F32", [n, n], w)})
    save(at("spread.safetensors"), {"d.weight": ("F32", [n, n], tuned), "same.weight": ("F32", [n, n], w)})
    s1, left1, _ = jacobi(tuned, n, n)
    j = matrices("intruders", at("diagonal.safetensors"), at("spread.safetensors"), "--k", "4", "--epsilon", "0.4", "--csv", at("i.csv"))
    expected = [i for i in range(4) if max(map(abs, left1[i])) < 0.4]
    check(0 in expected and j["d.weight"]["intruders"] == expected and j["same.weight"]["intruders"] == [], f"intruders {j['d.weight']['intruders']}, {expected}")
    check(close(j["d.weight"]["energy_share"], sum(s1[i] ** 2 for i in expected) / sum(x * x for x in s1), 1e-4), "their energy")
    row = next(csv.DictReader(open(at("i.csv"))))
    check(row["intruders"] == " ".join(map(str, expected)) and row["count"] == str(len(expected)), f"CSV of intruders: {row}")

    # --filter: what it takes, and one answer where that is nothing.
    check(sorted(matrices("spectrum", at("layers.safetensors"), "--filter", "q_proj")) == [f"model.layers.{i}.q_proj.weight" for i in range(3)], "--filter")
    for args in (["spectrum", at("layers.safetensors")], ["spectrum", at("layers.safetensors"), "--base", at("layers.safetensors")],
                 ["spectrum", at("gpt.safetensors"), "--adapter", at("adapter")], ["compare", at("layers.safetensors"), at("layers.safetensors")],
                 ["compare", at("adapter"), at("second")], ["intruders", at("layers.safetensors"), at("layers.safetensors")],
                 ["intruders", at("gpt.safetensors"), at("adapter")]):
        r = run(*args, "--filter", "nowhere", "--json", at("nothing.json"), code=1)
        check("--filter nowhere matches none" in r.stderr and "_proj" in r.stderr, f"{args[0]}: a filter that matches nothing: {r.stderr.strip()}")
        check(not os.path.exists(at("nothing.json")), f"{args[0]}: and no report")

    # Where reports go.
    for args in (["spectrum", at("layers.safetensors")], ["compare", at("layers.safetensors"), at("layers.safetensors")],
                 ["intruders", at("layers.safetensors"), at("layers.safetensors")]):
        for last in (["--json"], ["--json", "-"], ["--json", "-q"]):
            check(len(json.loads(run(*args, *last).stdout)["matrices"]) == 6, f"{args[0]} {last}: JSON and nothing else on stdout")
        check(len(list(csv.DictReader(io.StringIO(run(*args, "--csv", "-").stdout)))) == 6, f"{args[0]} --csv -: CSV and nothing else on stdout")
        check(run(*args, "--html", "-").stdout.startswith("<!doctype html>"), f"{args[0]} --html -: the page on stdout")
        run(*args, "--csv", "-", "--json", code=2)
        check(not os.path.exists("-"), "no file of that name")
    run("report", at("fine.json"), "-o", "-", code=2)

    # The journal knows the program's version; --fresh does not look at it.
    version = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.split()[1]
    run("spectrum", at("inf.safetensors"), "--json", at("j.json"), "-q", code=1)
    head = json.loads(open(at("j.json.journal")).readline())
    check(head["fingerprint"].startswith(f"lowrank {version} "), f"the journal's head: {head}")
    for extra, resumed in (([], 5), (["--fresh"], 0), (["--top", "3"], 0)):
        run("spectrum", at("inf.safetensors"), "--json", at("j.json"), "-q", *extra, code=1)
        check(json.load(open(at("j.json")))["resumed"] == resumed, f"{extra}: {resumed} from the journal")
finally:
    shutil.rmtree(work, ignore_errors=True)
finish()
