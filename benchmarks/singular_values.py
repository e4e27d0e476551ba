#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""All singular values beside NumPy and PyTorch: one weight, in turn, errors against double beside times.

    python3 benchmarks/singular_values.py BENCHMARK_SINGULAR_VALUES [--rounds 3] [--size 2048 2048]

BENCHMARK_SINGULAR_VALUES is the program built from singular_values.cpp. NumPy and PyTorch come from python3-numpy and
python3-torch. OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, where set, are removed for all, so that the peers get the fastest
kernels their BLAS has. The weight is 0.02 N(0, 1) plus 256 components 8 k^-0.7; the reference is torch.linalg.svdvals in
double.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 2048))
    args = parser.parse_args()
    if os.environ.pop("OPENBLAS_CORETYPE", None) or os.environ.pop("OPENBLAS_L2_SIZE", None):
        os.execv(sys.executable, [sys.executable, *sys.argv])  # BLAS reads them when it loads
    import numpy
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    m, n = args.size
    k = min(256, m, n)
    u, v = torch.linalg.qr(torch.randn(m, k))[0], torch.linalg.qr(torch.randn(n, k))[0]
    s = 8 * torch.arange(1, k + 1).double() ** -0.7
    w = (0.02 * torch.randn(m, n).double() + (u.double() * s) @ v.double().T).float().contiguous()
    exact = torch.linalg.svdvals(w.double()).numpy()
    times, errors = {}, {}

    def note(name, seconds, values):
        times.setdefault(name, []).append(seconds)
        errors[name] = float(numpy.abs(values - exact).max() / exact[0])

    def timed(name, call):
        time.sleep(0.2)  # the threads of the one before go to sleep
        start = time.perf_counter()
        values = call()
        note(name, time.perf_counter() - start, numpy.asarray(values, dtype=numpy.float64))

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weight.f32")
        w.numpy().tofile(path)
        for _ in range(args.rounds):
            line = subprocess.run([args.program, "--file", path, str(m), str(n)], check=True, capture_output=True, text=True)
            note("lowrank singular_values", float(line.stdout) / 1e3, numpy.fromfile(path + ".values", dtype=numpy.float64))
            timed("torch.linalg.svdvals", lambda: torch.linalg.svdvals(w).numpy())
            timed("numpy.linalg.svd(compute_uv=False)", lambda: numpy.linalg.svd(w.numpy(), compute_uv=False))
    print(f"{m}x{n} float32, 2 threads, torch {torch.__version__}, numpy {numpy.__version__}, best of {args.rounds}")
    ours = min(times["lowrank singular_values"])
    for name, seconds in times.items():
        best = min(seconds)
        print(f"{name:36s} {best * 1e3:9.1f} ms  {best / ours:6.2f} x ours  max error/s1 {errors[name]:.1e}")


if __name__ == "__main__":
    main()
