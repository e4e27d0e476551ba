#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""4-bit checkpoints both ways: what `lowrank init --packed` writes loads in Transformers by its own quantization_config, and what
Transformers saved in 4 bits is read by `merge` and by `spectrum`.

    bitsandbytes_files.py PROGRAM
"""
import copy
import json
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")
from real_models import (Count, checkpoint, difference, load_adapter, load_model, logits, make_model, run, save_tensors, shaken, skip, tensors,
                         torch, transformers, versions)

try:
    import bitsandbytes
    import bitsandbytes.functional as functional
except ImportError as e:
    skip(f"a peer cannot be imported: {e}")

program = sys.argv[1]
count = Count()


def four_bit_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def dense(layer):
    """The values in float32, whatever the layer would compute in."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return functional.dequantize_4bit(layer.weight.data, state)


def one_zero(codes):
    """FP4 has two codes for zero; a merge of nothing may take the other."""
    high, low = codes >> 4, codes & 15
    return torch.where(high == 8, 0, high) << 4 | torch.where(low == 8, 0, low)


def packed_base(family, method, d, *options):
    """The packed base in Transformers, beside the same run of `init` without --packed: codes that mean the same numbers."""
    what = " ".join([family, method, *options])
    make_model(family, d + "/model")
    common = ["--rank", 4, "--alpha", 6, "--targets", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", *options]
    run(program, "init", method, d + "/model", "-o", d + "/packed", "--packed", *common)
    run(program, "init", method, d + "/model", "-o", d + "/plain", *common)
    base = load_model(family, d + "/packed/base")
    layers = four_bit_layers(base)
    assert len(layers) == 14, layers.keys()
    wanted = checkpoint(d + "/plain/base")
    for name, layer in layers.items():
        count.equal("weights Transformers unpacks, and of init without --packed", torch.equal(dense(layer), wanted[name + ".weight"]),
                    f"{what} {name}")
    plain = load_adapter(load_model(family, d + "/plain/base"), d + "/plain")
    packed = load_adapter(base, d + "/packed")
    count.close("logits of a packed base with its adapter, and of the plain one", difference(logits(packed), logits(plain)), 1e-5, what)
    changed = shaken(tensors(d + "/packed"), 2)
    for out in ("/packed", "/plain"):
        save_tensors(d + out, changed)
    plain = load_adapter(load_model(family, d + "/plain/base"), d + "/plain")
    packed = load_adapter(load_model(family, d + "/packed/base"), d + "/packed")
    count.close("the same after training", difference(logits(packed), logits(plain)), 1e-5, what)
    # QLoRA merged into 4 bits: what we pack again, Transformers reads.
    run(program, "merge", d + "/packed/base", d + "/packed", "-o", d + "/merged", "--allow-lossy")
    merged = load_model(family, d + "/merged")
    update = {n: m.get_delta_weight("default") for n, m in plain.named_modules() if hasattr(m, "get_delta_weight")}
    for name, layer in four_bit_layers(merged).items():
        w = wanted[name + ".weight"] + update["base_model.model." + name]
        state = layer.weight.quant_state
        again, theirs = functional.quantize_4bit(w, blocksize=state.blocksize, quant_type="nf4", compress_statistics=state.nested)
        off = (dense(layer) - functional.dequantize_4bit(again, theirs).float()).abs()
        # Rounding of the sum may put a value across a threshold: rarely, and then by one level.
        count.close("share of weights merged into 4 bits that bitsandbytes would have rounded otherwise",
                    (off > 1e-2 * w.abs().max()).float().mean().item(), 0.004, f"{what} {name}")


def their_checkpoint(kind, nested, dtype, d):
    """A model Transformers quantised and saved: merge reads, updates and writes it; spectrum scans it."""
    what = f"{kind}{' nested' if nested else ''} {dtype}"
    make_model("llama", d + "/model")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
                                             bnb_4bit_compute_dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(d + "/model", quantization_config=config, dtype=dtype, device_map="cpu")
    theirs.save_pretrained(d + "/saved")
    weights = {n: dense(m) for n, m in four_bit_layers(theirs).items()}
    assert weights, "nothing was quantised"
    run(program, "spectrum", d + "/saved", "--json", d + "/report.json", "--values", "-q")
    report = json.load(open(d + "/report.json"))
    entries = {e["name"]: e for e in report["matrices"]}
    for name, w in weights.items():
        entry = entries.get(name + ".weight") or entries[name]
        ours = torch.tensor(entry["singular_values"] if "singular_values" in entry else entry["values"], dtype=torch.float64)
        exact = torch.linalg.svdvals(w.double())
        count.close("singular values of a checkpoint saved in 4 bits", difference(ours, exact[: len(ours)]), 1e-5, f"{what} {name}")
    # A merge of nothing gives the codes back; spectra and merges read the same weights.
    run(program, "init", "kaiming", d + "/model", "-o", d + "/zero", "--rank", 2, "--targets", "q_proj,down_proj")
    run(program, "merge", d + "/saved", d + "/zero", "-o", d + "/same", "--allow-lossy")
    before, after = checkpoint(d + "/saved"), checkpoint(d + "/same")
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    for name in before:
        if "nested" not in name and "quant_state" not in name and not (nested and "absmax" in name):
            old, new = before[name], after[name]
            if kind == "fp4" and old.dtype == torch.uint8:
                old, new = one_zero(old), one_zero(new)
            count.equal("tensors of a 4-bit checkpoint after a merge of nothing", torch.equal(old, new), f"{what} {name}")
    again = transformers.AutoModelForCausalLM.from_pretrained(d + "/same", device_map="cpu").eval()
    limit = 1e-5 if not nested and dtype == torch.float32 else 2e-2
    count.close(f"logits after a merge of nothing{', scales quantised twice or 16 bits' if limit > 1e-3 else ''}",
                difference(logits(again), logits(theirs.eval())), limit, what)


print(versions(torch, transformers, bitsandbytes))
failed = []
runs = [(packed_base, family, method, *options) for family in ("llama", "qwen2") for method in ("loftq", "qpissa") for options in ((), ("--double-quant",))]
runs += [(packed_base, "llama", "loftq", "--block-size", "32"), (packed_base, "llama", "loftq", "--block-size", "256")]
runs += [(their_checkpoint, kind, nested, torch.float32) for kind in ("nf4", "fp4") for nested in (False, True)]
runs += [(their_checkpoint, "nf4", True, torch.bfloat16), (their_checkpoint, "nf4", False, torch.float16)]
for function, *arguments in runs:
    with tempfile.TemporaryDirectory() as d:
        try:
            if function is packed_base:
                function(*arguments[:2], d, *arguments[2:])
            else:
                function(*arguments, d)
        except Exception as e:
            failed.append(f"{function.__name__} {arguments}: {type(e).__name__}: {str(e)[:500]}")
for line in failed:
    print("failed:", line)
count.report("bitsandbytes in Transformers")
sys.exit(bool(failed))
