#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The program `finetune` as a user runs it: killed and resumed, interrupted, told to write over its base. Standard library only.

    finetune.py FINETUNE [WORD...]      only the checks whose name holds one of the words
"""
import csv
import errno
import fcntl
import json
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time

program, words = os.path.abspath(sys.argv[1]), sys.argv[2:]
# One thread: bits must not depend on how busy the machine is, and these models are too small for two.
environment = {**os.environ, "OMP_NUM_THREADS": "1"}
SHAPE = ["--hidden", "32", "--intermediate", "48", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"]
LIGHT = ["--batch", "2", "--window", "16", "--eval-windows", "8", "--rank", "4"]


def start(*args, **how):
    return subprocess.Popen([program, *map(str, args)], **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, **how})


def run(*args, code=0, **how):
    p = start(*args, **how)
    out, err = p.communicate(timeout=300)
    assert p.returncode == code, f"{args}: exit {p.returncode}, expected {code}\n{err}"
    return (out or "") + err


def run_on_a_terminal(*args, code=0, columns=80):
    """What the screen shows in the end, line by line: "\\r" goes back, "\\033[K" clears the rest of the line."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    p = start(*args, stdout=theirs, stderr=theirs, text=False)
    os.close(theirs)
    raw = b""
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError as e:  # how a pseudo-terminal says that its last user has closed it
            assert e.errno == errno.EIO
            break
        if not part:
            break
        raw += part
    os.close(mine)
    p.wait(timeout=300)
    screen = []
    for line in raw.decode().split("\n"):
        shown, at = "", 0
        for piece in re.split("(\r|\x1b\\[K)", line):
            if piece == "\r":
                at = 0
            elif piece == "\x1b[K":
                shown = shown[:at]
            else:
                assert "\x1b" not in piece, piece
                shown, at = shown[:at] + piece + shown[at + len(piece) :], at + len(piece)
                assert piece.startswith(" ") or "[#" not in piece and "[." not in piece or at < columns, f"wraps: {piece}"
        screen.append(shown.rstrip())
    assert p.returncode == code, f"{args}: exit {p.returncode}, expected {code}\n" + "\n".join(screen)
    return screen, raw.decode()


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def read(path):
    with open(path, "rb") as f:
        return f.read()


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)


def header(path):
    raw = read(path)
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


def step_of(state):
    try:
        return int(header(state)["__metadata__"]["counter.step"])
    except FileNotFoundError:
        return -1


def prose(path, seed):
    rng = random.Random(seed)
    names, verbs = ["a cat", "the dog", "my bird", "no fish"], ["sees", "likes", "eats"]
    lines = [f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(names)}" for _ in range(600)]
    write(path, "\n".join(lines).encode())
    return path


def files_of(folder):
    return {os.path.join(d, n): read(os.path.join(d, n)) for d, _, names in os.walk(folder) for n in names}


def changed(args, option, value):
    """The arguments with another value of an option, or the option added."""
    if option not in args:
        return [*args, option, value]
    at = args.index(option)
    return [*args[: at + 1], value, *args[at + 2 :]]


def wait_for(process, condition, what):
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[1]}"
        assert time.time() < deadline, f"no {what}"
        time.sleep(0.002)


