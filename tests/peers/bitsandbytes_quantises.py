#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Codes, scales and values of lowrank::quantise beside bitsandbytes on a CPU, for equality.

bitsandbytes' implementations differ among themselves; what is run here is its CPU backend (quantisation in PyTorch operations,
dequantisation in C++). Where it is known to decide otherwise, the test says where and how far, and docs/peers.md why:
  - the unused half of the last byte of an odd number of codes is the code of zero there, 0 here;
  - its last, shorter block is divided by its scale, all others are multiplied by the reciprocal: values within a unit in the last
    place of a threshold may go either way;
  - NF4's thresholds are the midpoints there and the CUDA kernel's decimals here: four of fifteen differ in the last place;
  - int8 rows come from float16: bitsandbytes rounds other weights to that first;
  - the offset of double quantisation is a float sum there, the rounded mean here.

    bitsandbytes_quantises.py PEER_QUANTISE
"""
import os
import subprocess
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")
from real_models import Count, skip, torch, versions

try:
    import bitsandbytes
    import bitsandbytes.functional as functional
    import numpy as np
except ImportError as e:
    skip(f"a peer cannot be imported: {e}")

program = sys.argv[1]
count = Count()
# One whole and one partial block, one element, one row, an odd number, more rows than columns and the reverse.
SHAPES = [(96, 64), (17, 33), (64, 130), (1, 1), (1, 4097), (7, 4096), (130, 3)]
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def ours(w, kind, block_size, nested=False):
    with tempfile.TemporaryDirectory() as d:
        np.save(d + "/in.npy", w.float().numpy())
        subprocess.run([program, d + "/in.npy", d + "/out.npz", kind, str(block_size), *(["nested"] if nested else [])], check=True)
        with np.load(d + "/out.npz") as z:
            return dict(z)


def unpack(codes, n):
    codes = np.asarray(codes).ravel()
    return np.stack([codes >> 4, codes & 15], 1).ravel()[:n]


def weights(shape, dtype, seed):
    """Normal values, with a row of zeros, and magnitudes over some orders, where there are rows enough."""
    w = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if shape[0] > 4:
        w[1] = 0
        w[2] *= 1e-6
        w[3] *= 1e4
    return w.to(dtype)


def thresholds(kind):
    levels = functional.get_4bit_type(kind, device="cpu").sort().values
    return ((levels[:-1] + levels[1:]) / 2).numpy()


def same_codes(what, kind, w, got, wanted, absmax, block_size):
    """Equal; but in a last block that is not whole, a value within two units in the last place of a threshold may go either way."""
    x = w.float().numpy().ravel()
    whole = x.size // block_size * block_size
    wrong = np.flatnonzero(got != wanted)
    for i in wrong:
        assert i >= whole, f"{what}: element {i} of {x.size} has code {got[i]}, in bitsandbytes {wanted[i]}"
        quotient = x[i] / absmax[-1]
        nearest = np.abs(thresholds(kind) - quotient).min()
        assert nearest <= 2**-22 * max(abs(quotient), 2**-10), f"{what}: {quotient} has code {got[i]}, in bitsandbytes {wanted[i]}"
    count.equal(f"{kind} codes", True, what)
    return wrong


def four_bits(kind, name, shape, block_size, nested):
    what = f"{kind} {name} {shape[0]}x{shape[1]}, blocks of {block_size}{', nested' if nested else ''}"
    w = weights(shape, TYPES[name], seed=block_size + shape[0])
    codes, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=kind, compress_statistics=nested)
    mine = ours(w, kind, block_size, nested)
    plain = functional.quantize_4bit(w, blocksize=block_size, quant_type=kind)[1].absmax.numpy()
    differ = same_codes(what, kind, w, unpack(mine["codes"], w.numel()), unpack(codes.numpy(), w.numel()), plain, block_size)
    values = functional.dequantize_4bit(codes, state).float().numpy().ravel()
    narrowed = torch.from_numpy(mine["values"]).to(w.dtype).float().numpy().ravel()
    alike = np.ones(w.numel(), bool)
    alike[differ] = False
    if not nested:
        count.equal(f"{kind} absmax", np.array_equal(mine["absmax"], state.absmax.numpy()), what)
        count.equal(f"{kind} values", np.array_equal(narrowed[alike], values[alike]), what)
        return
    offset = np.float32(mine["nested_offset"][0])
    count.close("double quantisation: offset, relative", abs(offset / state.offset.item() - 1), 2.0**-20, what)
    count.equal("double quantisation: map within a unit in the last place",
                np.abs(mine["nested_values"] - state.state2.code.numpy()).max() <= 2.0**-24, what)
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    mine_scales = mine["nested_values"][mine["nested_codes"]] * np.repeat(mine["nested_absmax"], 256)[: len(plain)] + offset
    count.close("double quantisation: scales, relative to the largest", np.abs(mine_scales - scales.numpy()).max() / plain.max(), 2.0**-8, what)
    if offset == np.float32(state.offset.item()) and mine["nested_absmax"][0] > 0:  # one scale alone leaves nothing after the offset
        count.equal("double quantisation: scale codes where the offsets are equal", np.array_equal(mine["nested_codes"], state.absmax.numpy()), what)
        count.equal("double quantisation: second scales where the offsets are equal",
                    np.array_equal(mine["nested_absmax"], state.state2.absmax.numpy()), what)


def nf4_on_thresholds():
    """Values exactly on and beside each threshold: which of them bitsandbytes' CPU and CUDA sources put elsewhere."""
    t = thresholds("nf4")
    x = np.concatenate([np.nextafter(t, -2, dtype=np.float32), t, np.nextafter(t, 2, dtype=np.float32)])
    w = torch.zeros(1, 64)
    w[0, 0] = 1
    w[0, 1 : 1 + len(x)] = torch.from_numpy(x)
    codes, _ = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    differ = np.flatnonzero(unpack(ours(w, "nf4", 64)["codes"], 64) != unpack(codes.numpy(), 64))
    which = sorted({(i - 1) % len(t) for i in differ})
    print("  NF4 thresholds that lie a unit in the last place apart:", [float(t[i]) for i in which])
    count.close("nf4: thresholds that differ from the CPU's", len(which), 4, "values on thresholds")
    assert len(differ) == len(which), "a threshold differs by more than a unit in the last place"


