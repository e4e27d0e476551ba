#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The gguf package reads what `lowrank convert --to gguf` writes: names by its own table, values to the bit; and we read its.

    gguf_files.py PROGRAM
"""
import importlib.metadata
import sys
import tempfile

from real_models import Count, config_of, make_model, run, save_tensors, shaken, skip, tensors, torch

try:
    import gguf
    import numpy as np
except ImportError as e:
    skip(f"a peer cannot be imported: {e}")

program = sys.argv[1]
count = Count()


def permuted(b, heads):
    """llama.cpp's order of the rows of a rotated projection."""
    return b.reshape(heads, 2, b.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)


def expected(directory):
    """{GGUF name: values} of an adapter of the Llama architecture, by the table of the gguf package."""
    c = config_of("llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    out = {}
    for name, t in tensors(directory).items():
        module, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        t = t.numpy()
        if factor == "B" and module.endswith("q_proj"):
            t = permuted(t, c.num_attention_heads)
        if factor == "B" and module.endswith("k_proj"):
            t = permuted(t, c.num_key_value_heads)
        out[f"{names.get_name(module)}.weight.lora_{factor.lower()}"] = t
    return out


def one(d, rslora):
    make_model("llama", d + "/model")
    run(program, "init", "kaiming", d + "/model", "-o", d + "/a", "--rank", 4, "--alpha", 6, *(["--rslora"] if rslora else []))
    save_tensors(d + "/a", shaken(tensors(d + "/a"), 4))
    run(program, "convert", d + "/a", "--to", "gguf", "-o", d + "/a.gguf", "--dtype", "f32", "--base", d + "/model")
    reader = gguf.GGUFReader(d + "/a.gguf")
    text = {k: reader.get_field(k).contents() for k in ("general.type", "general.architecture", "adapter.type")}
    count.equal("keys", text == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}, str(text))
    alpha = reader.get_field("adapter.lora.alpha").contents()
    count.close("alpha, relative", abs(alpha / (6 * 2 if rslora else 6) - 1), 1e-7, f"rslora {rslora}")  # α·√r, r = 4
    wanted = expected(d + "/a")
    got = {t.name: np.array(t.data) for t in reader.tensors}
    count.equal("names of tensors", got.keys() == wanted.keys(), str(got.keys() ^ wanted.keys()))
    for name, values in wanted.items():
        count.equal("values", got[name].shape == values.shape and np.array_equal(got[name], values), name)

    # The same adapter by the package's writer, read back by us.
    writer = gguf.GGUFWriter(d + "/theirs.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 6.0)
    for name, values in wanted.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    run(program, "convert", d + "/theirs.gguf", "--to", "peft", "-o", d + "/back", "--base", d + "/model")
    back, first = tensors(d + "/back"), tensors(d + "/a")
    count.equal("names of an adapter the package wrote", back.keys() == first.keys(), str(back.keys() ^ first.keys()))
    for name in first:
        count.equal("values of an adapter the package wrote", torch.equal(back[name], first[name]), name)


print("gguf", importlib.metadata.version("gguf"))
for rslora in (False, True):
    with tempfile.TemporaryDirectory() as d:
        one(d, rslora)
count.report("gguf")
