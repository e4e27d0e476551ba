# SPDX-License-Identifier: Apache-2.0
"""The scans end to end, with checkpoints made here. Needs nothing beyond Python; gnuplot and chromium where they exist.

    scans.py LOWRANK [LOWRANK_MPI]
"""
import html as html_lib
import json
import math
import os
import shutil
import subprocess
import tempfile

from scan_support import *

work = tempfile.mkdtemp(prefix="lowrank-report-")
at = lambda name: os.path.join(work, name)
try:
    modules = [("self_attn.q_proj", 24, 20), ("self_attn.o_proj", 20, 24), ("mlp.up_proj", 40, 20)]
    base, tuned = {}, {}
    for layer in range(3):
        for name, m, n in modules:
            key = f"model.layers.{layer}.{name}.weight"
            w = rounded(noise(m, n, 0.1))
            base[key] = ("F32", [m, n], w)
            tuned[key] = ("F32", [m, n], rounded(add(w, low_rank(m, n, 2, 0.2 * (layer + 1)))))
        base[f"model.layers.{layer}.norm.weight"] = tuned[f"model.layers.{layer}.norm.weight"] = ("F32", [20], noise(20, 1))
    save(at("base.safetensors"), base)
    save(at("tuned.safetensors"), tuned)

    # The contract of `spectrum`, each number against Python's own decomposition.
    out = at("spectrum.json")
    run("spectrum", at("tuned.safetensors"), "--base", at("base.safetensors"), "--json", out, "--values", "--csv", at("s.csv"))
    report = json.load(open(out))
    check(len(report["matrices"]) == 9, "nine matrices")
    check(report["skipped_vectors"] == 3, "three vectors skipped and counted")
    check(not os.path.exists(out + ".journal"), "the journal is gone when all went well")
    keys = {"spectral_norm", "frobenius_norm", "nuclear_norm", "energy_rank_90", "effective_rank", "stable_rank",
            "participation_ratio", "numerical_rank"}
    for j in report["matrices"]:
        name = j["name"]
        a = [x - y for x, y in zip(tuned[name][2], base[name][2])]
        m, n = tuned[name][1]
        s = jacobi_values(rounded(a), m, n)
        got = j["singular_values"]
        check(len(got) == min(m, n), f"{name}: all singular values")
        check(max(abs(x - y) for x, y in zip(s, got)) <= 1e-6 * s[0], f"{name}: singular values")
        check(keys <= set(j["metrics"]) and keys <= set(j["noise"]), f"{name}: keys")
        energy, total, rank = 0, sum(x * x for x in s), 0
        while energy < 0.9 * total:
            energy += s[rank] ** 2
            rank += 1
        check(j["metrics"]["energy_rank_90"] == rank, f"{name}: r90")
        p = [x / sum(s) for x in s if x > 0]
        check(abs(j["metrics"]["effective_rank"] - math.exp(-sum(x * math.log(x) for x in p))) < 1e-3, f"{name}: effective rank")
        check(abs(j["metrics"]["frobenius_norm"] - math.sqrt(total)) < 1e-5 * math.sqrt(total), f"{name}: norm")
        for key in keys:
            low, high = j["bounds"][key]
            check(low <= j["metrics"][key] * (1 + 1e-9) and j["metrics"][key] <= high * (1 + 1e-9), f"{name}: bounds of {key}")
        check(j["verdict"] == "signal", f"{name}: verdict")
    check(len(open(at("s.csv")).read().splitlines()) == 10, "CSV: a head and nine rows")

    # Killed in the middle: what is in the journal is not computed again, a torn last line is forgotten.
    key = ["spectrum", at("tuned.safetensors"), "--base", at("base.safetensors"), "--values"]
    other = at("resumed.json")
    run(*key, "--json", other)
    whole = json.load(open(other))
    os.remove(other)
    one = subprocess.Popen([tool, *key, "--json", other, "-j", "1"], stdout=subprocess.DEVNULL)
    one.kill()  # whenever that hits, the next run must give the same report
    one.wait()
    run(*key, "--json", other)
    check(json.load(open(other))["matrices"] == whole["matrices"], "a killed and resumed scan gives the same matrices")
    os.remove(other)
    for size in (3000, 9000):  # the disk fills inside a write, some matrices done, with the torn line that leaves
        one = subprocess.run([tool, *key, "--json", other, "-j", "1", "-q"], preexec_fn=disk_of(size), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
        check(one.returncode == 1, f"the scan stopped at {size} bytes: {one.returncode}")
        torn = open(other + ".journal").read()
        check(len(torn) == size and not torn.endswith("\n") and not os.path.exists(other), f"and left a torn journal at {size}")
    run(*key, "--json", other)
    again = json.load(open(other))
    check(again["matrices"] == whole["matrices"], "and so is one resumed from a torn journal")
    check(again["resumed"] == torn.count("\n") - 1 >= 2, f"without repeating what was done: {again['resumed']}")
    check(not os.path.exists(other + ".journal"), "the journal goes when the scan is complete")

    # --top gives bounds that hold the truth.
    run("spectrum", at("tuned.safetensors"), "--base", at("base.safetensors"), "--top", "3", "--json", at("top.json"))
    for j, full in zip(json.load(open(at("top.json")))["matrices"], report["matrices"]):
        for key_ in keys:
            low, high = j["bounds"][key_]
            check(low * (1 - 1e-5) <= full["metrics"][key_] <= high * (1 + 1e-5), f"top: {j['name']} {key_}")

    # Intruders: strong random updates of noise are intruders, the base compared with itself has none.
    run("intruders", at("base.safetensors"), at("tuned.safetensors"), "--k", "4", "--epsilon", "0.5", "--json", at("i.json"))
    found = json.load(open(at("i.json")))["matrices"]
    check(all({"name", "intruders", "energy_share"} <= set(j) for j in found), "intruders: keys")
    check(sum(len(j["intruders"]) for j in found) > 0, "intruders are found")
    run("intruders", at("base.safetensors"), at("base.safetensors"), "--json", at("none.json"))
    check(all(j["intruders"] == [] for j in json.load(open(at("none.json")))["matrices"]), "no intruders in itself")

    # Compare.
    run("compare", at("base.safetensors"), at("base.safetensors"), "--json", at("c.json"), "-k", "3")
    for j in json.load(open(at("c.json")))["matrices"]:
        check(abs(j["left"]["phi"] - 1) < 1e-4 and j["relative_difference"] == 0, "a checkpoint is similar to itself")

    # Bad input.
    bad = dict(tuned)
    k0, k1, k2 = [k for k in bad if "proj" in k][:3]
    m, n = bad[k0][1]
    bad[k0] = ("F32", [m, n], [math.nan] + bad[k0][2][1:])
    save(at("nan.safetensors"), bad)
    r = run("spectrum", at("nan.safetensors"), "--base", at("base.safetensors"), "--json", at("nan.json"), code=1)
    check(k0 in r.stderr, "the tensor with NaN is named")
    check(len(json.load(open(at("nan.json")))["matrices"]) == 8, "the rest of the scan went on")
    bad = dict(tuned)
    del bad[k1]
    bad[k2] = ("F32", [3, 5], noise(3, 5))
    bad["extra.weight"] = ("F32", [4, 4], noise(4, 4))
    bad["counts"] = ("I64", [2, 2], [1, 2, 3, 4])
    save(at("other.safetensors"), bad)
    r = run("spectrum", at("other.safetensors"), "--base", at("base.safetensors"), "--json", at("other.json"), code=1)
    skipped = {s["name"] for s in json.load(open(at("other.json")))["skipped"]}
    check({k1, k2, "extra.weight", "counts"} <= skipped, "names and shapes that differ are listed")
    run("spectrum", at("base.safetensors"), "--base", at("base.safetensors"), "--json", at("zero.json"))
    for j in json.load(open(at("zero.json")))["matrices"]:
        check(j["verdict"] == "zero" and j["metrics"]["energy_rank_90"] == 0, "an all-zero difference")
    save(at("narrow.safetensors"), {k: ("BF16", s, v) for k, (_, s, v) in base.items()})
    run("spectrum", at("narrow.safetensors"), "--base", at("base.safetensors"), "--json", at("narrow.json"))
    for j in json.load(open(at("narrow.json")))["matrices"]:
        check(j["verdict"] == "no signal", f"pure rounding has no signal: {j['name']}")
    run("spectrum", at("missing.safetensors"), code=1)
    run("spectrum", at("base.safetensors"), "--top", "0", code=2)
    run("spectrum", code=2)
    run("spectrum", at("base.safetensors"), "--base", "x", "--adapter", "y", code=2)

    # Quantised tensors are dequantised, and the report says so.
    packed, stands_for = {}, {}
    for layer, (name, m, n) in enumerate([("q_proj", 15, 13), ("up_proj", 24, 20)]):  # 195 values: odd, a short last block
        key_ = f"model.layers.{layer}.{name}.weight"
        tensors, stands_for[key_] = pack_nf4(key_, m, n, rounded(noise(m, n, 0.1)), nested=layer == 1)
        packed.update(tensors)
    packed["norm.weight"] = ("F32", [20], noise(20, 1))
    save(at("packed.safetensors"), packed)
    r = run("spectrum", at("packed.safetensors"), "--json", at("packed.json"), "--values")
    check("2 quantised weights are dequantised" in r.stderr, f"dequantising is said: {r.stderr}")
    j = json.load(open(at("packed.json")))
    check([x["name"] for x in j["matrices"]] == sorted(stands_for), "the packed weights and nothing else")
    check(j["skipped_vectors"] == 1 and len(j["skipped"]) == 1, "parts of a packed weight are no skipped tensors")
    for x in j["matrices"]:
        s = jacobi_values(rounded(stands_for[x["name"]]), x["rows"], x["cols"])
        check(x["dtype"] == "nf4" and x["dequantised"] is True, f"{x['name']}: nf4, dequantised")
        check(max(abs(a - b) for a, b in zip(s, x["singular_values"])) <= 1e-6 * s[0], f"{x['name']}: values of the NF4 weight")
    plain = {k: ("F32", [x["rows"], x["cols"]], rounded(stands_for[k])) for k, x in zip(sorted(stands_for), j["matrices"])}
    save(at("dequantised.safetensors"), plain)
    run("spectrum", at("packed.safetensors"), "--base", at("dequantised.safetensors"), "--json", at("same.json"))
    for x in json.load(open(at("same.json")))["matrices"]:
        check(x["metrics"]["spectral_norm"] < 1e-6 and "4 bits" in x["note"], "packed and dequantised are the same weight")
    run("intruders", at("packed.safetensors"), at("dequantised.safetensors"), "--k", "3", "--json", at("pi.json"))
    check(all(x["intruders"] == [] for x in json.load(open(at("pi.json")))["matrices"]), "no intruders in the same weight")

    # 8-bit weights with the scales real checkpoints keep for them. A code has four bits that count and a scale at most 24: Python's
    # product is exact, and rounding it to float is what the program must come to. So the difference to that is zero, not small.
    scaled, stands_for, said = {}, {}, {}

    def eight(name, shape, scale, scale_name, scale_shape, scale_dtype="F32", bits=4, per=""):
        """`scale`: a function of the indices (matrix, row, column) → position among the scales."""
        matrices, m, n = shape if len(shape) == 3 else (1, *shape)
        codes = random_f8(matrices * m * n, bits)
        count = math.prod(scale_shape)
        if scale_dtype == "F8_E8M0":
            stored = [rng.randrange(100, 140) for _ in range(count)]
            scales = [2.0 ** (c - 127) for c in stored]
        else:
            scales = stored = rounded([rng.uniform(1e-4, 1e-2) for _ in range(count)])
            if scale_dtype == "BF16":
                scales = [struct.unpack("<f", struct.pack("<I", bf16(x) << 16))[0] for x in stored]
        scaled[name] = ("F8_E4M3" if bits == 4 else "F8_E5M2", shape, codes)
        if scale_name:
            scaled[scale_name] = (scale_dtype, scale_shape, stored)
        for e in range(matrices):
            values = [f8(codes[(e * m + i) * n + j], bits) * (scales[scale(e, i, j)] if scale_name else 1) for i in range(m) for j in range(n)]
            key = name + (f"[{e}]" if len(shape) == 3 else "")
            stands_for[key] = ("F32", [m, n], rounded(values))
            said[key] = f"{scale_name}, one a {per}" if scale_name else "none"

    block, row, one = "128x128 block", "row", "tensor"
    eight("l.0.blocks.weight", [150, 140], lambda e, i, j: i // 128 * 2 + j // 128, "l.0.blocks.weight_scale_inv", [2, 2], per=block)
    eight("l.0.short.weight", [300, 20], lambda e, i, j: i // 128, "l.0.short.weight_scale_inv", [3, 1], "BF16", per=block)
    eight("l.0.rows.weight", [24, 20], lambda e, i, j: i, "l.0.rows.weight_scale", [24, 1], "BF16", per=row)
    eight("l.0.flat.weight", [24, 20], lambda e, i, j: i, "l.0.flat.weight_scale", [24], per=row)
    eight("l.0.one.weight", [24, 20], lambda e, i, j: 0, "l.0.one.weight_scale", [], per=one)
    eight("l.0.comfy.weight", [24, 20], lambda e, i, j: 0, "l.0.comfy.scale_weight", [1], bits=5, per=one)
    eight("l.0.sibling.weight", [24, 20], lambda e, i, j: 0, "l.0.sibling.scale", [1, 1], per=one)
    eight("l.0.micro.weight", [10, 70], lambda e, i, j: i * 3 + j // 32, "l.0.micro.weight_scale", [10, 3], "F8_E8M0", per="1x32 block")
    eight("l.0.experts.each", [3, 10, 12], lambda e, i, j: e, "l.0.experts.each_scale", [3, 1, 1], per=one)
    eight("l.0.experts.stack", [3, 10, 12], lambda e, i, j: e * 10 + i, "l.0.experts.stack_scale", [3, 10, 1], per=row)
    eight("l.0.experts.grids", [2, 130, 12], lambda e, i, j: e * 2 + i // 128, "l.0.experts.grids_scale_inv", [2, 2, 1], per=block)
    eight("l.0.bare.weight", [24, 20], None, None, [])
    scaled["l.0.rows.input_scale"] = ("F32", [1], [0.5])
    save(at("scaled.safetensors"), scaled)
    # Named as tensors of their own: a slice has no name in a file, so the stacks come back as they were.
    plain = {k: v for k, v in stands_for.items() if "[" not in k}
    for name in ("l.0.experts.each", "l.0.experts.stack", "l.0.experts.grids"):
        slices = [v for k, v in stands_for.items() if k.startswith(name + "[")]
        plain[name] = ("F32", [len(slices), *slices[0][1]], [x for s in slices for x in s[2]])
    save(at("unscaled.safetensors"), plain)
    r = run("spectrum", at("scaled.safetensors"), "--base", at("unscaled.safetensors"), "--json", at("scaled.json"), "--csv", at("scaled.csv"))
    check(f"{len(stands_for) - 1} quantised weights are dequantised" in r.stderr, f"scales are said: {r.stderr}")
    check("1 8-bit weights have no scale: their values are taken as they are" in r.stderr, f"and that there is none: {r.stderr}")
    j = json.load(open(at("scaled.json")))
    check([x["name"] for x in j["matrices"]] == sorted(stands_for), f"the weights, and not their scales: {[x['name'] for x in j['matrices']]}")
    check([x["name"] for x in j["skipped"]] == ["l.0.rows.input_scale"], f"scales of weights are no skipped tensors: {j['skipped']}")
    for x in j["matrices"]:
        check(x["verdict"] == "zero", f"{x['name']}: what the code and the scale stand for, exactly")
        check(x["scale"] == said[x["name"]] and x["dtype"] == scaled[x["name"].partition("[")[0]][0], f"{x['name']}: {x['scale']}")
        check(x.get("dequantised", False) == (x["scale"] != "none") and "8 bits" in x["note"], f"{x['name']}: dequantised is said")
    run("spectrum", at("scaled.safetensors"), "--filter", "l.0.r", "--values", "--json", at("rows.json"), "-q")
    for x in json.load(open(at("rows.json")))["matrices"]:
        s = jacobi_values(stands_for[x["name"]][2], x["rows"], x["cols"])
        check(x["scale"] == said[x["name"]] and max(abs(a - b) for a, b in zip(s, x["singular_values"])) <= 1e-6 * s[0], "values of an 8-bit weight")
    r = run("compare", at("scaled.safetensors"), at("unscaled.safetensors"), "--json", at("cs.json"), "-k", "3")
    check("quantised weights are dequantised" in r.stderr, f"compare says so: {r.stderr}")
    for x in json.load(open(at("cs.json")))["matrices"]:
        check(x["relative_difference"] == 0 and x["a_scale"] == said[x["name"]] and "b_scale" not in x, f"compare: {x['name']}")
    r = run("intruders", at("unscaled.safetensors"), at("scaled.safetensors"), "--k", "3", "--json", at("is.json"))
    check("quantised weights are dequantised" in r.stderr, f"intruders says so: {r.stderr}")
    for x in json.load(open(at("is.json")))["matrices"]:
        check(x["intruders"] == [] and x["tuned_scale"] == said[x["name"]], f"intruders: {x['name']}")
    # Scales that do not fit: each is an error with the names, what was expected and what came. The rest goes on.
    wrong = dict(scaled)
    wrong["l.0.rows.weight_scale"] = ("F32", [3, 5], noise(3, 5))
    wrong["l.0.flat.weight_scale"] = ("I64", [24], range(24))
    wrong["l.0.one.weight_scale"] = ("F32", [], [math.inf])
    wrong["l.0.comfy.weight_scale"] = ("F32", [], [1.0])
    wrong["l.0.experts.stack_scale"] = ("F32", [10, 1], noise(10, 1))
    save(at("wrong.safetensors"), wrong)
    run("spectrum", at("wrong.safetensors"), "--json", at("wrong.json"), code=1)
    j = json.load(open(at("wrong.json")))
    reasons = {x["name"]: x["reason"] for x in j["failed"]}
    for name, words in (("l.0.rows.weight", ["weight_scale", "[3, 5]", "[24, 1]", "[1, 1]"]), ("l.0.flat.weight", ["weight_scale", "I64", "F32"]),
                        ("l.0.one.weight", ["weight_scale", "inf"]), ("l.0.comfy.weight", ["weight_scale", "scale_weight"]),
                        ("l.0.experts.stack[2]", ["l.0.experts.stack_scale", "[10, 1]", "[3, 10, 1]"])):
        check(all(word in reasons.get(name, "") for word in words), f"{name}: {reasons.get(name)}")
    check(len(reasons) == 7 and len(j["matrices"]) == len(stands_for) - 7, f"what does not fit, and nothing else: {sorted(reasons)}")
    # Commands that would need the scales and do not know them refuse the type.
    for args in (["extract", at("scaled.safetensors"), at("scaled.safetensors"), "--rank", "2"], ["init", "pissa", at("scaled.safetensors"), "--rank", "2"]):
        r = run(*args, "-o", at("no"), "--targets", "rows", code=1)
        check("F8_E4M3" in r.stderr and not os.path.exists(at("no")), f"{args[0]} refuses 8 bits: {r.stderr}")

    # The page.
    page, growth = at("page.html"), at("growth.html")
    run("spectrum", at("tuned.safetensors"), "--base", at("base.safetensors"), "--json", out, "--html", page, "--svg", "--pictures", work)
    run("report", out, at("resumed.json"), "-o", growth)
    run("report", at("s.csv"), "-o", at("x.html"), code=1)
    html = open(page).read()
    for outside in ("http://", "https://", "src=", "@import"):
        text = html.replace("http://www.w3.org", "")  # namespaces of SVG are names, not addresses
        check(outside not in text, f"the page is self-contained: no {outside}")
    check(html.count("<tr>") >= 10, "the table has every matrix")
    if shutil.which("gnuplot"):
        check(html.count("<svg") == 2, "heat map and spectra")
        check(open(growth).read().count("<svg") == 3, "and growth, with two reports")
        check(open(at("heat.svg")).read().rstrip().endswith("</svg>"), "--svg writes files")
    no_gnuplot = dict(os.environ, PATH="/nonexistent")
    r = subprocess.run([tool, "report", out, "-o", at("plain.html")], capture_output=True, text=True, env=no_gnuplot)
    check(r.returncode == 0 and "gnuplot was not found" in open(at("plain.html")).read(), "without gnuplot the page says so")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser:
        for path in (page, growth, at("plain.html")):
            r = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                                f"--user-data-dir={at('profile')}", "--virtual-time-budget=2000", "--dump-dom", "file://" + path],
                               capture_output=True, text=True, timeout=120)
            console = [line for line in r.stderr.splitlines() if "CONSOLE" in line]
            check(not console, f"no console messages: {console}")
            check(r.returncode == 0 and "</table>" in r.stdout and "<title>lowrank" in r.stdout, f"the page renders: {r.stderr[-300:]}")
        # At a phone's width only tables and pictures scroll, not the page; a click on a heading sorts, another turns it round.
        probe = """<script>
            const table = document.querySelector("table.sortable"), button = table.querySelectorAll("th button")[8];
            const column = () => [...table.tBodies[0].rows].map(row => row.cells[8].dataset.v).join(" ");
            button.click(); const down = column(); button.click();
            document.title = JSON.stringify({down, up: column(), page: document.documentElement.scrollWidth, window: innerWidth,
                dark: getComputedStyle(document.body).backgroundColor, broken: [...document.querySelectorAll("svg use")].filter(u =>
                !document.getElementById((u.getAttribute("href") ?? u.getAttribute("xlink:href")).slice(1))).length});
            </script></body>"""
        with open(at("probe.html"), "w") as f:
            f.write(open(growth).read().replace("</body>", probe))
        colours = set()
        for scheme in ("0", "1"):
            r = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={at('profile')}",
                                "--window-size=390,900", f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=2000",
                                "--dump-dom", "file://" + at("probe.html")], capture_output=True, text=True, timeout=120)
            title = html_lib.unescape(r.stdout.partition("<title>")[2].partition("</title>")[0])
            check(title.startswith("{"), f"the probe of the page ran: {title[:200]}")
            seen = json.loads(title) if title.startswith("{") else {}
            numbers = [float(x) for x in seen.get("down", "").split()]
            check(len(numbers) == 9 and numbers == sorted(numbers, reverse=True) and numbers[0] > numbers[-1], f"sorted down: {numbers}")
            check([float(x) for x in seen.get("up", "").split()] == sorted(numbers), "and up")
            check(seen.get("page", 1) <= seen.get("window", 0), f"the page fits a phone: {seen.get('page')} in {seen.get('window')}")
            check(seen.get("broken") == 0, "every mark in the pictures is there")
            colours.add(seen.get("dark"))
        check(len(colours) == 2, f"dark and light: {colours}")

    # MPI: the same report from two ranks.
    if mpi_tool and shutil.which("mpirun"):
        # Leak checking (of a sanitized build) is off: MPI keeps what it allocated at start until the process ends.
        environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                           ASAN_OPTIONS="detect_leaks=0")
        for ranks in ("1", "2"):
            r = subprocess.run(["mpirun", "-np", ranks, "--oversubscribe", mpi_tool, *key, "--json", at(f"mpi{ranks}.json"), "-q"],
                               capture_output=True, text=True, env=environment)
            check(r.returncode == 0, f"mpirun -np {ranks}: {r.stderr.strip()}")
        check(json.load(open(at("mpi1.json")))["matrices"] == json.load(open(at("mpi2.json")))["matrices"] == whole["matrices"],
              "two ranks give what one gives")
        # What goes wrong on a rank ends the run everywhere, with a line that says what, and nobody waits for anybody.
        for ranks, arguments, word in ((2, ["nan.safetensors", "--base", at("base.safetensors"), "--json", at("mpinan.json")], k0),
                                       (2, ["tuned.safetensors", "--json", at("missing/x.json")], "missing/x.json: cannot create")):
            r = subprocess.run(["mpirun", "-np", str(ranks), "--oversubscribe", mpi_tool, "spectrum", at(arguments[0]), *arguments[1:],
                                "-q"], capture_output=True, text=True, env=environment, timeout=60)
            check(r.returncode == 1 and word in r.stderr, f"mpirun with bad input: {r.returncode}, {r.stderr.strip()[-300:]}")
finally:
    shutil.rmtree(work, ignore_errors=True)
finish()
