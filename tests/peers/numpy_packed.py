#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`lowrank merge` into weights kept in bitsandbytes' 4 bits, against numpy's dequantise, add, quantise; and biases of lora_B."""
import json
import os
import subprocess
import sys
import tempfile

from support import deltas, np, read_safetensors, run, tiny_adapter, tiny_llama, write_safetensors

program = sys.argv[1]
NF4 = np.array([-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1], np.float32)
BLOCK = 64


def dynamic_map():
    """bitsandbytes' signed dynamic 8-bit map."""
    values = [0.0, 1.0]
    for i in range(7):
        ends = np.linspace(0.1, 1, 2**i + 1)
        middle = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (i - 6)
        values += list(middle) + list(-middle)
    return np.sort(np.array(values)).astype(np.float32)


def blocks(x):
    flat = np.zeros(-(-x.size // BLOCK) * BLOCK)
    flat[: x.size] = x.ravel()
    return flat.reshape(-1, BLOCK)


def quantise(w, nested, tight=True):
    """The tensors bitsandbytes would store: {suffix: array}. The first element of a pair is in the high nibble."""
    b = blocks(w)
    absmax = np.abs(b).max(1).astype(np.float32)
    codes = np.abs(b[..., None] / np.where(absmax > 0, absmax, 1)[:, None, None] - NF4).argmin(-1).ravel()[: w.size]
    codes = np.append(codes, [0] * (w.size % 2)).astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(w.shape), "somebody": {"else": [1, 2]}}
    parts = {"": (codes[::2] << 4 | codes[1::2]).reshape(-1, 1), ".quant_map": NF4}
    if nested:
        offset = absmax.mean(dtype=np.float64).astype(np.float32)
        rest = absmax - offset
        second = np.array([np.abs(rest[i : i + 256]).max() for i in range(0, len(rest), 256)], np.float32)
        table = dynamic_map()
        parts[".absmax"] = np.abs((rest / np.repeat(second, 256)[: len(rest)])[:, None] - table).argmin(-1).astype(np.uint8)
        parts[".nested_absmax"], parts[".nested_quant_map"] = second, table
        state.update(nested_blocksize=256, nested_dtype="float32", nested_offset=float(offset))
    else:
        parts[".absmax"] = absmax
    parts[".quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)  # no padding
    return parts


def unpack(t, name):
    """(the weight, its codes, its scales, its description)"""
    state = json.loads(t[name + ".quant_state.bitsandbytes__nf4"].tobytes())
    raw = t[name].ravel()
    codes = np.stack([raw >> 4, raw & 15], 1).ravel()[: int(np.prod(state["shape"]))]
    absmax = t[name + ".absmax"]
    if absmax.dtype == np.uint8:
        second = np.repeat(t[name + ".nested_absmax"], state["nested_blocksize"])[: len(absmax)]
        absmax = t[name + ".nested_quant_map"][absmax] * second + np.float32(state["nested_offset"])
    w = (NF4[codes] * np.repeat(absmax, BLOCK)[: len(codes)]).reshape(state["shape"])
    return w.astype(np.float64), codes, absmax, state


def save(path, tensors):
    """Widest types first, as safetensors' own writer orders them: all scales come before the first codes."""
    names = {"float32": "F32", "uint8": "U8"}
    header, at, data = {}, 0, b""
    for name, a in sorted(tensors.items(), key=lambda kv: (-kv[1].dtype.itemsize, kv[0])):
        header[name] = {"dtype": names[str(a.dtype)], "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at, data = at + a.nbytes, data + np.ascontiguousarray(a).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    open(path, "wb").write(len(text).to_bytes(8, "little") + text + data)


with tempfile.TemporaryDirectory() as d:
    weights = tiny_llama(d + "/plain")
    factors = tiny_adapter(d + "/adapter", weights, False)
    change = deltas(factors)
    packed_names = [n for n in weights if n.endswith("_proj.weight")]
    for nested in (False, True):
        base = d + f"/packed{nested}"
        os.makedirs(base)
        stored = {}
        for n, w in weights.items():
            if n in packed_names:
                stored.update({n + suffix: a for suffix, a in quantise(w, nested).items()})
            else:
                stored[n] = w
        save(base + "/model.safetensors", stored)
        before = read_safetensors(base + "/model.safetensors")
        report = json.loads(run(program, "merge", base, d + "/adapter", "-o", base + "_merged", "--json"))
        assert report["applied"] == len(factors) and len(report["modules"]) == len(factors), report["applied"]
        after = read_safetensors(base + "_merged/model.safetensors")
        assert list(after) == list(before)
        for n in before:  # the layout is kept, whatever was not adapted is the same
            if ".quant_state" not in n:
                assert after[n].dtype == before[n].dtype and after[n].shape == before[n].shape, n
        for n in packed_names:
            old, old_codes, _, old_state = unpack(before, n)
            new, codes, absmax, state = unpack(after, n)
            want = blocks(old + change[n])
            largest = np.abs(want).max(1)
            if nested:
                # scales lie within half the widest gap of the 8-bit map, of what is left after the mean
                rest = np.abs(largest - largest.mean())
                gap = np.diff(dynamic_map()).max() / 2 * np.array([rest[i : i + 256].max() for i in range(0, len(rest), 256)]).repeat(256)[: len(rest)]
                assert (np.abs(absmax - largest) <= gap + 1e-5 * largest).all(), n
                assert abs(state.pop("nested_offset") - largest.mean()) < 1e-5 * largest.mean()
                old_state.pop("nested_offset")
            else:
                assert (np.abs(absmax - largest) <= 1e-5 * largest).all(), n
            assert state == old_state, n  # also the keys nobody here knows
            # every code is a nearest one, up to the f32 arithmetic that made the sum
            x = (want / largest[:, None]).ravel()[: codes.size]
            distance = np.abs(x[:, None] - NF4)
            assert (distance[np.arange(codes.size), codes] <= distance.min(1) + 1e-5).all(), n
            entry = next(m for m in report["modules"] if m["name"] == n[:-7])
            assert abs(entry["changed_share"] - (codes != old_codes).mean()) < 1e-6, n
            effective = new - old
            correlation = (effective * change[n]).sum() / np.linalg.norm(effective) / np.linalg.norm(change[n])
            assert abs(entry["correlation"] - correlation) < 1e-4 and correlation > 0.9, (n, entry, correlation)
            assert abs(entry["lost"] - np.linalg.norm(effective - change[n]) / np.linalg.norm(change[n])) < 1e-4, n
        for n in weights:
            if n not in packed_names:
                assert np.allclose(after[n], weights[n] + change.get(n, 0), rtol=1e-5, atol=1e-5), n

        # merging what was merged, once more: our own file can be read and its description has its room already
        run(program, "merge", base + "_merged", d + "/adapter", "-o", base + "_twice")
        twice = read_safetensors(base + "_twice/model.safetensors")
        assert all(twice[n].shape == after[n].shape for n in after)

        # an update below the steps of the levels is refused, said to be so by a dry run, and merged when told to
        small = d + "/small"
        os.makedirs(small, exist_ok=True)
        t = read_safetensors(d + "/adapter/adapter_model.safetensors")
        write_safetensors(small + "/adapter_model.safetensors", {k: v * (0.002 if "lora_B" in k else 1) for k, v in t.items()})
        open(small + "/adapter_config.json", "w").write(open(d + "/adapter/adapter_config.json").read())
        out = base + "_small"
        r = subprocess.run([program, "merge", base, small, "-o", out], capture_output=True, text=True)
        assert r.returncode == 1 and len(r.stderr.splitlines()) == 1 and "--allow-lossy" in r.stderr and "_proj.weight" in r.stderr, r.stderr
        assert not os.path.exists(out + "/model.safetensors")
        dry = json.loads(run(program, "merge", base, small, "-o", out, "--dry-run", "--json"))
        assert dry["least_correlation"] < 0.9 and not os.path.exists(out + "/model.safetensors")
        lossy = json.loads(run(program, "merge", base, small, "-o", out, "--allow-lossy", "--json"))
        assert lossy["least_correlation"] == dry["least_correlation"] and os.path.exists(out + "/model.safetensors")

    # a part that is missing, DoRA, and a wrong shape are errors of one line
    for what, change_tensors, part in [
        ("absmax", lambda t: t.pop(packed_names[0] + ".absmax"), "absmax"), ("map", lambda t: t.update({packed_names[0] + ".quant_map": np.zeros(16, np.float32)}), "quant_map"),
        ("codes", lambda t: t.update({packed_names[0]: np.zeros((7, 1), np.uint8)}), packed_names[0]),
        ("shape", lambda t: t.update({packed_names[0] + ".quant_state.bitsandbytes__nf4": np.frombuffer(b'{"quant_type":"nf4","shape":[4,4]}', np.uint8)}), "4x4"),
    ]:
        broken = dict(stored)
        change_tensors(broken)
        os.makedirs(d + "/broken", exist_ok=True)
        save(d + "/broken/model.safetensors", broken)
        r = subprocess.run([program, "merge", d + "/broken", d + "/adapter", "-o", d + "/bad"], capture_output=True, text=True)
        assert r.returncode == 1 and len(r.stderr.splitlines()) == 1, (what, r.stderr)
        assert not os.path.exists(d + "/bad/model.safetensors")

    # lora_B.bias goes into the layer's bias, times the scale; without one it cannot
    name = "model.layers.0.self_attn.q_proj"
    t = dict(read_safetensors(d + "/adapter/adapter_model.safetensors"))
    lb = np.linspace(-1, 1, 64, dtype=np.float32)
    t[f"base_model.model.{name}.lora_B.bias"] = lb
    os.makedirs(d + "/biased")
    write_safetensors(d + "/biased/adapter_model.safetensors", t)
    c = json.load(open(d + "/adapter/adapter_config.json"))
    json.dump({**c, "lora_bias": True}, open(d + "/biased/adapter_config.json", "w"))
    r = subprocess.run([program, "merge", d + "/plain", d + "/biased", "-o", d + "/bad"], capture_output=True, text=True)
    assert r.returncode == 1 and "has none to merge it into" in r.stderr, r.stderr
    bias = np.arange(64, dtype=np.float32)
    os.makedirs(d + "/withbias")
    write_safetensors(d + "/withbias/model.safetensors", {**weights, name + ".bias": bias})
    run(program, "merge", d + "/withbias", d + "/biased", "-o", d + "/bias_merged")
    got = read_safetensors(d + "/bias_merged/model.safetensors")
    assert np.abs(got[name + ".bias"] - (bias + factors[name + ".weight"][0] * lb)).max() <= 1e-5
    assert np.allclose(got[name + ".weight"], weights[name + ".weight"] + change[name + ".weight"], rtol=1e-5, atol=1e-5)
print("numpy agrees with the merges into 4 bits")
