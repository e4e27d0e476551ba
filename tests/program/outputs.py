#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What an output directory holds after a second run into it, after a run that was killed or found the disk full, and for other readers."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
from support import np, read_safetensors, run, tiny_llama, write_safetensors

program = sys.argv[1]
COMMON = ["--rank", 4, "--targets", "q_proj,up_proj,down_proj"]


def weights_of(directory):
    """As transformers reads it: one file if there is one, else what the index names."""
    if os.path.exists(directory + "/model.safetensors"):
        return read_safetensors(directory + "/model.safetensors")
    index = json.load(open(directory + "/model.safetensors.index.json"))["weight_map"]
    files = {f: read_safetensors(directory + "/" + f) for f in set(index.values())}
    return {n: files[f][n] for n, f in index.items()}


def factors(directory):
    t = read_safetensors(directory + "/adapter_model.safetensors")
    c = json.load(open(directory + "/adapter_config.json"))
    end = ".lora_A.weight"
    return {n[len("base_model.model.") : -len(end)] + ".weight": c["lora_alpha"] / c["r"] * t[n.replace("lora_A", "lora_B")].astype(np.float64) @ a for n, a in t.items() if n.endswith(end)}


def whole(directory, W):
    """base + s·B·A is W: the base and the adapter belong together."""
    base, delta = weights_of(directory + "/base"), factors(directory)
    return all(np.abs(base[n] + delta.get(n, 0) - w).max() < 1e-5 for n, w in W.items())


def everything(directory):
    return {os.path.relpath(p + "/" + f, directory): open(p + "/" + f, "rb").read() for p, _, names in os.walk(directory) for f in names}


