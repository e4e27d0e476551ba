#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The session in docs/tool.md, line by line as it stands there, on a small Llama; a stand-in for PEFT trains and saves."""
import json
import os
import shlex
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
from support import np, read_safetensors, tiny_llama, write_safetensors

program = os.path.abspath(sys.argv[1])
page = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "docs", "tool.md")).read()
lines = page.split("```sh\n", 1)[1].split("```", 1)[0].splitlines()
assert sum(line.startswith("lowrank ") for line in lines) >= 8 and sum(line.startswith("# train") for line in lines) == 1

with tempfile.TemporaryDirectory() as d:
    W = tiny_llama(d + "/model")
    for line in lines:
        if line.startswith("# train"):  # PEFT keeps what it knows of the configuration, and nothing else
            t = read_safetensors(d + "/adapter/adapter_model.safetensors")
            rng = np.random.default_rng(0)
            os.makedirs(d + "/trained")
            write_safetensors(d + "/trained/adapter_model.safetensors", {k: v + 0.01 * rng.standard_normal(v.shape).astype(np.float32) for k, v in t.items()})
            config = json.load(open(d + "/adapter/adapter_config.json"))
            assert os.path.samefile(config["base_model_name_or_path"], d + "/adapter/base")
            json.dump(config, open(d + "/trained/adapter_config.json", "w"))
            continue
        words = shlex.split(line)
        assert words[0] == "lowrank", line
        r = subprocess.run([program, *words[1:]], cwd=d, capture_output=True, text=True)
        assert r.returncode == 0 and r.stdout and not r.stderr, (line, r.stderr)
        if "--dry-run" in words:
            assert not os.path.exists(f"{d}/{words[words.index('-o') + 1]}"), line
    # both ways end at the same weights
    r = subprocess.run([program, "merge", "model", "plain", "-o", "merged-again"], cwd=d, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    merged, again = (read_safetensors(f"{d}/{m}/model.safetensors") for m in ("merged", "merged-again"))
    assert all(np.allclose(merged[n], again[n], atol=1e-5) for n in W) and any(not np.allclose(merged[n], W[n], atol=1e-3) for n in W)
print("the session of the docs runs")
