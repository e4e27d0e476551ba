#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp (npm's node-llama-cpp) loads the adapter on a tiny Llama and predicts what the arithmetic in double says."""
import json
import os
import subprocess
import sys
import tempfile

from support import next_token_logits, node_packages, np, run, skip, tiny_adapter, tiny_llama, write_base_gguf

program, build = sys.argv[1:3]
packages = node_packages(build)
script = """
const url = require('url'), path = require('path');
const [dir, base, adapter, tokens] = process.argv.slice(1);
(async () => {
  const {getLlama, LlamaLogLevel} = await import(url.pathToFileURL(path.join(dir, 'node_modules/node-llama-cpp/dist/index.js')));
  const llama = await getLlama({gpu: false, build: 'never', logLevel: LlamaLogLevel.error, progressLogs: false});
  const model = await llama.loadModel({modelPath: base});
  const context = await model.createContext({contextSize: 64, ...(adapter === 'none' ? {} : {lora: {adapters: [{filePath: adapter}]}})});
  const sequence = context.getSequence(), ids = JSON.parse(tokens);
  const input = ids.map((t, i) => i + 1 < ids.length ? t : [t, {generateNext: {logits: true}}]);
  const out = await sequence.controlledEvaluate(input);
  const logits = [...out[ids.length - 1].next.logits.entries()].sort((a, b) => a[0] - b[0]);
  console.log('LOGITS ' + JSON.stringify(logits));
  await llama.dispose();
})().catch(e => { console.error(String(e && e.stack || e)); process.exit(3); });
"""
tokens = [1, 40, 270, 7, 99, 3, 200, 262, 55]


def predict(base, adapter):
    try:
        r = subprocess.run(["node", "-e", script, packages, base, adapter, json.dumps(tokens)], capture_output=True, text=True, timeout=300)
    except OSError as e:
        skip(f"node does not run: {e}")
    if r.returncode != 0 and any(s in r.stderr for s in ("NoBinaryFound", "prebuilt", "GLIBC", "Cannot find module")):
        skip("node-llama-cpp has no binary for this machine: " + r.stderr.strip().splitlines()[0])
    assert r.returncode == 0, r.stderr[-2000:]
    line = next(x for x in r.stdout.splitlines() if x.startswith("LOGITS "))
    pairs = json.loads(line[7:])
    logits = np.full(288, np.nan)
    for token, value in pairs:
        logits[token] = value
    assert not np.isnan(logits).any()
    return logits


def probabilities(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


with tempfile.TemporaryDirectory() as d:
    weights = tiny_llama(d + "/base")
    write_base_gguf(d + "/base.gguf", weights)
    plain = probabilities(next_token_logits(weights, tokens))
    # llama.cpp keeps keys and values in f16 (relative error 2^-11 each); a handful of such roundings reach the logits.
    tolerance = 8 * 2.0**-11
    got = probabilities(predict(d + "/base.gguf", "none"))
    print(f"base alone: largest difference of a probability {np.abs(got - plain).max():.2e}")
    assert np.abs(got - plain).max() <= tolerance * plain.max()
    for rslora in (False, True):
        deltas = tiny_adapter(d + "/adapter", weights, rslora)
        want = probabilities(next_token_logits({k: w + deltas.get(k, 0) for k, w in weights.items()}, tokens))
        assert np.abs(want - plain).max() > 20 * tolerance * want.max(), "the adapter must matter"
        for dtype in ("f32", "f16"):
            run(program, "convert", d + "/adapter", "--to", "gguf", "-o", d + "/a.gguf", "--base", d + "/base", "--dtype", dtype)
            got = probabilities(predict(d + "/base.gguf", d + "/a.gguf"))
            worst = np.abs(got - want).max()
            print(f"adapter {dtype}, rank-stabilised {rslora}: largest difference of a probability {worst:.2e}, of {want.max():.2f}")
            assert worst <= tolerance * want.max()
print("llama.cpp agrees")
