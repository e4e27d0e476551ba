#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""An adapter whose base was changed with it (PiSSA, LoftQ, ...) goes into that base and no other, wherever it was moved or saved again."""
import json
import os
import shutil
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
from support import np, read_safetensors, run, tiny_llama, write_safetensors

program = os.path.abspath(sys.argv[1])
FLAG = "--changed-base"


def refused(*args, parts=(), cwd=None):
    r = subprocess.run([program, *map(str, args)], capture_output=True, text=True, cwd=cwd)
    lines = r.stderr.splitlines()
    assert r.returncode == 1 and len(lines) == 1 and all(p in lines[0] for p in parts), (args, r.returncode, r.stderr)


def weights_of(directory):
    return read_safetensors(directory + "/model.safetensors")


def relative(x, y):
    return max(np.linalg.norm(x[n] - y[n]) / np.linalg.norm(y[n]) for n in y)


def saved_by_peft(source, target, drop=(), **settings):
    """What a trainer leaves: its own metadata, its own configuration, no file it does not know."""
    os.makedirs(target)
    write_safetensors(target + "/adapter_model.safetensors", read_safetensors(source + "/adapter_model.safetensors"))
    config = {**json.load(open(source + "/adapter_config.json")), **settings}
    json.dump({k: v for k, v in config.items() if k not in drop}, open(target + "/adapter_config.json", "w"))
    return target


