# SPDX-License-Identifier: Apache-2.0
"""The scans end to end, with checkpoints made here. Needs nothing beyond Python; gnuplot and chromium where they exist.

    scans.py LOWRANK [LOWRANK_MPI]
"""
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

tool = sys.argv[1]
mpi_tool = sys.argv[2] if len(sys.argv) > 2 else None
failures = 0


def check(condition, what):
    global failures
    if not condition:
        failures += 1
        print("FAILED:", what)


def run(*args, code=0, program=None):
    r = subprocess.run([*(program or [tool]), *args], capture_output=True, text=True)
    check(r.returncode == code, f"{' '.join(args[:3])}: exit code {r.returncode}, expected {code}: {r.stderr.strip()}")
    if code != 0:
        check(len(r.stderr.strip().splitlines()) >= 1, "a failure says why")
    return r


def bf16(x):
    u = struct.unpack("<I", struct.pack("<f", x))[0]
    return (u + 0x7FFF + ((u >> 16) & 1)) >> 16


def save(path, tensors):
    """tensors: name -> (dtype, shape, floats)."""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        code = {"F32": lambda v: struct.pack(f"<{len(v)}f", *v), "F64": lambda v: struct.pack(f"<{len(v)}d", *v),
                "BF16": lambda v: struct.pack(f"<{len(v)}H", *map(bf16, v)), "I64": lambda v: struct.pack(f"<{len(v)}q", *v)}
        raw = code[dtype](values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


rng = random.Random(1)


def noise(m, n, std=1.0):
    return [rng.gauss(0, std) for _ in range(m * n)]


def low_rank(m, n, r, size):
    out = [0.0] * (m * n)
    for _ in range(r):
        u, v = noise(m, 1), noise(n, 1)
        for i in range(m):
            for j in range(n):
                out[i * n + j] += size * u[i] * v[j]
    return out


def add(a, b):
    return [x + y for x, y in zip(a, b)]


def jacobi_values(a, m, n):
    """Singular values by one-sided Jacobi on the shorter side, in Python's doubles: an oracle nobody here wrote in C++."""
    if m < n:
        a = [a[i * n + j] for j in range(n) for i in range(m)]
        m, n = n, m
    columns = [[a[i * n + j] for i in range(m)] for j in range(n)]
    for _ in range(30):
        off = 0.0
        for p in range(n - 1):
            for q in range(p + 1, n):
                x, y = columns[p], columns[q]
                alpha, beta = sum(t * t for t in x), sum(t * t for t in y)
                gamma = sum(s * t for s, t in zip(x, y))
                if abs(gamma) <= 1e-15 * math.sqrt(alpha * beta):
                    continue
                off = max(off, abs(gamma) / math.sqrt(alpha * beta))
                zeta = (beta - alpha) / (2 * gamma)
                t = math.copysign(1, zeta) / (abs(zeta) + math.sqrt(1 + zeta * zeta))
                c = 1 / math.sqrt(1 + t * t)
                columns[p] = [c * (s - t * u) for s, u in zip(x, y)]
                columns[q] = [c * (t * s + u) for s, u in zip(x, y)]
        if off < 1e-14:
            break
    return sorted((math.sqrt(sum(t * t for t in x)) for x in columns), reverse=True)


def rounded(values):
    return [struct.unpack("<f", struct.pack("<f", v))[0] for v in values]


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
    if os.path.exists(other + ".journal"):
        with open(other + ".journal", "a") as f:
            f.write('{"job": "torn')
    run(*key, "--json", other)
    again = json.load(open(other))
    check(again["matrices"] == whole["matrices"], "a killed and resumed scan gives the same matrices")

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

    # MPI: the same report from two ranks.
    if mpi_tool and shutil.which("mpirun"):
        environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        for ranks in ("1", "2"):
            r = subprocess.run(["mpirun", "-np", ranks, "--oversubscribe", mpi_tool, *key, "--json", at(f"mpi{ranks}.json"), "-q"],
                               capture_output=True, text=True, env=environment)
            check(r.returncode == 0, f"mpirun -np {ranks}: {r.stderr.strip()}")
        check(json.load(open(at("mpi1.json")))["matrices"] == json.load(open(at("mpi2.json")))["matrices"] == whole["matrices"],
              "two ranks give what one gives")
finally:
    shutil.rmtree(work, ignore_errors=True)
print("all checks passed" if failures == 0 else f"{failures} checks failed")
sys.exit(1 if failures else 0)
