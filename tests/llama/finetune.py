#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The program `finetune` as a user runs it: killed and resumed, interrupted, told to write over its base. Standard library only.

    finetune.py FINETUNE [WORD...]      only the checks whose name holds one of the words
"""
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time

program, words = sys.argv[1], sys.argv[2:]
# One thread: bits must not depend on how busy the machine is, and these models are too small for two.
environment = {**os.environ, "OMP_NUM_THREADS": "1"}
SHAPE = ["--hidden", "32", "--intermediate", "48", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"]
LIGHT = ["--batch", "2", "--window", "16", "--eval-windows", "8", "--rank", "4"]


def start(*args):
    return subprocess.Popen([program, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(*args, code=0):
    p = start(*args)
    out, err = p.communicate(timeout=300)
    assert p.returncode == code, f"{args}: exit {p.returncode}, expected {code}\n{err}"
    return out + err


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
        common = ["--base", base, "--target", target, "--method", method, "--steps", 500, *LIGHT, "--lora-plus", 4]
        if method != "full":
            common += ["--dropout", 0.1]
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
    assert "expected a folder for the states of 2 trainings" in run(*changed(common, "--method", "lora,pissa"), *keep, "--resume", code=1)
    run(*common, "--resume", code=2)
    assert "keeps no states" in run(*common, *keep, "--sweep", 0.1, code=1)
    assert "cannot join" in run(*common, *keep, "--resume", "--track", d + "/t.csv", code=1)


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
        assert "--save: expected a place outside the base's folder" in said and "step " not in said, said
    said = run("--base", d + "/out/full", *alone, "--checkpoint", d + "/out/full/model.safetensors", code=1)
    assert "--checkpoint: expected a place outside" in said, said
    assert files_of(d + "/out") == before
    run("--base", d + "/out/full", *alone, "--save", d + "/out")  # lora/ is beside full/: allowed


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
        got = run(*common, *wrong, code=1)
        assert said in got and "step " not in got, f"{wrong}: {got}"


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


with tempfile.TemporaryDirectory() as top:
    text = prose(top + "/target.txt", 1)
    run("--source", prose(top + "/source.txt", 2), "--target", text, "--method", "full", "--steps", 1, "--base-steps", 60, *SHAPE, *LIGHT, "--save", top + "/made")
    for check in (never_over_its_base, mistakes_come_before_training, kill_and_resume, other_settings, interrupted_in_the_second, base_is_resumed_too, the_model_stays_itself):
        if words and not any(w in check.__name__ for w in words):
            continue
        folder = os.path.join(top, check.__name__)
        os.mkdir(folder)
        begin = time.time()
        check(folder, top + "/made/base", text)
        print(f"{check.__name__}: ok, {time.time() - begin:.1f} s", flush=True)
