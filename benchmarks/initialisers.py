#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""The initialisers beside PyTorch doing what PEFT does: both on one weight, in turn, errors beside times.

    python3 benchmarks/initialisers.py BENCHMARK_INITIALISERS [--rounds 3] [--size 2048 2048] [--rank 16]

BENCHMARK_INITIALISERS is the program built from initialisers.cpp. PyTorch comes from python3-torch. OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE, where set, are removed for both, so that PyTorch gets the fastest kernels its BLAS has. The deficit is
1 - captured energy / energy of the best rank-r approximation, the latter from a full SVD in double.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


def make_weight(m, n, path):
    import torch

    torch.manual_seed(0)
    k = min(256, m, n)
    u, v = torch.linalg.qr(torch.randn(m, k))[0], torch.linalg.qr(torch.randn(n, k))[0]
    s = 8 * torch.arange(1, k + 1).double() ** -0.7
    w = (0.02 * torch.randn(m, n).double() + (u.double() * s) @ v.double().T).float().contiguous()
    w.numpy().tofile(path)
    return torch.linalg.svdvals(w.double()).square()


def torch_round(path, m, n, r):
    """What PEFT's initialisers compute, timed once each after the first call has warmed the threads up."""
    import numpy
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    w = torch.from_numpy(numpy.fromfile(path, dtype=numpy.float32).reshape(m, n))
    scale = 2.0
    _ = w @ w.T

    def split(u, s, vt):
        root = (s / scale).sqrt()
        a, b = root[:, None] * vt, u * root
        return w - scale * b @ a, a, b

    def error(base, a, b):
        whole = base.double() + scale * b.double() @ a.double()
        return ((whole - w.double()).norm() / w.double().norm()).item()

    results = {}

    def method(name, run, energy):
        start = time.perf_counter()
        base, a, b, s = run()
        seconds = time.perf_counter() - start
        results[name] = {"seconds": seconds, "error": error(base, a, b),
                         "captured": s.double().square().sum().item() if energy else None}

    def full(first):
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        part = slice(0, r) if first else slice(s.numel() - r, s.numel())
        return *split(u[:, part], s[part], vt[part]), s[part]

    def randomised(niter):
        u, s, v = torch.svd_lowrank(w, r, niter=niter)
        return *split(u, s, v.T), s

    def olora():
        q, rr = torch.linalg.qr(w)
        b, a = q[:, :r].contiguous(), rr[:r].contiguous()
        return w - scale * b @ a, a, b, a

    def corda():
        x = torch.randn(512, n) * torch.arange(1, n + 1).float() ** -0.3
        c = x.T @ x / 512
        damp = 0.01
        while True:
            fixed = c + torch.eye(n) * c.diagonal().mean() * damp
            inverse = torch.linalg.inv(fixed)
            if torch.dist(fixed @ inverse, torch.eye(n)).item() < 0.05:
                break
            damp *= 2
        u, s, vt = torch.linalg.svd(w @ fixed, full_matrices=False)
        return *split(u[:, :r], s[:r], (vt @ inverse)[:r]), s[:r]

    method("pissa", lambda: full(True), True)
    method("pissa_niter_4", lambda: randomised(4), True)
    method("pissa_niter_16", lambda: randomised(16), True)
    method("olora", olora, False)
    method("milora", lambda: full(False), True)
    method("corda", corda, False)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=[2048, 2048])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--torch-round", help=argparse.SUPPRESS)
    args = parser.parse_args()
    m, n = args.size
    if args.torch_round:
        print(json.dumps(torch_round(args.torch_round, m, n, args.rank)))
        return
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "2"

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weight.f32")
        energies = make_weight(m, n, path)
        best = energies[: args.rank].sum().item()
        ours, peer = {}, {}
        for _ in range(args.rounds):
            text = subprocess.run([args.program, "--size", str(m), str(n), "--rank", str(args.rank), "--weights", path],
                                  check=True, capture_output=True, text=True).stdout
            for line in text.splitlines():
                part = line.split()
                if part and part[0] in ("pissa", "pissa_tight", "pissa_bf16", "olora", "milora", "corda", "lora_ga"):
                    ours.setdefault(part[0], []).append([float(x) for x in part[1:4]])
            text = subprocess.run([sys.executable, __file__, args.program, "--size", str(m), str(n), "--rank",
                                   str(args.rank), "--torch-round", path], check=True, capture_output=True, text=True).stdout
            for name, value in json.loads(text).items():
                peer.setdefault(name, []).append(value)

    import torch

    print(f"{m} x {n}, rank {args.rank}, 2 threads, torch {torch.__version__}, median of {args.rounds} rounds in turn\n")
    print(f"{'ours':14}{'seconds':>9}{'split err':>11}{'deficit':>10}   {'torch':16}{'seconds':>9}{'split err':>11}"
          f"{'deficit':>10}{'ours/torch':>12}")
    pairs = [("pissa", "pissa"), ("pissa", "pissa_niter_4"), ("pissa", "pissa_niter_16"), ("pissa_tight", "pissa"),
             ("olora", "olora"), ("milora", "milora"), ("corda", "corda")]
    for a, b in pairs:
        seconds = statistics.median(x[0] for x in ours[a])
        error = max(x[1] for x in ours[a])
        other = statistics.median(x["seconds"] for x in peer[b])
        deficit = other_deficit = ""
        if a.startswith("pissa"):
            deficit = f"{1 - min(x[2] for x in ours[a]) / best:.1e}"
            other_deficit = f"{1 - min(x['captured'] for x in peer[b]) / best:.1e}"
        print(f"{a:14}{seconds:9.4f}{error:11.1e}{deficit:>10}   {b:16}{other:9.4f}"
              f"{max(x['error'] for x in peer[b]):11.1e}{other_deficit:>10}{seconds / other:12.3f}")


if __name__ == "__main__":
    main()
