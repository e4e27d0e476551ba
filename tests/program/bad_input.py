#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the lowrank program says to files that are wrong: exit 1, one line that names the culprit, nothing written or lost."""
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
from support import np, read_safetensors, run, tiny_adapter, tiny_llama, write_safetensors

program = sys.argv[1]
count = 0


def fails(part, *args, limit=None, seconds=20):
    """The program refuses with one line on stderr that holds `part`, and nothing on stdout."""
    global count
    count += 1
    before = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    r = subprocess.run([program, *map(str, args)], capture_output=True, text=True, timeout=seconds, preexec_fn=before)
    lines = r.stderr.splitlines()
    assert r.returncode == 1 and len(lines) == 1 and part in lines[0] and r.stdout == "", (args, r.returncode, r.stderr, r.stdout)
    assert len(lines[0]) < 2000, len(lines[0])


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    open(path, "wb").write(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


with tempfile.TemporaryDirectory() as d:
    weights = tiny_llama(d + "/base")
    factors = tiny_adapter(d + "/adapter", weights, False)
    whole = open(d + "/base/model.safetensors", "rb").read()
    eight = b"\0" * 8

    def two(a, b):  # JSON with the same key twice, which a dict cannot hold
        return b'{"w":' + json.dumps(a).encode() + b',"w":' + json.dumps(b).encode() + b"}"

    files = {
        "nothing": b"", "short": b"\1\2\3", "truncated_header": whole[:200], "truncated_data": whole[:-1], "trailing": whole + b"x",
        "not_json": struct.pack("<Q", 8) + b"nonsense", "bomb": struct.pack("<Q", 2**63) + whole[8:], "long": struct.pack("<Q", 10**8 + 1) + whole[8:],
    }
    for name, content in files.items():
        open(f"{d}/{name}.safetensors", "wb").write(content)
    headers = {
        "overlap": ({"v": tensor(0, 8), "w": tensor(4, 12)}, b"\0" * 12), "hole": ({"v": tensor(0, 4), "w": tensor(8, 12)}, b"\0" * 12), "late": ({"w": tensor(4, 8)}, eight),
        "beyond": ({"w": tensor(0, 16)}, eight), "backwards": ({"w": tensor(8, 0, [2])}, eight), "twice": (two(tensor(0, 4), tensor(4, 8)), eight),
        "field_twice": (b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', eight), "metadata_twice": (b'{"__metadata__":{"a":"b","a":"c"}}', b""),
        "huge": ({"w": tensor(0, 8, [2**63])}, eight), "product": ({"w": tensor(0, 8, [2**32, 2**32, 2])}, eight), "beyond_u64": (b'{"w":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]}}', eight),
        "negative": ({"w": tensor(0, 8, [-2])}, eight), "fraction": (b'{"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', eight), "small": ({"w": tensor(0, 8, [3])}, eight),
        "dtype": ({"w": tensor(0, 8, dtype="F33")}, eight), "number": ({"w": {**tensor(0, 8), "dtype": 3}}, eight), "no_shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, eight),
        "array": (b"[1,2]", b""), "deep": (b'{"w":' + b"[" * 100000, b""), "utf8": (b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', eight),
        "dimensions": ({"w": tensor(0, 8, [1] * 70 + [2])}, eight),
    }
    for name, (header, data) in headers.items():
        raw(f"{d}/{name}.safetensors", header, data)
    for name in [*files, *headers]:
        path = f"{d}/{name}.safetensors"
        fails(path, "inspect", path)
        fails(path, "init", "pissa", path, "-o", d + "/out", "--rank", 2)
        fails(path, "merge", path, d + "/adapter", "-o", d + "/out")
        assert not os.path.exists(d + "/out/adapter_config.json") and not os.path.exists(d + "/out/model.safetensors")
    # an extent of 2^63 is legal where another is 0: it is read, and no matrix to adapt
    fails("", "init", "pissa", raw(d + "/empty.safetensors", {"w.weight": tensor(0, 0, [2**63, 0])}), "-o", d + "/out", "--rank", 2)

    # a name that needs a file gets something else
    os.makedirs(d + "/dir.safetensors")
    fails("dir.safetensors", "inspect", d + "/dir.safetensors")
    fails("dir.safetensors", "merge", d + "/dir.safetensors", d + "/adapter", "-o", d + "/out")
    os.symlink(d + "/nowhere", d + "/dangling.safetensors")
    fails("dangling.safetensors", "inspect", d + "/dangling.safetensors")
    os.symlink(d + "/loop.safetensors", d + "/loop.safetensors")
    fails("loop.safetensors", "inspect", d + "/loop.safetensors")
    os.mkfifo(d + "/fifo.safetensors")
    fails("fifo.safetensors", "inspect", d + "/fifo.safetensors")
    fails("/dev/null", "merge", "/dev/null", d + "/adapter", "-o", d + "/out")
    os.makedirs(d + "/model_is_dir/model.safetensors")
    fails("model_is_dir", "init", "pissa", d + "/model_is_dir", "-o", d + "/out")
    os.makedirs(d + "/empty_dir")
    fails("empty_dir", "init", "pissa", d + "/empty_dir", "-o", d + "/out")
    # a link to a regular file is how hub caches look: it reads
    os.makedirs(d + "/linked")
    os.symlink(d + "/base/model.safetensors", d + "/linked/model.safetensors")
    run(program, "inspect", d + "/linked")
    # but nothing is written through a link, over a directory or a device
    shutil.copytree(d + "/linked", d + "/target", symlinks=True)
    fails("model.safetensors", "merge", d + "/base", d + "/adapter", "-o", d + "/target")
    assert open(d + "/base/model.safetensors", "rb").read() == whole
    fails("model.safetensors", "merge", d + "/base", d + "/adapter", "-o", d + "/model_is_dir")
    fails("/dev/full", "convert", d + "/adapter", "--to", "npz", "-o", "/dev/full")
    fails("config.json", "init", "kaiming", d + "/base", "-o", d + "/base/config.json", "--rank", 2)

    # shards
    def sharded(name, index, files=("a.safetensors",)):
        os.makedirs(f"{d}/{name}")
        for f in files:
            raw(f"{d}/{name}/{f}", {f[0] + ".weight": tensor(0, 16, [2, 2])}, b"\0" * 16)
        text = index if isinstance(index, bytes) else json.dumps(index).encode()
        open(f"{d}/{name}/model.safetensors.index.json", "wb").write(text)
        return f"{d}/{name}"

    whole_map = {"a.weight": "a.safetensors"}
    for name, index, files, part in [
        ("absent", {"weight_map": {**whole_map, "b.weight": "b.safetensors"}}, ["a.safetensors"], "b.safetensors"),
        ("elsewhere", {"weight_map": {"b.weight": "a.safetensors"}}, ["a.safetensors"], "b.weight"),
        ("upwards", {"weight_map": {"a.weight": "../base/model.safetensors"}}, ["a.safetensors"], "not a plain file name"),
        ("absolute", {"weight_map": {"a.weight": d + "/base/model.safetensors"}}, ["a.safetensors"], "not a plain file name"),
        ("no_map", {"metadata": {}}, ["a.safetensors"], "weight_map"), ("map_of_numbers", {"weight_map": {"a.weight": 3}}, ["a.safetensors"], "weight_map"),
        ("mapped_twice", b'{"weight_map":{"a.weight":"a.safetensors","a.weight":"a.safetensors"}}', ["a.safetensors"], "a.weight"),
        ("no_json", b"{", ["a.safetensors"], "JSON"),
    ]:
        path = sharded(name, index, files)
        fails(part, "inspect", path)
        fails(part, "init", "kaiming", path, "-o", d + "/out", "--rank", 1)

    # adapters
    tensors = {}
    for name, (s, a, b) in factors.items():
        if "embed" not in name:
            p = "base_model.model." + name[: -len(".weight")]
            tensors[p + ".lora_A.weight"], tensors[p + ".lora_B.weight"] = a.astype(np.float32), b.astype(np.float32)
    config = json.load(open(d + "/adapter/adapter_config.json"))
    first = "base_model.model.model.layers.0.self_attn.q_proj"

    def adapter(name, change=None, **settings):
        t = dict(tensors)
        if change:
            change(t)
        os.makedirs(f"{d}/{name}")
        write_safetensors(f"{d}/{name}/adapter_model.safetensors", t)
        json.dump({**config, **settings}, open(f"{d}/{name}/adapter_config.json", "w"))
        return f"{d}/{name}"

    def stranger(t):
        t["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = np.zeros((3, 64), np.float32)
        t["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = np.zeros((96, 3), np.float32)

    def wide(t):
        t[first + ".lora_A.weight"] = np.zeros((4, 65), np.float32)

    def thin(t):
        t[first + ".lora_B.weight"] = np.zeros((64, 3), np.float32)

    merge = lambda a: ("merge", d + "/base", a, "-o", d + "/out")
    fails("layers.7.mlp.up_proj", *merge(adapter("stranger", stranger)))
    fails("14 of 15 adapter modules match", *merge(d + "/stranger"))
    fails("adapter 64x65", *merge(adapter("wide", wide)))
    fails("lora_B has rank 3", *merge(adapter("thin", thin)))
    fails("the configuration says 5", *merge(adapter("rank", r=5)))
    fails("lora_B", *merge(adapter("half", lambda t: t.pop(first + ".lora_B.weight"))))
    fails("lora_C", *merge(adapter("unknown", lambda t: t.update({first + ".lora_C.weight": np.zeros((4, 4), np.float32)}))))
    fails("peft_type", *merge(adapter("kind", peft_type="IA3")))
    fails("use_dora", *merge(adapter("dora", use_dora=True)))
    fails("r", *merge(adapter("zero", r=0)))
    fails("lora_alpha", *merge(adapter("alpha", lora_alpha="six")))
    shutil.copytree(d + "/adapter", d + "/no_config")
    os.remove(d + "/no_config/adapter_config.json")
    fails("adapter_config.json", *merge(d + "/no_config"))
    shutil.copytree(d + "/adapter", d + "/pickle")
    os.rename(d + "/pickle/adapter_model.safetensors", d + "/pickle/adapter_model.bin")
    fails("pickle", *merge(d + "/pickle"))
    open(d + "/no_config/adapter_config.json", "w").write("[]")
    fails("adapter_config.json", *merge(d + "/no_config"))
    fails("is not an adapter directory", *merge(d + "/base/config.json"))
    fails("q_proj", *merge(adapter("not_finite", lambda t: t.update({first + ".lora_A.weight": np.full((4, 64), np.nan, np.float32)}))))
    assert not os.path.exists(d + "/out/model.safetensors")

    # a weight that is not finite, or of a type that is no number to adapt
    bad = dict(weights)
    bad["model.layers.0.self_attn.q_proj.weight"] = np.where(np.eye(64) > 0, np.inf, 0).astype(np.float32)
    os.makedirs(d + "/infinite")
    write_safetensors(d + "/infinite/model.safetensors", bad)
    fails("q_proj", "init", "pissa", d + "/infinite", "-o", d + "/out", "--rank", 2)
    raw(d + "/whole.safetensors", {"a.q_proj.weight": tensor(0, 64, [4, 4], "I32")}, b"\0" * 64)
    fails("no module that could carry", "init", "pissa", d + "/whole.safetensors", "-o", d + "/out", "--rank", 2, "--targets", "q_proj")
    assert not os.path.exists(d + "/out/adapter_config.json")

    # the same place for input and output, however it is spelt
    os.symlink(d + "/base", d + "/alias")
    config_bytes = open(d + "/base/config.json", "rb").read()
    for place in (d + "/base", d + "/base/", d + "/alias", d + "/base/../base"):
        fails("both input and output", "init", "pissa", d + "/base", "-o", place, "--rank", 2)
        fails("both input and output", "merge", d + "/base", d + "/adapter", "-o", place)
    fails("both input and output", "merge", d + "/base", d + "/adapter", "-o", d + "/adapter")
    fails("both input and output", "resize", d + "/adapter", "-o", d + "/adapter", "--rank", 2)
    fails("both input and output", "merge", d + "/base/model.safetensors", d + "/adapter", "-o", d + "/base/model.safetensors")
    fails("both input and output", "merge", d + "/base/model.safetensors", d + "/adapter", "-o", d + "/base")

    # nor a file of the inputs, nor two reports in one place, nor an adapter where weights are expected
    factors_file, weights_file = d + "/adapter/adapter_model.safetensors", d + "/base/model.safetensors"
    factor_bytes = open(factors_file, "rb").read()
    for option in ("--json", "--csv", "--html"):
        fails("of the input", "spectrum", d + "/base", option, weights_file)
        fails("of the input", "spectrum", d + "/base", "--adapter", d + "/adapter", option, factors_file)
        fails("of the input", "intruders", d + "/base", d + "/adapter", option, factors_file)
        fails("of the input", "compare", d + "/adapter", d + "/adapter", option, factors_file)
        run(program, "spectrum", d + "/base", option, d + "/report", "--csv" if option != "--csv" else "--json", d + "/../" + os.path.basename(d) + "/report", code=2)
    fails("of the input", "convert", d + "/adapter", "--to", "npz", "-o", factors_file)
    fails("of the input", "convert", d + "/adapter", "--to", "gguf", "--base", d + "/base", "-o", d + "/base/config.json")
    fails("of the input", "merge", d + "/base", d + "/adapter", "-o", factors_file)
    for args in (("init", "pissa", d + "/adapter", "-o", d + "/out", "--rank", 2), ("spectrum", d + "/adapter"),
                 ("extract", d + "/adapter", d + "/base", "-o", d + "/out", "--rank", 2), ("merge", d + "/adapter", d + "/adapter", "-o", d + "/out")):
        fails("is an adapter, expected a checkpoint", *args)
    assert open(factors_file, "rb").read() == factor_bytes and not os.path.exists(d + "/report")

    # values that the written type does not hold
    name = next(n for n in read_safetensors(factors_file) if n.endswith("q_proj.lora_B.weight"))
    for value, part in ((1e6, "F16"), (float("nan"), "finite")):
        shutil.copytree(d + "/adapter", d + "/values", dirs_exist_ok=True)
        tensors = read_safetensors(factors_file)
        tensors[name] = tensors[name].copy()
        tensors[name][0, 0] = value
        write_safetensors(d + "/values/adapter_model.safetensors", tensors)
        fails(part, "convert", d + "/values", "--to", "gguf", "--dtype", "f16", "--base", d + "/base", "-o", d + "/values.gguf")
        fails(part if value != value else "range", "convert", d + "/values", "--to", "npz", "--dtype", "f16", "-o", d + "/values.npz")
    run(program, "convert", d + "/adapter", "--to", "npz", "--dtype", "bf16", "-o", d + "/values.npz", code=2)
    run(program, "convert", d + "/adapter", "--to", "npz", "--dtype", "f16", "-o", d + "/values.npz")
    assert all(np.load(d + "/values.npz")[n].dtype == np.float16 for n in np.load(d + "/values.npz") if "lora_" in n)
    for option, value in (("--rank", "nan"), ("--rank", "0"), ("--rank", "9" * 23), ("--alpha", "inf"), ("--alpha", "nan")):
        run(program, "init", "kaiming", d + "/base", "-o", d + "/out", option, value, code=2)

    # the disk is full: what was there before stays as it was, and no temporary file remains
    run(program, "merge", d + "/base", d + "/adapter", "-o", d + "/full")
    before = {f: open(f"{d}/full/{f}", "rb").read() for f in os.listdir(d + "/full")}
    fails("model.safetensors", "merge", d + "/base", d + "/adapter", "-o", d + "/full", limit=100_000)
    assert {f: open(f"{d}/full/{f}", "rb").read() for f in os.listdir(d + "/full")} == before
    run(program, "init", "gaussian", d + "/base", "-o", d + "/again", "--rank", 2)
    before = {f: open(f"{d}/again/{f}", "rb").read() for f in os.listdir(d + "/again") if f != "base"}
    fails("adapter_model.safetensors", "init", "kaiming", d + "/base", "-o", d + "/again", "--rank", 16, limit=20_000)
    assert {f: open(f"{d}/again/{f}", "rb").read() for f in os.listdir(d + "/again") if f != "base"} == before
    for to, name in [("gguf", "a.gguf"), ("npz", "a.npz")]:
        args = ("convert", d + "/adapter", "--to", to, "-o", d + "/" + name, *(("--base", d + "/base") if to == "gguf" else ()))
        run(program, *args)
        content = open(d + "/" + name, "rb").read()
        fails(name, *args, limit=4096)
        assert open(d + "/" + name, "rb").read() == content
    assert not [f for _, _, names in os.walk(d) for f in names if ".partial-" in f]
    with open("/dev/full", "w") as full:  # a report that nobody can read is no success
        r = subprocess.run([program, "inspect", d + "/base"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert r.returncode == 1 and "stdout" in r.stderr, r.stderr

    # the inputs are what they were
    assert open(d + "/base/model.safetensors", "rb").read() == whole and open(d + "/base/config.json", "rb").read() == config_bytes
print(f"{count} wrong inputs refused, each with one line")
