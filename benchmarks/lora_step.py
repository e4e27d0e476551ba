#!/usr/bin/python3
"""The LoRA step beside PyTorch: runs both in turn, several times, and prints medians, errors and ratios.

    python3 benchmarks/lora_step.py BENCHMARK_LORA_STEP [--rounds 3] [--filter '/512/2048/']

BENCHMARK_LORA_STEP is the program built from lora_step.cpp. PyTorch comes from python3-torch. OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE, where set, are removed for both: PyTorch gets the fastest kernels its BLAS has, and its result is checked
against double precision each round.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time


def torch_round(cases, repeats):
    """Median seconds and errors of torch's frozen, full and LoRA steps; run in a process of its own."""
    import torch

    torch.set_num_threads(2)
    results = {}

    def median(step):
        step()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    for tokens, width, rank in cases:
        torch.manual_seed(0)
        w = torch.randn(width, width) / width ** 0.5
        a = (torch.randn(rank, width) / width ** 0.5).requires_grad_()
        b = (0.02 * torch.randn(width, rank)).requires_grad_()
        x = torch.randn(tokens, width, requires_grad=True)
        g = torch.randn(tokens, width)
        wf = w.clone().requires_grad_()
        s = (2.0 * rank + 1) / rank

        def step(weight, low, leaves):
            for leaf in leaves:
                leaf.grad = None
            y = x @ weight.T
            if low:
                y = y + s * ((x @ a.T) @ b.T)
            y.backward(g)
            return y

        y = step(w, True, [x, a, b]).double()
        exact = x.double() @ w.double().T + s * ((x.double() @ a.double().T) @ b.double().T)
        error = ((y - exact).abs().max() / exact.abs().max()).item()
        results[f"{tokens}/{width}/{rank}"] = {
            "frozen": median(lambda: step(w, False, [x])),
            "full": median(lambda: step(wf, False, [x, wf])),
            "lora": median(lambda: step(w, True, [x, a, b])),
            "error": error,
        }
    results["version"] = torch.__version__
    return results


def our_round(program, pattern):
    command = [program, f"--benchmark_filter={pattern}", "--benchmark_format=json", "--benchmark_repetitions=3",
               "--benchmark_enable_random_interleaving=true", "--benchmark_min_time=0.1"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment()).stdout)
    found = {}
    for row in rows["benchmarks"]:
        if row.get("run_type") == "iteration":
            found.setdefault(row["name"].replace("/real_time", ""), []).append((row["real_time"] * 1e-3, row["error"]))
    return found


def environment():
    return {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="1/2048/16,64/2048/16,512/2048/8,512/2048/16,512/2048/64,512/2048/256",
                        help="tokens/width/rank, comma-separated")
    parser.add_argument("--torch-child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = [tuple(map(int, c.split("/"))) for c in args.cases.split(",")]
    if args.torch_child:
        print(json.dumps(torch_round(cases, 9)))
        return

    ours, theirs = {}, {}
    pattern = "|".join([f"lora_step/{t}/{w}/{r}/" for t, w, r in cases]
                       + sorted({f"(frozen|full)_step/{t}/{w}/1/" for t, w, _ in cases}))
    for _ in range(args.rounds):
        for name, values in our_round(args.program, pattern).items():
            ours.setdefault(name, []).extend(values)
        child = [sys.executable, __file__, args.program, "--cases", args.cases, "--torch-child", "1"]
        theirs_now = json.loads(
            subprocess.run(child, check=True, capture_output=True, text=True, env=environment()).stdout)
        version = theirs_now.pop("version")
        for name, values in theirs_now.items():
            for key, value in values.items():
                theirs.setdefault((name, key), []).append(value)

    model = re.search(r"model name\s*:\s*(.*)", open("/proc/cpuinfo").read())
    print(f"{platform.machine()}, {model.group(1) if model else 'unknown'}, 2 threads, torch {version}, "
          f"{args.rounds} rounds; milliseconds, medians")
    print(f"{'tokens/width/rank':>20} {'frozen':>8} {'LoRA':>8} {'ratio':>6} {'full':>8} {'error':>8} |"
          f" {'torch':>8} {'LoRA':>8} {'ratio':>6} {'full':>8} {'error':>8} | {'LoRA: torch/ours':>16}")
    mid = statistics.median
    for t, w, r in cases:
        frozen, lora, full = (mid(v[0] for v in ours[n]) for n in
                              (f"frozen_step/{t}/{w}/1", f"lora_step/{t}/{w}/{r}", f"full_step/{t}/{w}/1"))
        error = max(v[1] for v in ours[f"lora_step/{t}/{w}/{r}"])
        tf, tl, tu, te = (mid(theirs[(f"{t}/{w}/{r}", k)]) for k in ("frozen", "lora", "full", "error"))
        print(f"{f'{t}/{w}/{r}':>20} {frozen*1e3:8.3f} {lora*1e3:8.3f} {lora/frozen:6.3f} {full*1e3:8.3f} {error:8.1e} |"
              f" {tf*1e3:8.3f} {tl*1e3:8.3f} {tl/tf:6.3f} {tu*1e3:8.3f} {te:8.1e} | {tl/lora:16.2f}")


if __name__ == "__main__":
    main()
