#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A foreign checkpoint (bf16, three shards, grouped queries) through finetune, convert and llama.cpp.

finetune's losses before and after training are those numpy computes in double from the files; the adapters it saves, LoRA and
PiSSA, become GGUF and make llama.cpp predict what numpy predicts with them. See llama_peer.py for how close that must come.
"""
import csv
import json
import os
import struct
import sys
import tempfile

from llama_peer import check, f16_error, predict, probabilities, tokens
from support import CONFIG, bf16, next_token_logits, node_packages, np, read_safetensors, run, tiny_llama, write_base_gguf

program, build, finetune = sys.argv[1:4]
WINDOW, EVALUATED = 16, 12


def write_shards(directory, tensors, shards):
    """bf16, dealt out so that a layer lies in several files."""
    os.makedirs(directory)
    where, names = {}, list(tensors)
    for s in range(shards):
        file, header, data = f"model-{s + 1:05d}-of-{shards:05d}.safetensors", {}, b""
        for name in names[s::shards]:
            part = (np.ascontiguousarray(tensors[name]).view(np.uint32) >> 16).astype("<u2").tobytes()
            header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [len(data), len(data) + len(part)]}
            where[name], data = file, data + part
        text = json.dumps(header).encode()
        with open(os.path.join(directory, file), "wb") as f:
            f.write(struct.pack("<Q", len(text) + -len(text) % 8) + text + b" " * (-len(text) % 8) + data)
    json.dump({"metadata": {"total_size": 0}, "weight_map": where}, open(directory + "/model.safetensors.index.json", "w"))
    json.dump({**CONFIG, "torch_dtype": "bfloat16"}, open(directory + "/config.json", "w"))


def chain(n):
    """Tokens that mostly follow from the one before: something to learn."""
    rng = np.random.default_rng(3)
    ids = [1]
    while len(ids) < n:
        ids.append(int(rng.integers(288)) if rng.random() < 0.2 else (7 * ids[-1] + 3) % 41 + 40)
    return np.array(ids, np.uint16)


def held_out_loss(ids, weights, factors=None):
    """Over finetune's test windows: the last 6 % of the tokens, windows spread evenly over them."""
    test = ids[len(ids) - int(len(ids) * 0.06) :].astype(int)
    available, losses = (len(test) - 1) // WINDOW, []
    for i in range(min(EVALUATED, available)):
        at = available * i // min(EVALUATED, available) * WINDOW
        for t in range(WINDOW):
            z = next_token_logits(weights, test[at : at + t + 1], factors)
            losses.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[test[at + t + 1]])
    return np.mean(losses)


def read_adapter(directory):
    config, tensors = json.load(open(directory + "/adapter_config.json")), read_safetensors(directory + "/adapter_model.safetensors")
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    factors = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == config["r"]
            module = name[len("base_model.model.") : -len(".lora_A.weight")]
            factors[module + ".weight"] = (config["lora_alpha"] / config["r"], a.astype(np.float64), b.astype(np.float64))
    return factors


with tempfile.TemporaryDirectory() as d:
    weights = {k: bf16(w) for k, w in tiny_llama(d + "/made").items()}
    write_shards(d + "/base", weights, 3)
    ids = chain(6000)
    np.save(d + "/ids.npy", ids)
    run(finetune, "--base", d + "/base", "--target", d + "/ids.npy", "--method", "lora,pissa", "--rank", 4, "--alpha", 6, "--steps", 60, "--batch", 4,
        "--window", WINDOW, "--eval-windows", EVALUATED, "--lora-plus", 2, "--save", d + "/out", "--output", d + "/results")
    results = {r["method"]: r for r in csv.DictReader(open(d + "/results/results.csv"))}
    adapters = {method: read_adapter(f"{d}/out/{method}") for method in ("lora", "pissa")}
    for method in ("base", "lora", "pissa"):
        want, got = held_out_loss(ids, weights, adapters.get(method)), float(results[method]["new_domain_loss"])
        # Six digits are printed. finetune sums in float: 2^-24 a rounding, some hundred in a row, on logits of about 10.
        print(f"{method}: loss {got:.6f}, by numpy {want:.6f}")
        assert abs(got - want) < 5e-7 + 100 * 2.0**-24 * 10, method
    assert float(results["lora"]["new_domain_loss"]) < float(results["base"]["new_domain_loss"]) - 0.5, "it must have learnt"

    packages = node_packages(build)
    write_base_gguf(d + "/base.gguf", weights)
    plain = probabilities(next_token_logits(weights, tokens))
    for method, factors in adapters.items():
        assert len(factors) == 7 * CONFIG["num_hidden_layers"]
        run(program, "convert", f"{d}/out/{method}", "--to", "gguf", "-o", d + "/a.gguf", "--base", d + "/base", "--dtype", "f32")
        want = probabilities(next_token_logits(weights, tokens, factors))
        allowed = 2 * f16_error(weights, factors, want, False)
        assert np.abs(want - plain).max() > 20 * allowed, "the adapter must matter"
        check(f"finetune's {method} adapter", probabilities(predict(packages, d + "/base.gguf", d + "/a.gguf")), want, allowed)
print("llama.cpp agrees with finetune")
