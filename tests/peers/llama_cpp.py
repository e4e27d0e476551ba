#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp (npm's node-llama-cpp) loads the adapter on a tiny Llama and predicts what the arithmetic in double says.

How close it must come is computed, not chosen. llama.cpp multiplies in attention, and with an adapter in f16, after rounding both
operands to f16; everything else is f32. The same forward pass in double, with every such operand off by a random relative
error of at most 2^-11, says what that does to the probabilities. llama.cpp's own roundings are one draw more: it may not be
twice as far off as the worst of 20.
"""
import json
import os
import subprocess
import sys
import tempfile

from support import deltas, next_token_logits, node_packages, np, run, skip, tiny_adapter, tiny_llama, write_base_gguf

program, build = sys.argv[1:3]
packages = node_packages(build)
script = """
const url = require('url'), path = require('path');
const [dir, base, adapter, tokens] = process.argv.slice(1);
(async () => {
  const {getLlama, LlamaLogLevel} = await import(url.pathToFileURL(path.join(dir, 'node_modules/node-llama-cpp/dist/index.js')));
  const llama = await getLlama({gpu: false, build: 'never', logLevel: LlamaLogLevel.error, progressLogs: false});
  const model = await llama.loadModel({modelPath: base});
  const context = await model.createContext({contextSize: 64, flashAttention: false, ...(adapter === 'none' ? {} : {lora: {adapters: [{filePath: adapter}]}})});
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


def f16_error(weights, factors, exact, adapter_too):
    """The worst change of a probability by f16's roundings, of 20 draws."""
    rng = np.random.default_rng(5)

    def rounded(x):
        return x * (1 + 2.0**-11 * rng.uniform(-1, 1, x.shape))

    draws = [next_token_logits(weights, tokens, factors, rounded, rounded if adapter_too else None) for _ in range(20)]
    return max(np.abs(probabilities(x) - exact).max() for x in draws)


with tempfile.TemporaryDirectory() as d:
    weights = tiny_llama(d + "/base")
    write_base_gguf(d + "/base.gguf", weights)
    plain = probabilities(next_token_logits(weights, tokens))

    def check(what, got, exact, allowed):
        worst = np.abs(got - exact).max()
        print(f"{what}: largest difference of a probability {worst:.1e}, allowed {allowed:.1e}, largest probability {exact.max():.2f}")
        assert worst <= allowed

    check("base alone", probabilities(predict(d + "/base.gguf", "none")), plain, 2 * f16_error(weights, None, plain, False))
    for rslora in (False, True):
        factors = tiny_adapter(d + "/adapter", weights, rslora)
        want = probabilities(next_token_logits(weights, tokens, factors))
        changes = deltas(factors)
        merged = probabilities(next_token_logits({k: w + changes.get(k, 0) for k, w in weights.items()}, tokens))
        assert np.abs(merged - want).max() < 1e-12
        for dtype in ("f32", "f16"):
            allowed = 2 * f16_error(weights, factors, want, dtype == "f16")
            assert np.abs(want - plain).max() > 20 * allowed, "the adapter must matter"
            run(program, "convert", d + "/adapter", "--to", "gguf", "-o", d + "/a.gguf", "--base", d + "/base", "--dtype", dtype)
            got = probabilities(predict(d + "/base.gguf", d + "/a.gguf"))
            check(f"adapter {dtype}, rank-stabilised {rslora}", got, want, allowed)
print("llama.cpp agrees")