def kill_and_resume(d, base, target):
    for method in ("lora", "pissa", "full"):
        # The rate is low so that nothing rounds to the same weights; steps enough that the kill comes long before the end.
        common = ["--base", base, "--target", target, "--method", method, "--steps", 500, *(LIGHT if method != "full" else LIGHT[:-2])]
        if method != "full":
            common += ["--dropout", 0.1, "--lora-plus", 4]
        run(*common, "--save", f"{d}/{method}/whole", "--output", f"{d}/{method}/whole")
        keep = ["--checkpoint", f"{d}/{method}/states", "--checkpoint-every", 20]
        state = f"{d}/{method}/states/{method}.state.safetensors"
        begun = start(*common, "--save", f"{d}/{method}/resumed", *keep)
        wait_for(begun, lambda: step_of(state) >= 40, "state of step 40")
        begun.send_signal(signal.SIGKILL)
        begun.communicate()
        assert begun.returncode == -signal.SIGKILL
        at = step_of(state)
        assert 40 <= at < 500 and not os.path.exists(f"{d}/{method}/resumed/{method}"), at
        assert "exists already: --resume goes on" in run(*common, *keep, code=1)
        said = run(*common, "--save", f"{d}/{method}/resumed", "--output", f"{d}/{method}/resumed", *keep, "--resume")
        assert f"goes on at step {at} of 500" in said, said
        whole, resumed = files_of(f"{d}/{method}/whole/{method}"), files_of(f"{d}/{method}/resumed/{method}")
        assert len(whole) >= 2 and list(whole.values()) == list(resumed.values()), "the files differ"
        for name in ("losses.csv", "ranks.csv"):
            assert read(f"{d}/{method}/whole/{name}") == read(f"{d}/{method}/resumed/{name}"), name
        print(f"{method}: killed after step {at}, resumed: the same bytes")


def other_settings(d, base, target):
    common = ["--base", base, "--target", target, "--method", "lora", "--steps", 6, *LIGHT]
    keep = ["--checkpoint", d + "/one.safetensors"]
    assert "expected the state of a run" in run(*common, *keep, "--resume", code=1)
    run(*common, *keep)
    before = read(d + "/one.safetensors")
    for option, value, words in [("--rank", 5, "rank: expected 4, got 5"), ("--seed", 9, "seed of the batches: expected 2, got 10"),
                                 ("--lr", 0.5, "learning rate: expected 0.01, got 0.5"), ("--dropout", 0.25, "dropout: expected 0, got 0.25"),
                                 ("--steps", 7, "steps: expected 6, got 7"), ("--method", "pissa", "method: expected lora, got pissa"),
                                 ("--target", prose(d + "/other.txt", 5), "training text: expected ")]:
        said = run(*changed(common, option, value), *keep, "--resume", code=1)
        assert words in said, said
    assert read(d + "/one.safetensors") == before
    assert "expected a folder for the states of 2 trainings" in run(*changed(common, "--method", "lora,pissa"), *keep, "--resume", code=2)
    run(*common, "--resume", code=2)
    assert "keeps no states" in run(*common, *keep, "--sweep", 0.1, code=2)
    assert "cannot join" in run(*common, *keep, "--resume", "--track", d + "/t.csv", code=2)


def interrupted_in_the_second(d, base, target):
    common = ["--base", base, "--target", target, "--method", "lora,olora", "--steps", 600, *LIGHT]
    run(*common, "--save", d + "/whole")
    for keep in ([], ["--checkpoint", d + "/states"]):
        save = ["--save", d + f"/saved{len(keep)}"]
        begun = start(*common, *save, *keep)
        # The first line of the second method comes when it begins to train.
        said = ""
        while "olora: adapting" not in said:
            line = begun.stderr.readline()
            assert line, "ended early: " + said
            said += line
        begun.send_signal(signal.SIGINT)
        said += begun.communicate(timeout=300)[1]
        assert begun.returncode == 130, said
        assert "of olora" in said and f"saved before that: {save[1]}/lora\n" in said + "\n", said
        assert ("the same command with --resume goes on" in said) == bool(keep), said
        assert os.listdir(save[1]) == ["lora"]
    run(*common, *save, *keep, "--resume")
    for method in ("lora", "olora"):
        assert list(files_of(f"{d}/whole/{method}").values()) == list(files_of(f"{save[1]}/{method}").values()), method
    begun = start(*common)
    while "lora: adapting" not in begun.stderr.readline():
        pass
    begun.send_signal(signal.SIGINT)
    said = begun.communicate(timeout=300)[1]
    assert begun.returncode == 130 and "; no model was saved" in said, said


