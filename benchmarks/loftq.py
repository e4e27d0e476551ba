#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""LoftQ as PEFT up to 0.19 runs it on a CPU, in PyTorch, on the matrix of benchmark_loftq: seconds and relative error.

PEFT's algorithm written again (its CPU path needs no bitsandbytes): NF4 by a nearest-entry search over blocks of 64, then a full
torch.linalg.svd of the residual, T times, the scale ignored. Run with OpenBLAS' own kernels:

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE /usr/bin/python3 benchmarks/loftq.py [size] [T]
"""
import sys
import time
import torch

NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                    0.7229568362236023, 1.0])


def nf4(w):
    blocks = w.reshape(-1, 64)
    scale = blocks.abs().max(dim=1, keepdim=True).values
    codes = (blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(dim=-1)
    return (NF4[codes] * scale).reshape(w.shape)


def main():
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    iterations = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    torch.manual_seed(1)
    torch.set_num_threads(2)
    k = n // 8
    u = torch.randn(n, k) / n ** 0.5
    v = torch.randn(k, n) / n ** 0.5
    w = 0.02 * torch.randn(n, n) + u @ ((8 * torch.arange(1, k + 1).float() ** -0.7)[:, None] * v)
    start = time.time()
    plain = nf4(w)
    print('torch %s, %d threads; quantise %.3f s' % (torch.__version__, torch.get_num_threads(), time.time() - start))
    start = time.time()
    low = torch.zeros_like(w)
    for _ in range(iterations):
        q = nf4(w - low)
        uu, s, vh = torch.linalg.svd(w - q, full_matrices=False)
        low = (uu[:, :16] * s[:16]) @ vh[:16]
    seconds = time.time() - start
    error, base = (w - q - low).norm(), (w - plain).norm()
    print('loftq nf4 r=16 T=%d %dx%d: %.2f s  error %.6f of ||W||, %.4f of plain'
          % (iterations, n, n, seconds, error / w.norm(), error / base))


main()
