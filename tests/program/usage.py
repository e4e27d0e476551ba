# SPDX-License-Identifier: Apache-2.0
"""The command line of the lowrank program: options that a mode has no use for, names misspelt, numbers out of range, and outputs looked
at before the work. Needs nothing beyond Python.

    usage.py LOWRANK
"""
import json
import os
import pty
import shutil
import subprocess
import tempfile

from scan_support import *

work = tempfile.mkdtemp(prefix="lowrank-usage-")
at = lambda name: os.path.join(work, name)


def says(code, *args):
    """The one line on stderr of a command that ends with the code."""
    r = subprocess.run([tool, *map(str, args)], capture_output=True, text=True, cwd=work)
    lines = r.stderr.splitlines()
    check(r.returncode == code and len(lines) == 1 and lines[0].startswith("lowrank: error: ") and r.stdout == "",
          f"{' '.join(map(str, args))}: {r.returncode}, {r.stderr!r}, {r.stdout!r}")
    return r.stderr


# Every option that counts in some modes only: subcommand and arguments, then lists of modes, each with the options that are refused
# and those that are not. Files are named that do not exist: a usage error (2) comes before a missing file (1) is found.
COMBINE = ["combine", "a", "b", "-o", "c"]
RESIZE = ["resize", "a", "-o", "c"]
MERGE = ["merge", "a", "b", "-o", "c"]
CONVERT = ["convert", "a", "-o", "c"]
FROM_GGUF = ["convert", "a.gguf", "-o", "c"]
UNDO = ["undo", "a", "--initial", "b", "-o", "c"]
SPECTRUM, COMPARE, INTRUDERS = ["spectrum", "a"], ["compare", "a", "b"], ["intruders", "a", "b"]
rank, density, space, election, seed = ["--rank", 4], ["--density", 0.5], ["--space", "update"], ["--election", "total"], ["--seed", 1]
heads, kv_heads, base, changed = ["--heads", 4], ["--kv-heads", 2], ["--base", "m"], ["--changed-base"]
pictures, fresh, values, top = ["--pictures", "."], ["--fresh"], ["--values"], ["--top", 3]
TABLE = [
    (RESIZE, ["--rank", 4], [["--max-rank", 2]], []),
    (RESIZE, ["--energy", 0.9], [], [["--max-rank", 2]]),
    (RESIZE, ["--cumulative", 0.9], [], [["--max-rank", 2]]),
    (RESIZE, ["--ratio", 9], [], [["--max-rank", 2]]),
    (COMBINE, [], [rank, density, space, election, seed], [["--weights", "1,2"]]),
    (COMBINE, ["--method", "cat"], [rank, density, space, election, seed], [["--weights", "1,2"]]),
    (COMBINE, ["--method", "svd"], [density, space, election, seed], [rank, ["--weights", "1,2"]]),
    (COMBINE, ["--method", "linear"], [rank, density, space, election, seed], [["--weights", "1,2"]]),
    (COMBINE, ["--method", "ties"], [seed], [rank, density, space, election]),
    (COMBINE, ["--method", "dare_ties"], [], [rank, density, space, election, seed]),
    (COMBINE, ["--method", "dare_linear"], [election], [rank, density, space, seed]),
    (COMBINE, ["--method", "magnitude_prune"], [election, seed], [rank, density, space]),
    (COMBINE, ["--method", "ties", "--space", "factors"], [rank], [density, election]),
    (MERGE, ["--allow-lossy"], [["--min-correlation", 0.5]], [changed, ["--dry-run"]]),
    (MERGE, [], [], [["--min-correlation", 0.5], ["--min-correlation", 0.5, "--dry-run"]]),
    (CONVERT, ["--to", "npz"], [base, heads, kv_heads, changed, ["--dtype", "bf16"]], [["--dtype", "f16"]]),
    (CONVERT, ["--to", "peft"], [heads, kv_heads, changed], [base, ["--dtype", "bf16"]]),
    (CONVERT, ["--to", "gguf"], [kv_heads], [base, heads, changed, heads + kv_heads, ["--dtype", "bf16"]]),
    (CONVERT, ["--to", "gguf", "--heads", 4], [], [base, kv_heads]),
    (FROM_GGUF, ["--to", "npz"], [kv_heads, changed], [base, heads]),
    (FROM_GGUF, ["--to", "npz", "--heads", 4], [], [base, kv_heads]),
    (FROM_GGUF, ["--to", "peft"], [kv_heads, changed], [base, heads, base + heads]),
    (UNDO, [], [], [rank, ["--base-model", "m"]]),
    (SPECTRUM, [], [["--side-by-side"], ["--alignment", 2], pictures, fresh, values], [top, ["--json", "--values"], ["--svg", *pictures]]),
    (SPECTRUM, ["--json", "x.json"], [], [values, fresh]),
    (SPECTRUM, ["--json", "-"], [fresh], [values]),
    (SPECTRUM, ["--csv", "x.csv"], [values], [fresh]),
    (SPECTRUM, base, [["--adapter", "b"]], [top, ["--side-by-side"], ["--alignment", 2]]),
    (SPECTRUM, ["--adapter", "b"], [top], [["--side-by-side"], ["--alignment", 2], ["--side-by-side", *top]]),
    (COMPARE, [], [pictures, fresh], [base, ["-k", 3], ["--png", *pictures]]),
    (INTRUDERS, [], [pictures, fresh], [["-k", 3], ["--epsilon", 0.3], ["--html", "x.html", *fresh]]),
    (["inspect", "a"], [], [], [["--json"], ["-q"]]),
    (["report", "a"], [], [["-o", "-"]], [["-o", "x.html"]]),
]
try:
    for command, mode, refused, taken in TABLE:
        for option in refused:
            line = says(2, *command, *mode, *option)
            check(command[0] in line and (option[0] in line or option[0] == "-o"), f"{command[0]} {mode} {option} says which: {line}")
        for option in taken:
            says(1, *command, *mode, *option)

    # Values that would make nothing of it, or that no number can be.
    check("weights are 0" in says(2, *COMBINE, "--weights", "0,0"), "weights of nothing")
    for option, value in (("--weights", "1,nan"), ("--weights", "inf,1"), ("--weights", "1e400,1"), ("--weights", "1,x")):
        check(option in says(2, *COMBINE, option, value), f"{option} {value}")
    check("as many weights" in says(2, *COMBINE, "--weights", "1"), "one weight for two")
    for args in ([*SPECTRUM, "--top"], [*RESIZE, "--rank"], [*COMPARE, "-k"], [*INTRUDERS, "-k"], [*UNDO, "--rank"], [*CONVERT, "--to", "gguf", "--heads"]):
        for value in ("99999999999999999999", "9999999999", "0", "-1", "2.5", "1e3", "x", "nan", ""):
            line = says(2, *args, value)
            check(f"got {value}" in line and "whole number from 1 to 2147483647" in line, f"{args[0]} {value}: {line}")
    for value in ("-1", "18446744073709551616", "1.5"):
        check(f"got {value}" in says(2, *COMBINE, "--method", "dare_ties", "--seed", value), f"seed {value}")
    says(1, *COMBINE, "--method", "dare_ties", "--seed", "18446744073709551615")
    check("from 0 to 4096" in says(2, *SPECTRUM, "-j", "99999999999"), "jobs")
    check("too large" in says(2, "init", "pissa", "a", "-o", "c", "--alpha", "1e300"), "a number that is one, but not of this world")
    check("from 1 to 1e+30, got 1e400" in says(2, *RESIZE, "--ratio", "1e400"), "beyond what a double holds")
    says(1, *RESIZE, "--ratio", "1e20")

    # Help by the word, and names that are nearly right.
    whole = run("--help").stdout
    check("spectrum" in whole and run("help").stdout == whole, "help is --help")
    check(run("help", "spectrum").stdout == run("spectrum", "--help").stdout != whole, "help of a subcommand")
    for word, meant in (("spectru", "spectrum"), ("sprectum", "spectrum"), ("mrege", "merge"), ("extrct", "extract"), ("int", "init")):
        check(f"unknown subcommand '{word}'; did you mean '{meant}'?" in says(2, word, "x"), f"{word} is {meant}")
    check("inspect, init" in says(2, "train") and "did you mean" not in says(2, "train"), "what is near nothing gets the list")
    check("train" in says(2, "help", "train"), "and so does its help")
    for args, word, meant in (([*SPECTRUM, "--tpo", "3"], "--tpo", "--top"), ([*RESIZE, "--enregy=0.9"], "--enregy", "--energy"), ([*MERGE, "--allow_lossy"], "--allow_lossy", "--allow-lossy"),
                              (["init", "pissa", "a", "--ouput", "c"], "--ouput", "--output")):
        check(f"unknown option '{word}'; did you mean '{meant}'?" in says(2, *args), f"{word} is {meant}")
    check("'b' was not expected" in says(2, *SPECTRUM, "b"), "one argument too many")

    # combine is exact unless told otherwise.
    half = noise(2, 6), noise(2, 5), noise(3, 6), noise(3, 5)
    for name, r, a, b in (("one", 2, half[0], half[1]), ("two", 3, half[2], half[3])):
        save_adapter(at(name), {"m.q_proj": (a, transposed(b, r, 5), 6, 5, False)}, r, 2 * r + 1)
    both = json.loads(run("combine", at("one"), at("two"), "-o", at("both"), "--weights", "2,-0.5", "--json").stdout)
    check(both["method"] == "cat" and both["modules"][0]["rank"] == 5 and both["relative_distance"] < 1e-6, f"combine adds exactly: {both}")
    svd = json.loads(run("combine", at("one"), at("two"), "-o", at("both"), "--method", "svd", "--rank", "1", "--json", "--dry-run").stdout)
    check(svd["modules"][0]["rank"] == 1 and svd["relative_distance"] > 0.01, f"svd of a rank that is too small says so: {svd}")

    # Outputs that cannot be written are found before the work: nothing is computed, so no line on stdout and no journal.
    save(at("m.safetensors"), {"l.0.q_proj.weight": ("F32", [12, 9], noise(12, 9)), "l.1.q_proj.weight": ("F32", [12, 9], noise(12, 9))})
    os.mkdir(at("folder"))
    for args in (["--svg", "--pictures", at("nowhere")], ["--png", "--pictures", at("m.safetensors")], ["--html", at("nowhere/x.html"), "--json", at("good.json")],
                 ["--csv", at("folder")], ["--json", at("nowhere/x.json")], ["--html", at("/dev/full")]):
        line = says(1, "spectrum", at("m.safetensors"), *args)
        check(args[-1 if "--json" != args[-2] or len(args) == 2 else 1] in line, f"{args}: {line}")
        check(not os.path.exists(at("good.json")) and not os.path.exists(at("good.json.journal")), f"{args}: nothing was begun")
    run("spectrum", at("m.safetensors"), "--json", at("r.json"))
    check("nowhere" in says(1, "report", at("r.json"), "-o", at("nowhere/x.html")), "report")

    # The disk is full in the journal: which file, and why.
    r = subprocess.run([tool, "spectrum", at("m.safetensors"), "--json", at("full.json"), "-q"], capture_output=True, text=True, preexec_fn=disk_of(1200))
    check(r.returncode == 1 and "full.json.journal" in r.stderr and "the journal" in r.stderr and os.strerror(27) in r.stderr, f"disk full: {r.stderr}")

    # What a killed run left is named and removed by the next run into the same place; what is being written by another stays.
    partial = {"both/adapter_model.safetensors.partial-aB3dE6": True, "r.json.partial-012345": False, "other.json.partial-012345": False, "both/mine.partial-1": False}
    for name in partial:
        open(at(name), "w").write("half")
    r = run("combine", at("one"), at("two"), "-o", at("both"))
    for name, gone in partial.items():
        check(os.path.exists(at(name)) != gone and (at(name) in r.stderr) == gone, f"combine and {name}: {r.stderr}")
    held = os.open(at("r.json.partial-012345"), os.O_WRONLY)
    r = run("spectrum", at("m.safetensors"), "--json", at("r.json"))
    check(os.path.exists(at("r.json.partial-012345")) and r.stderr == "", f"being written by somebody: {r.stderr}")
    os.close(held)
    r = run("spectrum", at("m.safetensors"), "--json", at("r.json"))
    check(not os.path.exists(at("r.json.partial-012345")) and at("r.json.partial-012345") in r.stderr, f"abandoned: {r.stderr}")
    check(os.path.exists(at("other.json.partial-012345")), "what belongs to another file stays")

    # A run that failed leaves no empty directories, and none that was there goes.
    os.mkdir(at("empty"))
    for place, left in (("new/deep/er", "new"), ("empty/in", "empty/in"), ("empty", None)):
        r = subprocess.run([tool, "combine", at("one"), at("two"), "-o", at(place)], capture_output=True, text=True, preexec_fn=disk_of(100))
        check(r.returncode == 1 and (left is None or not os.path.exists(at(left))) and os.path.isdir(at("empty")), f"failed into {place}: {r.stderr}")
    r = subprocess.run([tool, "init", "pissa", at("m.safetensors"), "-o", at("new/init"), "--rank", "2"], capture_output=True, text=True, preexec_fn=disk_of(300))
    check(r.returncode == 1 and not os.path.exists(at("new")), f"init: {r.stderr}, left {[p for p, _, _ in os.walk(at('new'))]}")

    # The base of an earlier method is no base of an adapter that knows nothing of it.
    run("init", "pissa", at("m.safetensors"), "-o", at("p"), "--rank", "2")
    before = open(at("p/adapter_model.safetensors"), "rb").read()
    for args in (["init", "kaiming", at("m.safetensors"), "-o", at("p"), "--rank", "2"], ["combine", at("one"), at("two"), "-o", at("p")],
                 ["resize", at("one"), "-o", at("p"), "--rank", "1"], ["convert", at("one"), "--to", "peft", "-o", at("p")],
                 ["extract", at("p/base/model.safetensors"), at("m.safetensors"), "-o", at("p"), "--rank", "2"]):
        line = says(1, *args)
        check("pissa" in line and at("p/base") in line and open(at("p/adapter_model.safetensors"), "rb").read() == before, f"{args[0]}: {line}")
    run("init", "olora", at("m.safetensors"), "-o", at("p"), "--rank", "2")  # brings a base of its own

    # Names of bases lead there from anywhere.
    os.mkdir(at("model"))
    for name, given, expected in (("a1", "model", at("model")), ("a2", "org/name", "org/name"), ("a3", "./model/", at("model"))):
        r = subprocess.run([tool, "convert", "one", "--to", "peft", "-o", name, "--base", given], capture_output=True, text=True, cwd=work)
        named = json.load(open(at(name + "/adapter_config.json")))["base_model_name_or_path"]
        check(r.returncode == 0 and os.path.normpath(named) == expected and (given != "org/name" or named == given), f"{given}: {named}, {r.stderr}")

    # A dry run of a merge says what would be refused.
    ones = {"l.0.q_proj.weight": ("BF16", [8, 8], [1.0] * 64)}
    save(at("ones.safetensors"), ones)
    save_adapter(at("tiny"), {"l.0.q_proj": ([1e-5] * 8, [1e-2 * (-1) ** i * (1 + i) for i in range(8)], 8, 8, False)}, 1, 1)
    lossy = ["merge", at("ones.safetensors"), at("tiny"), "-o", at("merged.safetensors")]
    check("--allow-lossy" in says(1, *lossy), "the merge is refused")
    check("would be refused: 1 modules" in run(*lossy, "--dry-run").stderr, "its dry run says so")
    check(run(*lossy, "--dry-run", "--min-correlation", "-1").stderr == "" and run(*lossy, "--dry-run", "--allow-lossy").stderr == "", "unless it would not be")

    # The bar: on a terminal, count of all, rate and time left; never where stderr is a file.
    save(at("many.safetensors"), {f"l.{i}.q_proj.weight": ("F32", [96, 80], noise(96, 80)) for i in range(8)})
    long_ones = (["spectrum", at("many.safetensors"), "--json", at("many.json"), "-j", "1"], ["init", "milora", at("many.safetensors"), "-o", at("bar"), "--rank", "2"],
                 ["intruders", at("many.safetensors"), at("many.safetensors"), "-j", "1"], ["compare", at("many.safetensors"), at("many.safetensors"), "-j", "1"],
                 ["extract", at("many.safetensors"), at("bar/base/model.safetensors"), "-o", at("extracted"), "--rank", "2"],
                 ["merge", at("bar/base/model.safetensors"), at("bar"), "-o", at("merged"), "--changed-base"])
    for args in long_ones:
        for quiet in (False, True):
            master, slave = pty.openpty()
            p = subprocess.Popen([tool, *args, *(["-q"] if quiet else [])], stdout=subprocess.DEVNULL, stderr=slave)
            os.close(slave)
            seen = b""
            while True:
                try:
                    part = os.read(master, 65536)
                except OSError:  # the other end was closed
                    break
                if not part:
                    break
                seen += part
            os.close(master)
            check(p.wait() == 0, f"{args[0]}: {seen}")
            bar = b" of 8 " in seen and b" left" in seen and b"/s" in seen
            check(bar != quiet, f"{args[0]}{' -q' if quiet else ''} on a terminal: {seen[:300]}")
        check("[" not in run(*args).stderr, f"{args[0]} into a file shows no bar")
finally:
    shutil.rmtree(work, ignore_errors=True)
finish()