def base_is_resumed_too(d, base, target):
    common = ["--source", prose(d + "/source.txt", 8), "--target", target, "--method", "lora", "--steps", 5, "--base-steps", 600, *SHAPE, *LIGHT]
    run(*common, "--save", d + "/whole")
    begun = start(*common, "--save", d + "/resumed", "--checkpoint", d + "/states", "--checkpoint-every", 50)
    wait_for(begun, lambda: step_of(d + "/states/base.state.safetensors") >= 50, "state of the base")
    begun.send_signal(signal.SIGKILL)
    begun.communicate()
    run(*common, "--save", d + "/resumed", "--checkpoint", d + "/states", "--checkpoint-every", 50, "--resume")
    for path, data in files_of(d + "/whole").items():
        if not path.endswith("adapter_config.json"):  # which names the base by its place
            assert data == read(path.replace("/whole/", "/resumed/")), path


def never_over_its_base(d, base, target):
    common = ["--method", "full,lora", "--target", target, "--steps", 2, *LIGHT]
    run("--base", base, *common, "--save", d + "/out")
    alone = changed(common, "--method", "lora")
    os.symlink(d + "/out", d + "/alias")
    os.symlink(d + "/out/full", d + "/base-by-another-name")
    before = files_of(d + "/out")
    for from_, save in [(d + "/out/full", d + "/out"), (d + "/out/full", d + "/alias"), (d + "/base-by-another-name", d + "/out"),
                        (d + "/out/full", d + "/out/full"), (d + "/out/full", d + "/out/full/deeper"), (d + "/out/full", d + "/new/../out")]:
        said = run("--base", from_, *common, "--save", save, code=1)
        assert "--save: expected a place outside the base's folder" in said and "steps," not in said, said
    said = run("--base", d + "/out/full", *alone, "--checkpoint", d + "/out/full/model.safetensors", code=1)
    assert "--checkpoint: expected a place outside" in said, said
    assert files_of(d + "/out") == before
    run("--base", d + "/out/full", *alone, "--save", d + "/out", "--overwrite")  # lora/ is beside full/: allowed


def mistakes_come_before_training(d, base, target):
    """A base to be trained for long: every mistake is said at once, without a step of it."""
    common = ["--source", target, "--target", target, "--method", "lora", "--base-steps", 10**6, *SHAPE, "--batch", "2", "--window", "16"]
    write(d + "/file/x", b"")
    for wrong, said in [(("--rank", 0), "--rank: expected at least 1, got 0"), (("--rank", 33), "rank must lie in [1, min(32, 32)] for"),
                        (("--alpha", 0), "--alpha: expected a positive number, got 0"), (("--alpha", "nan"), "--alpha: expected"),
                        (("--dropout", 1), "--dropout: expected a number in [0, 1), got 1"), (("--lora-plus", 0), "--lora-plus: expected"),
                        (("--lora-plus", "nan"), "--lora-plus: expected"), (("--weight-decay", -1), "--weight-decay: expected"),
                        (("--steps", 0), "--steps: expected at least 1"), (("--base-lr", "inf"), "--base-lr: expected"),
                        (("--save", d + "/file/x/y"), "--save: expected a folder that can be written"),
                        (("--output", d + "/file/x/y"), "--output: expected a folder"), (("--track", d + "/file/x/y/t.csv"), "--track: expected a folder")]:
        got = run(*common, *wrong, code=1 if "must lie" in said or "a folder" in said else 2)
        assert said in got and "steps," not in got, f"{wrong}: {got}"