def sharded(directory, tensors, parts):
    os.makedirs(directory)
    names, where = list(tensors), {}
    for i in range(parts):
        f = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        mine = names[i * len(names) // parts : (i + 1) * len(names) // parts]
        write_safetensors(f"{directory}/{f}", {n: tensors[n] for n in mine})
        where.update({n: f for n in mine})
    json.dump({"metadata": {}, "weight_map": where}, open(directory + "/model.safetensors.index.json", "w"))
    return directory


with tempfile.TemporaryDirectory() as d:
    W = tiny_llama(d + "/single")
    config = open(d + "/single/config.json", "rb").read()
    sharded(d + "/three", W, 3)
    shutil.copy(d + "/single/config.json", d + "/three")
    V = {n: w + np.float32(0.5) for n, w in W.items()}
    sharded(d + "/five", V, 5)

    # one kind of output into the directory of another: nobody reads yesterday's weights
    for first, second, last in [("single", "three", W), ("three", "single", W), ("three", "five", V), ("five", "single", W), ("single", "five", V)]:
        out = f"{d}/{first}_{second}"
        run(program, "init", "olora", d + "/" + first, "-o", out, *COMMON)
        run(program, "init", "pissa", d + "/" + second, "-o", out, *COMMON)
        assert whole(out, last), (first, second)
        files = sorted(f for f in os.listdir(out + "/base") if "safetensors" in f)
        assert files == sorted(f for f in os.listdir(d + "/" + second) if "safetensors" in f), files
        run(program, "merge", out + "/base", out, "-o", out + "/merged")
    # a file that is none of the checkpoint's stays
    open(d + "/three_five/base/notes.safetensors", "wb").write(b"mine")
    run(program, "init", "pissa", d + "/three", "-o", d + "/three_five", *COMMON)
    assert open(d + "/three_five/base/notes.safetensors", "rb").read() == b"mine"
    # and an input is never among what is removed
    shutil.copytree(d + "/five", d + "/mixed")
    write_safetensors(d + "/mixed/model.safetensors", W)
    r = subprocess.run([program, "merge", d + "/mixed/model-00001-of-00005.safetensors", d + "/single_three", "-o", d + "/mixed", "--changed-base"], capture_output=True, text=True)
    assert r.returncode == 1 and len(os.listdir(d + "/mixed")) == 7, r.stderr

    # the disk is full at the largest shard, which comes last: all old files are intact, none is new
    order = sorted(W, key=lambda n: W[n].size)
    small_first = {n: W[n] for n in order}
    sharded(d + "/growing", small_first, 4)
    sizes = [os.path.getsize(f"{d}/growing/model-{i + 1:05}-of-00004.safetensors") for i in range(4)]
    assert sizes[3] > 2 * sizes[0]
    run(program, "init", "olora", d + "/growing", "-o", d + "/full", *COMMON)
    before = everything(d + "/full")
    for method, limit in [("pissa", sizes[3] - 4096), ("olora", sizes[2] - 4096)]:
        r = subprocess.run([program, "init", method, d + "/growing", "-o", d + "/full", *map(str, COMMON)], capture_output=True, text=True,
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert r.returncode == 1 and len(r.stderr.splitlines()) == 1 and ".safetensors" in r.stderr, r.stderr
        assert everything(d + "/full") == before, method
    # the base fits, the adapter does not: still nothing is new
    names = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    big = ["--rank", 60, "--targets", ",".join(names)]
    limit = sum(60 * sum(w.shape) * 4 for n, w in W.items() if n[:-7].endswith(names)) - 4096
    assert limit > sizes[3]
    r = subprocess.run([program, "init", "pissa", d + "/growing", "-o", d + "/full", *map(str, big)], capture_output=True, text=True,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert r.returncode == 1 and "adapter_model.safetensors" in r.stderr, r.stderr
    assert everything(d + "/full") == before

    # killed at any moment: the old pair, the new pair, or no adapter; never the base of one with the factors of the other
    targets = ["--rank", 4, "--targets", "all-linear"]
    run(program, "init", "olora", d + "/three", "-o", d + "/killed", *targets)
    started = time.time()
    run(program, "init", "pissa", d + "/three", "-o", d + "/timing", *targets)
    takes = time.time() - started
    shutil.copytree(d + "/killed", d + "/before")
    rng, outcomes = np.random.default_rng(1), {"old": 0, "new": 0, "none": 0}
    for trial in range(24):
        shutil.rmtree(d + "/killed")
        shutil.copytree(d + "/before", d + "/killed")
        p = subprocess.Popen([program, "init", "pissa", d + "/three", "-o", d + "/killed", *map(str, targets)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if trial % 2:
            time.sleep(takes * rng.uniform(0.3, 1.1))
        else:  # while files are put in place
            while p.poll() is None and os.path.exists(d + "/killed/adapter_config.json"):
                pass
            time.sleep(0.002 * (trial // 2))
        p.send_signal(signal.SIGKILL)
        p.wait()
        if not os.path.exists(d + "/killed/adapter_config.json"):
            outcomes["none"] += 1
            continue
        assert whole(d + "/killed", W), trial
        method = json.load(open(d + "/killed/lowrank.json"))["method"]
        assert json.load(open(d + "/killed/base/lowrank.json"))["method"] == method
        outcomes["old" if method == "olora" else "new"] += 1
    print("killed:", outcomes)

    # every small file that makes the directory a model goes along; weights of other frameworks, marks and adapters do not
    extras = {"tokenizer.json": b"{}", "added_tokens.json": b"{}", "chat_template.jinja": b"{{ x }}", "modeling_mine.py": b"pass\n", "preprocessor_config.json": b"{}", "README.md": b"card",
              "tokenizer.model": bytes(range(256))}
    others = {"pytorch_model.bin": b"x", "old.gguf": b"x", "adapter_config.json": b"{}", "pytorch_model.bin.index.json": b"{}", ".hidden": b"x"}
    for name, content in {**extras, **others}.items():
        open(d + "/three/" + name, "wb").write(content)
        open(d + "/single/" + name, "wb").write(content)
    open(d + "/single/unrelated.csv", "wb").write(b"1")
    os.makedirs(d + "/three/onnx")
    for command in (["init", "pissa", d + "/three", "-o", d + "/copied"], ["merge", d + "/three", d + "/plain", "-o", d + "/copied/base"]):
        if command[0] == "merge":
            run(program, "init", "gaussian", d + "/three", "-o", d + "/plain", *COMMON)
            shutil.rmtree(d + "/copied/base")
        run(program, *command, *(COMMON if command[0] == "init" else []))
        got = everything(d + "/copied/base")
        assert {n: got[n] for n in got if "safetensors" not in n and n != "lowrank.json"} == {**extras, "config.json": config}, sorted(got)
        assert ("lowrank.json" in got) == (command[0] == "init")
    # beside a checkpoint that is a file: the usual names alone
    run(program, "init", "pissa", d + "/single/model.safetensors", "-o", d + "/of_file", *COMMON)
    assert sorted(os.listdir(d + "/of_file/base")) == ["added_tokens.json", "chat_template.jinja", "config.json", "lowrank.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]

    # a packed base says in config.json how it is packed, and lists the layers that are not
    for extra in ([], ["--double-quant"]):
        run(program, "init", "loftq", d + "/single", "-o", d + "/packed", "--packed", *COMMON, *extra)
        c = json.load(open(d + "/packed/base/config.json"))
        q = c.pop("quantization_config")
        assert c == json.loads(config)
        assert (q["quant_method"], q["load_in_4bit"], q["bnb_4bit_quant_type"], q["bnb_4bit_use_double_quant"], q["bnb_4bit_compute_dtype"]) == ("bitsandbytes", True, "nf4", bool(extra), "float32")
        t = read_safetensors(d + "/packed/base/model.safetensors")
        linear = {n[:-7] for n, w in W.items() if w.ndim == 2 and "embed" not in n}
        packed = {n[: -len(".weight.quant_state.bitsandbytes__nf4")] for n in t if "quant_state" in n}
        assert sorted(q["llm_int8_skip_modules"]) == sorted(linear - packed) and "lm_head" in q["llm_int8_skip_modules"]
        run(program, "merge", d + "/packed/base", d + "/packed", "-o", d + "/packed_merged", "--allow-lossy")
        assert json.load(open(d + "/packed_merged/config.json"))["quantization_config"] == q
    os.makedirs(d + "/bare")
    write_safetensors(d + "/bare/model.safetensors", W)
    r = subprocess.run([program, "init", "loftq", d + "/bare", "-o", d + "/bare_packed", "--packed", *map(str, COMMON)], capture_output=True, text=True)
    assert r.returncode == 0 and "no config.json" in r.stderr, r.stderr

    # a module's random numbers depend on its name alone, not on the others nor on the shards
    same = {}
    for source, targets in [("single", "q_proj"), ("three", "q_proj"), ("three", "all-linear"), ("single", "q_proj,embed_tokens")]:
        run(program, "init", "gaussian", d + "/" + source, "-o", d + "/stream", "--rank", 4, "--targets", targets, "--seed", 9)
        t = read_safetensors(d + "/stream/adapter_model.safetensors")
        for n, a in t.items():
            if "q_proj.lora_A" in n:
                assert np.array_equal(same.setdefault(n, a), a), (n, source, targets)
    values = [a.tobytes() for a in same.values()]
    assert len(set(values)) == len(values) == 2
print("outputs are whole")
