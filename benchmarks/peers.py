#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Our kernels beside the peers themselves: PEFT's LoRA step and PiSSA, in turn, with ratios; and the times of bitsandbytes' NF4.

    python3 tests/peers/environment.py benchmarks/peers.py BUILD/benchmarks --program LOWRANK [--rounds 5] [--smoke]

BUILD/benchmarks holds benchmark_lora_step, LOWRANK is the program. The peers are those of
tests/peers/requirements.txt. Two threads for both; OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, where set, are removed for both. A ratio above
1 says that ours is faster.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)
os.environ["OMP_NUM_THREADS"] = "2"

import bitsandbytes
import bitsandbytes.functional as functional
import peft
import torch

torch.set_num_threads(2)


def median(step, rounds):
    step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class OneLayer(torch.nn.Module):
    def __init__(self, width, dtype=torch.float32):
        super().__init__()
        self.layer = torch.nn.Linear(width, width, bias=False, dtype=dtype)

    def forward(self, x):
        return self.layer(x)


def lora_step(width, tokens, rank, dtype, rounds):
    """Forward, and backward to x, A and B, through PEFT's own layer."""
    model = peft.get_peft_model(OneLayer(width, dtype), peft.LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=["layer"],
                                                                        init_lora_weights=False), autocast_adapter_dtype=False)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, width, dtype=dtype)
    leaves = [x, *[p for p in model.parameters() if p.requires_grad]]

    def step():
        for leaf in leaves:
            leaf.grad = None
        model(x).backward(g)

    return median(step, rounds)


def our_lora_step(directory, width, tokens, rank):
    """Seconds, by the benchmark of this library; None where it does not measure the case."""
    program = os.path.join(directory, "benchmark_lora_step")
    r = subprocess.run([program, f"--benchmark_filter=lora_step/{tokens}/{width}/{rank}/", "--benchmark_format=json",
                        "--benchmark_repetitions=3", "--benchmark_min_time=0.1"], check=True, capture_output=True, text=True)
    times = [row["real_time"] * 1e-3 for row in json.loads(r.stdout)["benchmarks"] if row.get("run_type") == "iteration"]
    return statistics.median(times) if times else None


def decaying(n):
    """A decaying spectrum over noise, as trained weights have."""
    torch.manual_seed(1)
    k = max(1, n // 8)
    u, v = torch.randn(n, k) / n**0.5, torch.randn(k, n) / n**0.5
    return 0.02 * torch.randn(n, n) + u @ ((8 * torch.arange(1, k + 1).float() ** -0.7)[:, None] * v)


def their_pissa(w, kind, rank):
    """Seconds of PEFT's own initialisation of one layer, and how far its rank-r part is from the best one."""
    net = OneLayer(w.shape[0])
    with torch.no_grad():
        net.layer.weight.copy_(w)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights=kind)
    start = time.perf_counter()
    model = peft.get_peft_model(net, config)
    seconds = time.perf_counter() - start
    return seconds, deficit(w, model.base_model.model.layer.get_delta_weight("default").detach(), rank)


def deficit(w, part, rank):
    """1 - captured energy / energy of the best part of this rank."""
    best = torch.linalg.svdvals(w.double())[:rank].square().sum()
    captured = w.double().square().sum() - (w.double() - part.double()).square().sum()
    return 1 - (captured / best).item()


def our_pissa(program, w, rank):
    """The same of `lowrank init pissa`, the time that it reports for computing."""
    from safetensors.torch import load_file, save_file
    with tempfile.TemporaryDirectory() as d:
        os.makedirs(d + "/model")
        save_file({"layer.weight": w}, d + "/model/model.safetensors")
        r = subprocess.run([program, "init", "pissa", d + "/model", "-o", d + "/out", "--rank", str(rank), "--targets", "layer", "--json"],
                           check=True, capture_output=True, text=True)
        t = load_file(d + "/out/adapter_model.safetensors")
        a, b = t["base_model.model.layer.lora_A.weight"], t["base_model.model.layer.lora_B.weight"]
        return json.loads(r.stdout)["modules"][0]["seconds"], deficit(w, b @ a, rank)


def nf4(n, rounds):
    w = torch.randn(n, n)
    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    found = {"quantise": median(lambda: functional.quantize_4bit(w, blocksize=64, quant_type="nf4"), rounds),
             "dequantise": median(lambda: functional.dequantize_4bit(codes, state), rounds)}
    layer = bitsandbytes.nn.LinearNF4(n, n, bias=False, compute_dtype=torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(w, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    for tokens in (1, 512):
        x = torch.randn(tokens, n)
        with torch.no_grad():
            found[f"product, {tokens} tokens"] = median(lambda: layer(x), rounds)
    return found


def line(what, theirs, ours, note=""):
    text = f"{what:48} {theirs * 1e3:10.3f} ms"
    print(text + (f" {ours * 1e3:10.3f} ms   ratio {theirs / ours:6.2f}   {note}" if ours else f"   {note}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", help="directory of the benchmark programs")
    parser.add_argument("--program", help="the lowrank program, for PiSSA")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one round: that it runs")
    args = parser.parse_args()
    width, tokens, rank, rounds = (256, 64, 8, 1) if args.smoke else (2048, 512, 16, args.rounds)
    print(f"torch {torch.__version__}, peft {peft.__version__}, bitsandbytes {bitsandbytes.__version__}; two threads; "
          f"{width}x{width}, {tokens} tokens, rank {rank}\n{'':48} {'peer':>13} {'ours':>13}")
    ours = None
    if os.path.exists(os.path.join(args.benchmarks, "benchmark_lora_step")):
        ours = our_lora_step(args.benchmarks, width, tokens, rank)
    line("LoRA step in PEFT, f32", lora_step(width, tokens, rank, torch.float32, rounds), ours)
    line("LoRA step in PEFT, bf16", lora_step(width, tokens, rank, torch.bfloat16, rounds), None)
    w = decaying(width)
    for kind in ("pissa_niter_4", "pissa_niter_16", "pissa"):
        seconds, short = their_pissa(w, kind, rank)
        mine, mine_short = our_pissa(args.program, w, rank) if args.program else (None, 0.0)
        line(f"PEFT's {kind}", seconds, mine, f"captured energy short of the best: {short:.1e}" + (f", ours {mine_short:.1e}" if mine else ""))
    for name, seconds in nf4(width if args.smoke else 4096, rounds).items():
        line(f"bitsandbytes NF4, {name}", seconds, None, "beside benchmark_quantise and benchmark_quantised_layer")


main()