def bf16_copy(base, to, **config):
    """The checkpoint in bf16, and with other keys in config.json."""
    raw = read(base + "/model.safetensors")
    n = struct.unpack("<Q", raw[:8])[0]
    old, new, data = json.loads(raw[8 : 8 + n]), {}, b""
    for name, t in old.items():
        if name != "__metadata__":
            part = raw[8 + n + t["data_offsets"][0] : 8 + n + t["data_offsets"][1]]
            new[name] = {"dtype": "BF16", "shape": t["shape"], "data_offsets": [len(data), len(data) + len(part) // 2]}
            data += b"".join(part[i + 2 : i + 4] for i in range(0, len(part), 4))
    text = json.dumps(new).encode()
    text += b" " * (-len(text) % 8)
    write(to + "/model.safetensors", struct.pack("<Q", len(text)) + text + data)
    settings = {**json.loads(read(base + "/config.json")), **config}
    write(to + "/config.json", json.dumps(settings).encode())
    return settings


def the_model_stays_itself(d, base, target):
    settings = bf16_copy(base, d + "/base", model_type="mistral", architectures=["MistralForCausalLM"], max_position_embeddings=4096,
                         bos_token_id=1, eos_token_id=[2, 3], torch_dtype="bfloat16", a_key_of_tomorrow={"x": [1]})
    write(d + "/base/tokenizer.json", b"{}")
    common = ["--base", d + "/base", "--target", target, "--method", "full,loftq4", "--steps", 3, *LIGHT]
    run(*common, "--save", d + "/out")
    for method in ("full", "loftq4"):
        assert json.loads(read(f"{d}/out/{method}/config.json")) == settings
        assert read(f"{d}/out/{method}/tokenizer.json") == b"{}"
        was, now = header(d + "/base/model.safetensors"), header(f"{d}/out/{method}/model.safetensors")
        assert was.keys() == now.keys() - {"__metadata__"} and all(now[k]["dtype"] == "BF16" for k in was)
    run(*common, "--save", d + "/wide", "--dtype", "f32")
    assert json.loads(read(d + "/wide/full/config.json")) == {**settings, "torch_dtype": "float32"}
    assert {t.get("dtype") for k, t in header(d + "/wide/full/model.safetensors").items() if k != "__metadata__"} == {"F32"}
    run(*common, "--dtype", "f8", code=2)


def tables_stay_on_a_terminal(d, base, target):
    common = ["--base", base, "--target", target, "--method", "lora,full", "--steps", 60, *LIGHT]
    for columns in (200, 40):
        screen, raw = run_on_a_terminal(*common, "--sweep", "0.01,0.02", "--output", d, columns=columns)
        assert "\r" in raw.replace("\r\n", ""), "no bar was drawn: the check has nothing to check"
        cells = {(r["method"], r["learning_rate"]): r for r in rows(d + "/sweep.csv")}
        assert list(cells) == [(m, r) for m in ("lora", "full") for r in ("0.01", "0.02")], cells
        for method in ("lora", "full"):
            losses = [float(cells[method, r]["validation_loss"]) for r in ("0.01", "0.02")]
            assert f"  {method:12} {losses[0]:9.4f} {losses[1]:9.4f}" in screen, "\n".join(screen)
        assert all(r["status"] == "ok" and r["steps"] == "60" for r in cells.values())
        assert not [line for line in screen if "[#" in line or "[." in line], "a bar is left: " + "\n".join(screen)
        assert [n for n in os.listdir(d) if ".partial" in n] == []
    screen, _ = run_on_a_terminal(*common, "--output", d + "/results", columns=100)
    for r in rows(d + "/results/results.csv"):
        assert [line for line in screen if line.split()[:1] == [r["method"]] and f"{float(r['new_domain_loss']):.3f}" in line], "\n".join(screen)
    # What an interrupted sweep has found is not lost.
    begun = start(*changed(common, "--steps", 2000), "--sweep", "0.01,0.02,0.005", "--output", d + "/part")
    wait_for(begun, lambda: os.path.exists(d + "/part/sweep.csv"), "first trial")
    begun.send_signal(signal.SIGINT)
    out, said = begun.communicate(timeout=300)
    assert begun.returncode == 130 and said.startswith("new domain") and "finetune: interrupted at step" in said, said
    found = rows(d + "/part/sweep.csv")
    assert 1 <= len(found) < 6 and f"  lora         {float(found[0]['validation_loss']):9.4f}" in out, out


def one_diverges(d, base, target):
    common = ["--base", base, "--target", target, "--method", "lora,full,pissa", "--steps", 8, *LIGHT]
    said = run(*common, "--lr", "full=1e30", "--output", d, "--save", d + "/out", code=3)
    at = re.search(r"finetune: full diverged at step (\d+) of 8, rate 1e\+30: ", said)
    assert at and 1 < int(at[1]) <= 8, said
    results = {r["method"]: r for r in rows(d + "/results.csv")}
    assert [(m, r["status"]) for m, r in results.items()] == [("base", "ok"), ("lora", "ok"), ("full", "diverged"), ("pissa", "ok")]
    assert results["full"]["new_domain_loss"] == "nan" and float(results["pissa"]["new_domain_loss"]) > 0
    losses = [r["method"] for r in rows(d + "/losses.csv")]
    assert losses.count("lora") == losses.count("pissa") == 8 and losses.count("full") == int(at[1]) - 1
    assert re.search(rf"\n  full .*diverged at step {at[1]}\n", said) and re.search(r"\n  pissa .*\d\.\d{3}", said), said
    assert sorted(os.listdir(d + "/out")) == ["lora", "pissa"], "a diverged model is not saved"
    swept = run(*common, "--sweep", "0.01,1e30", "--output", d)  # what a sweep is to find out is no failure
    assert swept.count("diverged at step") == 3, swept
    assert [r["status"] for r in rows(d + "/sweep.csv")] == ["ok", "diverged"] * 3
    made = ["--source", target, *common[2:], *SHAPE, "--base-steps", 8, "--base-lr", 1e30]
    assert "finetune: error: base diverged at step" in run(*made, code=1)


def rates_follow_the_size(d, base, target):
    """The small model keeps the demo's rates; a model of 1.3 million parameters gets lower ones."""
    rate = lambda said, method: float(re.search(rf"\n{method}: .*, rate (\S+)\n", said)[1])
    common = ["--target", target, "--method", "full,lora,pissa", "--steps", 1, *LIGHT]
    small = run("--base", base, *common)
    assert [rate(small, m) for m in ("full", "lora", "pissa")] == [5e-3, 1e-2, 5e-3], small
    shape = ["--hidden", 256, "--intermediate", 512, "--layers", 2, "--heads", 4, "--kv-heads", 2, "--head-dim", 64]
    large = run("--source", target, *common, *shape, "--base-steps", 1, "--save", d)
    n = sum(math.prod(t["shape"]) for k, t in header(d + "/base/model.safetensors").items() if k != "__metadata__")
    for method, demo, usual in (("full", 5e-3, 2e-5), ("lora", 1e-2, 2e-4), ("pissa", 5e-3, 1e-4)):
        # A straight line in the logarithms from (804 k, the demo's) to (7 G, the usual), to two digits.
        share = math.log(n / 804e3) / math.log(7e9 / 804e3)
        assert abs(rate(large, method) / (demo * (usual / demo) ** share) - 1) < 0.05, (method, large)
    given = run("--base", d + "/base", *changed(common, "--method", "lora,pissa"), "--lr", "lora=0.002")
    assert rate(given, "lora") == 0.002 and rate(given, "pissa") == rate(large, "pissa"), given


def nothing_is_ignored(d, base, target):
    made = ["--source", target, "--target", target, "--base-steps", 10**6, *SHAPE, "--batch", "2", "--window", "16"]
    given = ["--base", base, "--target", target, "--steps", 10**6, "--batch", "2", "--window", "16"]
    for begin, wrong, said in [
        (made, "--lr loar=0.5", "--lr: unknown method 'loar'; did you mean 'lora'?"), (made, "--method lorra", "--method: unknown method 'lorra'; did you mean 'lora'?"),
        (made, "--method lora --lr pissa=0.5", "--lr: 'pissa=0.5' has no use: the methods are lora"), (made, "--lr 0.5x", "--lr: expected a positive number"),
        (made, "--lr inf", "--lr: expected"), (made, "--method full,full", "every method once"),
        (made, "--seed -1", "expected a whole number from 0, got -1"), (made, "--seed 1.5", "expected a whole number from 0, got 1.5"),
        (made, "--seed 99999999999999999999", "expected a whole number from 0, got 99999999999999999999"), (made, "--batch 99999999999999999999", "--batch: expected a whole number, got 9"), (made, f"--track {d}/x.txt", "--track: expected a file that ends in .csv or .jsonl"),
        (made, "--method full --rank 3", "--rank: has no use with --method full"), (made, "--method full --lora-plus 2", "--lora-plus: has no use"),
        (made, "--method full --targets mlp", "--targets: has no use"), (given, "--base-steps 3", "--base-steps: has no use with --base"),
        (given, "--tied", "--tied: has no use with --base"), (given, "--token-bits 32", "--token-bits: has no use without .bin files"),
        (given, "--sweep 0.1 --lr 0.2", "--lr: has no use with --sweep"), (given, f"--sweep 0.1 --save {d}/s", "--save: has no use with --sweep and --base"),
        (given, f"--sweep 0.1 --track {d}/t.csv", "--track: has no use with --sweep"), (given, "--sample 5 --sweep 0.1", "--sample: has no use"),
        (given, f"--sweep 0.1 --source {target}", "--source: has no use"), (given, "--overwrite", "--overwrite: has no use without --save"),
        (given, "--dtype f16", "--dtype: has no use without --save"), (given, f"--method lora --dtype f16 --save {d}/s", "--dtype: has no use where only adapters"),
        (given, f"--method full --base-name x/y --save {d}/s", "--base-name: has no use"), (given, "--taget x", "unknown option '--taget'; did you mean '--target'?"),
        (given, "--steps many", "--steps")]:
        got = run(*begin, *wrong.split(), code=2)
        assert got.startswith("finetune: error: ") and got.count("\n") == 1 and said in got, f"{wrong}: {got}"
    assert os.listdir(d) == []
    assert re.fullmatch(r"finetune \(lowrank \d+\.\d+\.\d+\)\n", run("--version"))
    assert "3 done but" in run("--help")


def saved_models_stay(d, base, target):
    shutil.copytree(base, d + "/base")
    common = ["--base", "base", "--target", target, "--method", "full,lora", "--steps", 2, *LIGHT, "--save", "out"]
    run(*common, cwd=d)
    name = lambda path: json.loads(read(path + "/adapter_config.json"))["base_model_name_or_path"]
    assert name(d + "/out/lora") == os.path.realpath(d) + "/base" or name(d + "/out/lora") == d + "/base", name(d + "/out/lora")
    before = files_of(d + "/out")
    said = run(*changed(common, "--steps", 10**6), cwd=d, code=1)  # at once
    assert said == "finetune: error: out/full: exists already; --overwrite replaces it\n", said
    assert files_of(d + "/out") == before
    write(d + "/out/full/of-the-old-one.txt", b"")
    # An interrupted successor leaves the old model as it was.
    begun = start(*changed(common, "--steps", 10**6), "--overwrite", cwd=d)
    while "full: training" not in begun.stderr.readline():
        pass
    begun.send_signal(signal.SIGINT)
    assert begun.wait(timeout=300) == 130
    assert all(read(path) == data for path, data in before.items())
    run(*changed(common, "--steps", 3), "--overwrite", "--base-name", "someone/a-model", cwd=d)
    assert name(d + "/out/lora") == "someone/a-model"
    after = files_of(d + "/out")
    assert after.keys() == before.keys() and after[d + "/out/full/model.safetensors"] != before[d + "/out/full/model.safetensors"]
    assert sorted(os.listdir(d + "/out")) == ["full", "lora"]
    write(d + "/notes/full/novel.txt", b"of a lifetime")
    said = run(*changed(common, "--save", "notes"), "--overwrite", cwd=d, code=1)
    assert "notes/full: is no model's folder, and is not replaced" in said and read(d + "/notes/full/novel.txt"), said
    run("--source", target, "--target", target, "--method", "lora", "--steps", 1, "--base-steps", 1, *SHAPE, *LIGHT, "--save", "own", cwd=d)
    assert os.path.samefile(name(d + "/own/lora"), d + "/own/base") and os.path.isabs(name(d + "/own/lora"))


def leftovers_are_removed(d, base, target):
    common = ["--base", base, "--target", target, "--method", "lora", "--steps", 2, *LIGHT, "--save", d + "/out", "--output", d + "/results", "--checkpoint", d + "/states"]
    stale = [d + "/out/lora.partial-abc123/adapter_model.safetensors", d + "/results/losses.csv.partial-abc123", d + "/states/lora.state.safetensors.partial-Xb1234"]
    others = [d + "/out/mine.partial-abc123", d + "/results/other.csv.partial-abc123"]
    for path in (*stale, *others):
        write(path, b"half")
    said = run(*common)
    for path in stale:
        path = path.replace("/adapter_model.safetensors", "")
        assert f"finetune: removed {path}, which a run that was killed left unfinished\n" in said and not os.path.exists(path), said
    assert all(read(path) == b"half" for path in others)


def the_disk_is_full(d, base, target):
    common = ["--base", base, "--target", target, "--method", "full", "--steps", 2, *LIGHT[:-2]]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # less than a model, a state or a journal
    for wrong, name in [(("--save", d + "/out"), "full"), (("--checkpoint", d + "/states"), "full.state.safetensors")]:
        said = run(*common, *wrong, code=1, preexec_fn=limit)
        last = said.strip().split("\n")[-1]
        assert last.startswith("finetune: error: ") and name in last and "File too large" in last, said
        assert [p for p in files_of(wrong[1]) if os.path.getsize(p)] == [] and not [n for n in os.listdir(wrong[1]) if "partial" in n]
    said = run(*changed(common, "--steps", 400), "--track", d + "/t.csv", code=1, preexec_fn=limit)
    last = said.strip().split("\n")[-1]
    assert last.startswith("finetune: error: ") and "t.csv: cannot append: File too large" in last, said
    with open("/dev/full", "w") as full:
        said = run(*common, "--output", d + "/results", code=1, stdout=full)
    assert "finetune: error: cannot write the tables to stdout: No space left on device" in said, said
    assert len(rows(d + "/results/results.csv")) == 2  # the files are there all the same
    os.mkdir(d + "/small")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", d + "/small"], stderr=subprocess.DEVNULL).returncode != 0:
        print("  a full file system: skipped, mounting a small one needs root")
        return
    try:
        said = run(*common, "--save", d + "/small/out", code=1)
        assert "No space left on device" in said.split("\n")[-2] or "no room for" in said.split("\n")[-2], said
        assert files_of(d + "/small/out") == {}
    finally:
        subprocess.run(["umount", d + "/small"], check=True)


with tempfile.TemporaryDirectory() as top:
    text = prose(top + "/target.txt", 1)
    run("--source", prose(top + "/source.txt", 2), "--target", text, "--method", "full", "--steps", 1, "--base-steps", 60, *SHAPE, *LIGHT[:-2], "--save", top + "/made")
    for check in (never_over_its_base, mistakes_come_before_training, kill_and_resume, other_settings, interrupted_in_the_second, base_is_resumed_too, the_model_stays_itself,
                  tables_stay_on_a_terminal, one_diverges, rates_follow_the_size, nothing_is_ignored, saved_models_stay, leftovers_are_removed, the_disk_is_full):
        if words and not any(w in check.__name__ for w in words):
            continue
        folder = os.path.join(top, check.__name__)
        os.mkdir(folder)
        begin = time.time()
        check(folder, top + "/made/base", text)
        print(f"{check.__name__}: ok, {time.time() - begin:.1f} s", flush=True)
