#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""truncated_svd beside torch.svd_lowrank on the same matrices: time and captured-energy deficit, in turn.

    env -u OPENBLAS_CORETYPE python3 truncated_svd_torch.py path/to/benchmark_truncated_svd [--size 2048]

The deficit is (sum of the true top-k sigma^2 - ours) / the former; the truth comes from numpy in double.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch


def matrix(n, decaying, rng):
    w = 0.02 * rng.standard_normal((n, n))
    if decaying:
        k = n // 8
        u, _ = np.linalg.qr(rng.standard_normal((n, k)))
        v, _ = np.linalg.qr(rng.standard_normal((n, k)))
        w += (u * (8.0 * np.arange(1, k + 1) ** -0.7)) @ v.T
    return w.astype(np.float32)


def deficit(exact, s):
    best = np.sum(exact[: len(s)] ** 2)
    return (best - np.sum(np.asarray(s, dtype=np.float64) ** 2)) / best


def torch_time(w, k, niter, repeats=5):
    best, s = 1e30, None
    for _ in range(repeats):
        start = time.perf_counter()
        _, s, _ = torch.svd_lowrank(w, q=k, niter=niter)
        best = min(best, time.perf_counter() - start)
    return best, s.numpy()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("binary")
    p.add_argument("--size", type=int, default=2048)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads))
    print(f"# torch {torch.__version__}, numpy {np.__version__}, {a.threads} threads, {a.size}^2 float32, best of several")
    with tempfile.TemporaryDirectory() as d:
        for decaying in (True, False):
            w = matrix(a.size, decaying, rng)
            exact = np.sqrt(np.maximum(np.linalg.eigvalsh(w.astype(np.float64).T @ w.astype(np.float64))[::-1], 0))
            path = os.path.join(d, "w")
            w.tofile(path)
            for k, tolerance, niters in ((16, 1e-4, (4, 16)), (128, 1e-3, (4, 16))):
                out = subprocess.run([a.binary, "--file", path, str(a.size), str(a.size), str(k), str(tolerance)],
                                     env=env, check=True, capture_output=True, text=True).stdout.split()
                ours = float(out[0])
                s = np.fromfile(path + ".values", dtype=np.float32)
                kind = "decaying" if decaying else "flat"
                print(f"{kind:8} top-{k:<3} ours, asked {tolerance:.0e}      {ours:8.1f} ms  deficit {deficit(exact, s):9.2e}  {out[1]} passes")
                for niter in niters:
                    t, s = torch_time(torch.from_numpy(w), k, niter)
                    print(f"{'':17}svd_lowrank niter={niter:<3} {1e3 * t:8.1f} ms  deficit {deficit(exact, s):9.2e}  ours {ours / 1e3 / t:.2f}x its time")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
