# SPDX-License-Identifier: Apache-2.0
"""llama.cpp by way of npm's node-llama-cpp: what it predicts, and how far from exact arithmetic it may be.

How close it must come is computed, not chosen. llama.cpp multiplies in attention, and with an adapter in f16, after rounding both
operands to f16; everything else is f32. The same forward pass in double, with every such operand off by a random relative
error of at most 2^-11, says what that does to the probabilities. llama.cpp's own roundings are one draw more: it may not be
twice as far off as the worst of 20.
"""
import json
import subprocess

from support import next_token_logits, np, skip

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


def predict(packages, base, adapter):
    """Logits after the last of the tokens; adapter is a file or "none"."""
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


def check(what, got, exact, allowed):
    worst = np.abs(got - exact).max()
    print(f"{what}: largest difference of a probability {worst:.1e}, allowed {allowed:.1e}, largest probability {exact.max():.2f}")
    assert worst <= allowed
