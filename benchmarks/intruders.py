# SPDX-License-Identifier: Apache-2.0
"""Intruder dimensions: lowrank's certificates and the peers' two full SVDs (torch), in turn, on the same matrices.

    python3 benchmarks/intruders.py build/bench/benchmarks/benchmark_intruders [rows cols] [--one]

--one: a single case (a decaying spectrum over noise, a middling update), for sizes where the SVDs take a minute each.

Prints seconds (median of ours, best of the peer's), the ratio, and whether both name the same vectors.
"""
import os
import subprocess
import sys
import tempfile
import time

import torch


def two_svds(base, tuned, k=10, epsilon=0.5):
    """What PEFT's example script does: every cosine between leading vectors of the tuned and all of the base."""
    u0 = torch.linalg.svd(base, full_matrices=False)[0]
    u1, s1, _ = torch.linalg.svd(tuned, full_matrices=False)
    cosines = (u0.T @ u1[:, :k]).abs().max(dim=0).values
    return [i for i in range(k) if cosines[i] < epsilon], cosines


def main():
    one = "--one" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--one"]
    binary = arguments[0]
    rows, cols = (int(arguments[1]), int(arguments[2])) if len(arguments) > 2 else (2048, 2048)
    repeats = 2 if rows * cols <= 2048 * 2048 else 1
    torch.manual_seed(1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rows}x{cols}, k = 10")
    for kind in ("decaying over noise",) if one else ("noise", "decaying over noise"):
        base = 0.02 * torch.randn(rows, cols)
        if kind != "noise":
            r = min(256, rows, cols)
            u, v = torch.linalg.qr(torch.randn(rows, r))[0], torch.linalg.qr(torch.randn(cols, r))[0]
            base += (u * (8 * torch.arange(1, r + 1) ** -0.7)) @ v.T
        for size in (0.1,) if one else (0.02, 0.1, 1.0):
            tuned = base + size * torch.randn(rows, 16) @ (torch.randn(16, cols) / cols**0.5)
            with tempfile.TemporaryDirectory() as directory:
                paths = [os.path.join(directory, n) for n in ("base", "tuned")]
                base.numpy().tofile(paths[0])
                tuned.numpy().tofile(paths[1])
                out = subprocess.run([binary, *paths, str(rows), str(cols), "5"], capture_output=True, text=True, check=True)
            fields = out.stdout.split()
            ours, full, found = float(fields[0]), fields[1] == "1", [int(x) for x in fields[3:]]
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                theirs, cosines = two_svds(base, tuned)
                times.append(time.perf_counter() - begin)
            peer = min(times)
            close = min(abs(float(c) - 0.5) for c in cosines)
            print(f"{kind}, update {size}: ours {ours:.3f} s{' (full SVD)' if full else ''}, two SVDs {peer:.2f} s, "
                  f"{peer / ours:.0f}x; {len(theirs)} intruders, {'same' if found == theirs else f'DIFFERENT {found} {theirs}'}"
                  f" (nearest cosine to 0.5: {close:.3f} away)")


main()
