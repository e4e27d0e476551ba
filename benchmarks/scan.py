#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whole-checkpoint scans of the lowrank program, timed, with numpy's LAPACK (gesdd, float32) on the same matrices.

    scan.py PROGRAM 1b DIR                # all singular values of a 1B-shaped difference of two bf16 checkpoints
    scan.py PROGRAM 7b DIR                # the largest 64 of every matrix of a 7B-shaped checkpoint
    scan.py PROGRAM 1b DIR --scale 8      # small, to see it work

DIR receives the checkpoints (1b: 4.5 GB, 7b: 13.5 GB) and the report; what is there already is used. numpy does one
matrix of each shape, after the scan, and its time is multiplied by how many there are; --no-peer leaves it out. It
computes all values in both cases: LAPACK has no routine for the largest alone.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np


def read(directory, name):
    """A bf16 tensor of a sharded checkpoint, as float32."""
    index = os.path.join(directory, "model.safetensors.index.json")
    file = json.load(open(index))["weight_map"][name] if os.path.exists(index) else "model.safetensors"
    with open(os.path.join(directory, file), "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        info = json.loads(f.read(length))[name]
        begin, end = info["data_offsets"]
        f.seek(8 + length + begin)
        raw = np.frombuffer(f.read(end - begin), dtype=np.uint16)
    return (raw.astype(np.uint32) << 16).view(np.float32).reshape(info["shape"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("shape", choices=["1b", "7b"])
    parser.add_argument("directory")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true")
    o = parser.parse_args()
    tag = f"{o.shape}-{o.scale}" if o.scale > 1 else o.shape
    base, tuned, report = (os.path.join(o.directory, f"{tag}-{n}") for n in ("base", "tuned", "report.json"))
    if not os.path.exists(os.path.join(base, "config.json")):
        maker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "make_checkpoint.py")
        subprocess.run([sys.executable, maker, base, "--shape", o.shape, "--scale", str(o.scale),
                        *(["--tuned", tuned] if o.shape == "1b" else [])], check=True)
    command = [o.program, "spectrum", *([tuned, "--base", base] if o.shape == "1b" else [base, "--top", "64"]),
               "--json", report, "--values", "--fresh"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone
    seconds = time.perf_counter() - begin
    if status != 0:
        sys.exit(f"{' '.join(command)} failed")
    matrices = json.load(open(report))["matrices"]
    print(" ".join(command))
    print(f"{len(matrices)} matrices, {sum(m['rows'] * m['cols'] for m in matrices) / 1e6:.1f} million values: {seconds:.1f} s, "
          f"peak {usage.ru_maxrss / 1024:.0f} MiB resident, {os.cpu_count()} cores")
    if o.no_peer:
        return
    shapes = {}
    for m in matrices:
        shapes.setdefault((m["rows"], m["cols"]), []).append(m)
    total, error, ranks = 0.0, 0.0, 0
    for (rows, cols), group in sorted(shapes.items()):
        m = group[0]
        begin = time.perf_counter()
        w = read(tuned if o.shape == "1b" else base, m["name"])
        if o.shape == "1b":
            w = w - read(base, m["name"])
        s = np.linalg.svd(w, compute_uv=False)
        energy = np.cumsum(s.astype(np.float64) ** 2)
        r90 = int(np.searchsorted(energy, 0.9 * energy[-1])) + 1
        p = s / s.sum(dtype=np.float64)
        entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
        one = time.perf_counter() - begin
        total += one * len(group)
        ours = np.array(m["singular_values"])
        error = max(error, float(np.abs(ours - s[: len(ours)]).max() / s[0]))
        if m["metrics"]["energy_rank_90"] is not None:
            ranks += m["metrics"]["energy_rank_90"] != r90
            error = max(error, 0 if m["metrics"]["effective_rank"] is None else
                        abs(m["metrics"]["effective_rank"] / np.exp(entropy) - 1))
        print(f"  numpy {rows}x{cols}: {one:.2f} s each, {len(group)} of them", flush=True)
    print(f"numpy {np.__version__}: {total:.1f} s by that count, {total / seconds:.1f} times ours; largest difference of a value "
          f"relative to the largest value, or of an effective rank: {error:.1e}; r90 differs in {ranks} of {len(shapes)}")


if __name__ == "__main__":
    main()
