#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's own GGUF parser (npm) reads the adapter: keys, names, shapes, types."""
import json
import os
import subprocess
import sys
import tempfile

from support import node_packages, run, skip, tiny_adapter, tiny_llama

program, build = sys.argv[1:3]
packages = node_packages(build)
script = """
const url = require('url'), path = require('path');
const dir = process.argv[1];
import(url.pathToFileURL(path.join(dir, 'node_modules/@huggingface/gguf/dist/index.mjs'))).then(async ({gguf}) => {
  const {metadata, tensorInfos} = await gguf(process.argv[2], {allowLocalFile: true});
  console.log(JSON.stringify({metadata, tensorInfos}, (k, v) => typeof v === 'bigint' ? Number(v) : v));
});
"""
with tempfile.TemporaryDirectory() as d:
    weights = tiny_llama(d + "/base")
    tiny_adapter(d + "/adapter", weights, False)
    for dtype, number in [("f32", 0), ("f16", 1), ("bf16", 30)]:
        run(program, "convert", d + "/adapter", "--to", "gguf", "-o", d + "/a.gguf", "--base", d + "/base", "--dtype", dtype)
        try:
            r = subprocess.run(["node", "-e", script, packages, d + "/a.gguf"], capture_output=True, text=True, timeout=120)
        except OSError as e:
            skip(f"node does not run: {e}")
        assert r.returncode == 0, r.stderr
        parsed = json.loads(r.stdout)
        m = parsed["metadata"]
        assert m["general.type"] == "adapter" and m["general.architecture"] == "llama" and m["adapter.type"] == "lora"
        assert m["adapter.lora.alpha"] == 6 and m["version"] == 3
        tensors = {t["name"]: t for t in parsed["tensorInfos"]}
        assert len(tensors) == 2 * 15, len(tensors)
        assert tensors["blk.1.attn_q.weight.lora_a"]["shape"] == [64, 4]
        assert tensors["blk.1.attn_k.weight.lora_b"]["shape"] == [4, 32]
        assert tensors["blk.0.ffn_up.weight.lora_a"]["shape"] == [64, 3]
        assert tensors["token_embd.weight.lora_a"]["shape"] == [4, 288]
        assert all(t["dtype"] == number for t in tensors.values())
print("@huggingface/gguf reads the adapter")
