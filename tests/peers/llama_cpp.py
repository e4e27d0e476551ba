#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp (npm's node-llama-cpp) loads the adapter on a tiny Llama and predicts what the arithmetic in double says.

See llama_peer.py for how close it must come.
"""
import sys
import tempfile

from llama_peer import check, f16_error, predict, probabilities, tokens
from support import deltas, next_token_logits, node_packages, np, run, tiny_adapter, tiny_llama, write_base_gguf

program, build = sys.argv[1:3]
packages = node_packages(build)

with tempfile.TemporaryDirectory() as d:
    weights = tiny_llama(d + "/base")
    write_base_gguf(d + "/base.gguf", weights)
    plain = probabilities(next_token_logits(weights, tokens))

    check("base alone", probabilities(predict(packages, d + "/base.gguf", "none")), plain, 2 * f16_error(weights, None, plain, False))
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
            got = probabilities(predict(packages, d + "/base.gguf", d + "/a.gguf"))
            check(f"adapter {dtype}, rank-stabilised {rslora}", got, want, allowed)
print("llama.cpp agrees")
