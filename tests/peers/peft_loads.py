#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""PEFT loads what `lowrank init METHOD` writes, and computes what was meant.

For each family of models and each method: no key is missing or unexpected; the logits of base and adapter are those of the
original model where the method promises that; and after every factor has been changed, as training would, the logits in PEFT
equal those of the model that `lowrank merge` writes, and the merged weights equal PEFT's own merge_and_unload.

    peft_loads.py PROGRAM [FAMILY...]
"""
import os
import sys
import tempfile

from real_models import (Count, TOKENS, checkpoint, difference, load_adapter, load_model, logits, make_model, peft, read_json, run,
                         save_file, save_tensors, shaken, tensors, torch, transformers, versions)

program, families = sys.argv[1], sys.argv[2:] or ["llama", "qwen2", "gpt2", "t5", "llama_tied", "qwen3_moe", "mixtral"]
LINEAR = {"gpt2": "c_attn,c_proj,c_fc", "t5": "q,k,v,o,wi_0,wi_1,wo", "mixtral": "q_proj,k_proj,v_proj,o_proj",
          "qwen3_moe": "q_proj,k_proj,v_proj,o_proj"}
NOTHING_YET = ["kaiming", "gaussian", "orthogonal", "mica", "eva"]  # B = 0: the model is the original one
RESIDUAL = ["pissa", "milora", "olora", "corda", "lora_ga"]  # the base becomes W − s·B·A
QUANTISED = ["loftq", "qpissa"]
LIMIT = 1e-5
count = Count()


def is_adapted(name, module, targets):
    return name.split(".")[-1] in targets and "router" not in name and hasattr(module, "weight") and module.weight.dim() == 2


def write_data(model, targets, directory):
    """What corda, eva and lora_ga look at: inputs and gradients of every adapted layer, from the model itself."""
    inputs, hooks, layers = {}, [], {}
    for name, module in model.named_modules():
        if is_adapted(name, module, targets):
            layers[name] = module
            hooks.append(module.register_forward_hook(
                lambda _, x, __, name=name: inputs.__setitem__(name, x[0].detach().reshape(-1, x[0].shape[-1]).contiguous().clone())))
    model.zero_grad()
    if model.config.is_encoder_decoder:
        out = model(input_ids=TOKENS, labels=TOKENS.flip(1))
    else:
        out = model(input_ids=TOKENS, labels=TOKENS)
    out.loss.backward()
    for h in hooks:
        h.remove()
    save_file(inputs, directory + "/x.safetensors")
    save_file({n + ".weight": m.weight.grad.contiguous().clone() for n, m in layers.items()}, directory + "/g.safetensors")
    model.zero_grad()


def one(family, method, d, original, variant, options):
    what = f"{family} {method} {variant}"
    out, base = f"{d}/{method}-{variant}", f"{d}/model"
    run(program, "init", method, base, "-o", out, *options)
    if os.path.isdir(out + "/base"):
        base = out + "/base"
    if method in RESIDUAL or method in QUANTISED:
        assert base != f"{d}/model", what
    model = load_adapter(load_model(family, base), out)
    first = logits(model)
    if method not in QUANTISED:
        count.close("logits of base and new adapter, and of the original model", difference(first, logits(original)), LIMIT, what)
    run(program, "merge", base, out, "-o", out + "-start", "--allow-lossy")
    count.close("logits of a new adapter, and of `merge`", difference(first, logits(load_model(family, out + "-start"))), LIMIT, what)

    # After training: everything has another value.
    save_tensors(out, shaken(tensors(out), 3))
    model = load_adapter(load_model(family, base), out)
    trained = logits(model)
    assert difference(trained, first) > 1e-2, "the change of the factors must show"
    said = run(program, "merge", base, out, "-o", out + "-merged", "--allow-lossy").stderr
    ours, merged = load_model(family, out + "-merged"), model.merge_and_unload()
    if family == "llama_tied":
        # Merged into a table that is the head too, the adapter is another model's, in PEFT as here; `merge` says so.
        assert "tied" in said, said
        trained = logits(merged)
    count.close("logits of a trained adapter, and of `merge`", difference(trained, logits(ours)), LIMIT, what)
    ours = ours.state_dict()
    for name, weight in merged.state_dict().items():
        count.close("weights of merge_and_unload, and of `merge`", difference(ours[name], weight), LIMIT, f"{what} {name}")


def one_family(family, d):
    original = make_model(family, d + "/model")
    targets = LINEAR.get(family, "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj")
    write_data(original, targets.split(","), d)
    common = ["--rank", 4, "--alpha", 6, "--seed", 5]
    if family == "gpt2":
        common.append("--fan-in-fan-out")
    data = {"corda": ["--activations", d + "/x.safetensors"], "eva": ["--activations", d + "/x.safetensors"],
            "lora_ga": ["--gradients", d + "/g.safetensors"]}
    if family == "llama_tied":  # the table with the tied head, which the initialisers of linear layers leave alone
        for method in ("kaiming", "gaussian"):
            one(family, method, d, original, "embedding", [*common, "--targets", "embed_tokens,q_proj"])
        return
    for method in NOTHING_YET + RESIDUAL + QUANTISED:
        options = [*common, "--targets", targets, *data.get(method, [])]
        variants = {"plain": []}
        if family in ("llama", "gpt2"):
            variants["rslora"] = ["--rslora"]
        if family in ("llama", "gpt2", "qwen2"):
            variants["dora"] = ["--dora"]
        if family == "llama" and method in QUANTISED:
            variants["double-quant"] = ["--double-quant", "--bits", "4", "--block-size", "32"]
        for variant, more in variants.items():
            one(family, method, d, original, variant, options + more)


def ranks_that_differ(d):
    """rank_pattern and alpha_pattern: what `init eva` and `resize --energy` write."""
    make_model("llama", d + "/model")
    run(program, "init", "kaiming", d + "/model", "-o", d + "/k", "--rank", 6, "--alpha", 9)
    start = shaken(tensors(d + "/k"), 8)
    for k, name in enumerate(sorted(n for n in start if "lora_B" in n)):  # spectra that fall at different speeds
        start[name] = start[name] * torch.arange(1, 7) ** -(0.3 * k)
    save_tensors(d + "/k", start)
    run(program, "resize", d + "/k", "-o", d + "/resized", "--energy", "0.9")
    config = read_json(d + "/resized", "adapter_config.json")
    assert len(set(config["rank_pattern"].values())) > 2 and config["alpha_pattern"], config
    got = logits(load_adapter(load_model("llama", d + "/model"), d + "/resized"))
    run(program, "merge", d + "/model", d + "/resized", "-o", d + "/merged")
    count.close("rank_pattern and alpha_pattern", difference(got, logits(load_model("llama", d + "/merged"))), LIMIT, "llama resize")


print(versions(torch, transformers, peft))
failed = []
for family in families:
    with tempfile.TemporaryDirectory() as d:
        try:
            one_family(family, d)
        except AssertionError as e:
            failed.append(f"{family}: {e}")
with tempfile.TemporaryDirectory() as d:
    ranks_that_differ(d)
for line in failed:
    print("failed:", line)
count.report("peft")
sys.exit(bool(failed))