with tempfile.TemporaryDirectory() as d:
    W = tiny_llama(d + "/model")
    shutil.copytree(d + "/model", d + "/copy")
    run(program, "init", "gaussian", d + "/model", "-o", d + "/plain", "--rank", 2, "--targets", "q_proj")
    common = ["--rank", 6, "--targets", "q_proj,down_proj", "--seed", 5]
    for method, extra in [("pissa", []), ("olora", []), ("loftq", []), ("qpissa", ["--packed"])]:
        a = d + "/" + method
        # given relative to a directory that the merge does not start in
        subprocess.run([program, "init", method, "model", "-o", method, *map(str, common), *extra, "-q"], cwd=d, check=True, capture_output=True)
        config = json.load(open(a + "/adapter_config.json"))
        mark = json.load(open(a + "/lowrank.json"))
        assert config["base_model_name_or_path"] == os.path.join(os.path.realpath(d), method, "base") or os.path.samefile(config["base_model_name_or_path"], a + "/base")
        assert os.path.isabs(config["base_model_name_or_path"]) and os.path.isabs(mark["original_base"])
        assert mark["base"] == ("quantized" if "q" in method else "residual") and len(mark["weights"]) == 4 and json.load(open(a + "/base/lowrank.json")) == mark
        merge = lambda base, adapter, *more: ("merge", base, adapter, "-o", d + "/out_" + method, "--allow-lossy", *more)
        back = lambda tolerance: relative(weights_of(d + "/out_" + method), W) <= tolerance
        # the original, under its own name, from elsewhere, as a copy, as a file: never
        for base in (d + "/model", d + "/copy", d + "/copy/model.safetensors"):
            refused(*merge(base, a), parts=[method, FLAG], cwd="/")
            refused(*merge(base, a, "--dry-run"), parts=[method], cwd="/")
        assert not os.path.exists(d + "/out_" + method + "/model.safetensors")
        # its own base, moved or copied, in place or alone: W comes back (a residual base does up to rounding)
        report = json.loads(run(program, *merge(a + "/base", a, "--json")))
        assert report["base"] == "confirmed", report["base"]
        if mark["base"] == "residual":
            assert back(1e-6)
        shutil.copytree(a + "/base", d + "/moved_" + method)
        run(program, *merge(d + "/moved_" + method, a))
        # a trainer saves it again, in place: only lowrank.json is left of the marks
        shutil.copytree(a, d + "/again_" + method)
        write_safetensors(d + f"/again_{method}/adapter_model.safetensors", read_safetensors(a + "/adapter_model.safetensors"))
        refused(*merge(d + "/copy", d + "/again_" + method), parts=[method])
        run(program, *merge(a + "/base", d + "/again_" + method))
        # or somewhere else: only the path of the base is left, where the mark is too
        elsewhere = saved_by_peft(a, d + "/elsewhere_" + method)
        refused(*merge(d + "/copy", elsewhere), parts=[method])
        assert json.loads(run(program, *merge(a + "/base", elsewhere, "--json")))["base"] == "confirmed"
        # the metadata alone suffices too
        os.makedirs(d + "/tensors_" + method)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(a + "/" + name, d + "/tensors_" + method)
        json.dump({**config, "base_model_name_or_path": "somebody/model"}, open(d + f"/tensors_{method}/adapter_config.json", "w"))
        refused(*merge(d + "/copy", d + "/tensors_" + method), parts=[method])
        run(program, *merge(a + "/base", d + "/tensors_" + method))
        # somebody who knows better may say so, and the report repeats it
        assert json.loads(run(program, *merge(d + "/copy", a, FLAG, "--json")))["base"] == "asserted"
        # the reverse, an adapter of whatever on a base that was changed with another
        stranger = saved_by_peft(d + "/plain", d + "/stranger_" + method)
        refused(*merge(a + "/base", stranger), parts=["no mark", "another", method, FLAG])
        assert json.loads(run(program, *merge(a + "/base", stranger, FLAG, "--json")))["base"] == "asserted"
        assert json.loads(run(program, *merge(d + "/model", stranger, "--json")))["base"] == "original"
        report = json.loads(run(program, "inspect", a, "--json"))
        assert (report["base"], report["init_method"], report["base_fingerprints"]) == (mark["base"], method, 4)
        # no other command forgets it
        refused("combine", a, "-o", d + "/c", parts=["only one"])
        refused("combine", a, a, "-o", d + "/c", "--weights", "0.5,0.5", parts=["only one"])
        refused("convert", a, "--to", "gguf", "-o", d + "/a.gguf", "--base", d + "/model", parts=[FLAG])
        run(program, "convert", a, "--to", "gguf", "-o", d + "/a.gguf", "--base", d + "/model", FLAG)
        os.remove(d + "/a.gguf")
        for command in (["resize", a, "-o", d + "/r_" + method, "--rank", 3], ["convert", a, "--to", "peft", "-o", d + "/p_" + method]):
            run(program, *command)
            assert json.load(open(str(command[command.index("-o") + 1]) + "/lowrank.json")) == mark
            refused(*merge(d + "/copy", command[command.index("-o") + 1]), parts=[method])
        r = subprocess.run([program, "convert", a, "--to", "npz", "-o", d + "/a.npz"], capture_output=True, text=True)
        assert r.returncode == 0 and "does not say" in r.stderr, r.stderr
        # one changed weight of four is enough to be another base
        other = dict(weights_of(a + "/base"))
        name = sorted(mark["weights"])[2]
        other[name] = other[name].copy()
        other[name].flat[7] = 0.25 if "--packed" not in extra else other[name].flat[7] ^ 1
        os.makedirs(d + "/other_" + method)
        if "--packed" not in extra:
            write_safetensors(d + f"/other_{method}/model.safetensors", other)
            refused(*merge(d + "/other_" + method, a), parts=[name, "another one"])
        # an adapter that lacks a module whose weight was changed
        t = {k: v for k, v in read_safetensors(a + "/adapter_model.safetensors").items() if "layers.1.mlp" not in k}
        shutil.copytree(a, d + "/less_" + method)
        write_safetensors(d + f"/less_{method}/adapter_model.safetensors", t)
        refused(*merge(a + "/base", d + "/less_" + method), parts=["layers.1.mlp.down_proj", "no factors"])

    # undo leads back to the original, and takes the marks away, from the place too where a changed adapter was before
    run(program, "undo", d + "/elsewhere_pissa", "--initial", d + "/pissa", "-o", d + "/undone")
    assert not os.path.exists(d + "/undone/lowrank.json")
    assert json.loads(run(program, "merge", d + "/copy", d + "/undone", "-o", d + "/out_undone", "--json", "--min-correlation", -1))["base"] == "original"
    assert relative(weights_of(d + "/out_undone"), W) < 1e-6  # nothing was trained
    refused("undo", d + "/elsewhere_olora", "--initial", d + "/pissa", "-o", d + "/bad", parts=["another changed base"])
    shutil.copytree(d + "/pissa", d + "/reused")
    shutil.rmtree(d + "/reused/base")  # which would pass for the base of what comes
    run(program, "undo", d + "/elsewhere_pissa", "--initial", d + "/pissa", "-o", d + "/reused")
    assert not os.path.exists(d + "/reused/lowrank.json")
    run(program, "merge", d + "/copy", d + "/reused", "-o", d + "/out_undone", "--min-correlation", -1)

    # PEFT's own: the initialiser's name is the only mark, nothing tells which base it was
    for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something_new"):
        peft = saved_by_peft(d + "/undone", d + "/peft_" + init, init_lora_weights=init, base_model_name_or_path="somebody/model")
        for base in (d + "/copy", d + "/pissa/base"):
            refused("merge", base, peft, "-o", d + "/out_peft", parts=[init, FLAG])
        assert json.loads(run(program, "merge", d + "/copy", peft, "-o", d + "/out_peft", FLAG, "--json", "--min-correlation", -1))["base"] == "asserted"
        refused("convert", peft, "--to", "gguf", "-o", d + "/a.gguf", "--base", d + "/model", parts=[init])
        refused("combine", peft, "-o", d + "/c", parts=[init])
        # true in the file, so that PEFT does not initialise again; the mark moves to lowrank.json
        run(program, "resize", peft, "-o", d + "/small_" + init, "--rank", 2)
        assert json.load(open(d + f"/small_{init}/adapter_config.json"))["init_lora_weights"] is True
        assert json.load(open(d + f"/small_{init}/lowrank.json"))["method"] == init
        refused("merge", d + "/copy", d + "/small_" + init, "-o", d + "/out_peft", parts=[init, FLAG])
    for init in (True, False, "gaussian", "eva", "orthogonal"):  # these leave the base as it is
        peft = saved_by_peft(d + "/undone", d + f"/kept_{init}", init_lora_weights=init)
        assert json.loads(run(program, "merge", d + "/copy", peft, "-o", d + "/out_peft", "--json", "--min-correlation", -1))["base"] == "original"

    # a mark that cannot be read is an error, not no mark
    shutil.copytree(d + "/undone", d + "/broken")
    for text in ("{", "[]", '{"base":"none"}', '{"base":"residual","weights":[1]}', '{"base":"residual","weights":{"w":3}}'):
        open(d + "/broken/lowrank.json", "w").write(text)
        refused("merge", d + "/copy", d + "/broken", "-o", d + "/out_peft", parts=["lowrank.json"])

    # a head that the base ties to its embedding has no place in a GGUF file
    tied = {**json.load(open(d + "/model/config.json")), "tie_word_embeddings": True}
    run(program, "init", "gaussian", d + "/model", "-o", d + "/head", "--rank", 2, "--targets", "lm_head")
    run(program, "convert", d + "/head", "--to", "gguf", "-o", d + "/h.gguf", "--base", d + "/model")
    json.dump(tied, open(d + "/copy/config.json", "w"))
    refused("convert", d + "/head", "--to", "gguf", "-o", d + "/h.gguf", "--base", d + "/copy", parts=["lm_head", "tie_word_embeddings"])
print("changed bases are recognised")