def int8_rows(name, shape):
    what = f"int8 {name} {shape[0]}x{shape[1]}"
    w = weights(shape, TYPES[name], seed=9)
    w = w.to(torch.float16)
    codes, scale, _ = functional.int8_vectorwise_quant(w)
    mine = ours(w, "int8", 64)
    count.equal("int8 largest magnitudes of rows", np.array_equal(mine["absmax"], scale.float().numpy().ravel()), what)
    got, wanted = mine["codes"].view(np.int8).reshape(shape).astype(int), codes.numpy().astype(int)
    # 127 / tensor is (1 / tensor) * 127 in PyTorch: beside 127 / scale in CUDA and here, a half may round the other way.
    x, row = w.float().numpy(), np.where(mine["absmax"] > 0, mine["absmax"], 1).astype(np.float32)[:, None]
    theirs = np.rint(x * (np.float32(1) / row * np.float32(127)))
    count.equal("int8 codes of bitsandbytes, read as (1 / scale) * 127", np.array_equal(wanted, theirs), what)
    count.equal("int8 codes of ours, read as 127 / scale", np.array_equal(got, np.rint(x * (np.float32(127) / row))), what)
    halves = np.abs(np.abs(x * np.float64(127) / row) % 1 - 0.5) < 1e-4
    count.equal("int8 codes, but for halves", np.array_equal(got[~halves], wanted[~halves]) and np.abs(got - wanted).max() <= 1, what)
    values = functional.int8_vectorwise_dequant(torch.from_numpy(got.astype(np.int8)), scale).numpy()
    count.close("int8 values, relative to their row", float(np.abs(mine["values"] - values).max() / max(np.abs(values).max(), 1e-30)),
                2.0**-22, what)


print(versions(torch, bitsandbytes))
failed = []


def attempt(function, *arguments):
    try:
        function(*arguments)
    except AssertionError as e:
        failed.append(str(e))


for kind in ("nf4", "fp4"):
    for name in TYPES:
        for shape in SHAPES:
            for block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096):
                attempt(four_bits, kind, name, shape, block_size, False)
for kind in ("nf4", "fp4"):
    for shape in [(96, 64), (64, 1030), (17, 33), (300, 128)]:
        for block_size in (32, 64, 4096):
            attempt(four_bits, kind, "bf16", shape, block_size, True)
attempt(nf4_on_thresholds)
for name in TYPES:
    for shape in SHAPES:
        attempt(int8_rows, name, shape)
for line in failed[:20]:
    print("failed:", line)
count.report("bitsandbytes")
print(len(failed), "failed") if failed else None
sys.exit(bool(failed))
