# SPDX-License-Identifier: Apache-2.0
"""All singular values of one 1B-shaped layer: numpy's LAPACK (gesdd, float32), then lowrank, in turn.

    python3 benchmarks/spectrum.py build/benchmarks/benchmark_spectrum
"""
import subprocess
import sys
import time

import numpy as np

d = 2048
shapes = [(d, d), (d // 4, d), (d // 4, d), (d, d), (4 * d, d), (4 * d, d), (d, 4 * d)]
rng = np.random.default_rng(1)
total = 0.0
print(f"numpy {np.__version__}")
for m, n in shapes:
    w = (1e-3 * rng.standard_normal((m, n))).astype(np.float32)
    begin = time.perf_counter()
    s = np.linalg.svd(w, compute_uv=False)
    energy = np.cumsum(s.astype(np.float64) ** 2)
    r90 = int(np.searchsorted(energy, 0.9 * energy[-1])) + 1
    seconds = time.perf_counter() - begin
    total += seconds
    print(f"{m:5d} x {n:5d}: {seconds:.3f} s, r90 {r90}")
print(f"a layer: {total:.2f} s")
print(subprocess.run([sys.argv[1]], capture_output=True, text=True, check=True).stdout)
