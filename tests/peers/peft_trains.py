#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Five steps of training in PEFT from the files of `lowrank init` equal five steps of ours from the same files.

The net is y = second(tanh(first(x))), the optimiser AdamW with weight decay, the batches the same. Where the base is in 4 bits,
ours computes from the codes.

    peft_trains.py PROGRAM PEER_TRAIN
"""
import os
import subprocess
import sys
import tempfile

from real_models import Count, difference, load_file, peft, run, save_file, tensors, torch, versions

import numpy as np

program, trainer = sys.argv[1:3]
STEPS, RATE, DECAY = 5, 0.01, 0.02
LIMIT = 1e-4
count = Count()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(48, 40, bias=False)
        self.second = torch.nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def train_in_peft(base, adapter, batches, out):
    net = Net()
    net.load_state_dict(load_file(base + "/model.safetensors"))
    config = peft.PeftConfig.from_pretrained(adapter)
    config.task_type = None  # no language model, whatever init took it for
    model = peft.PeftModel.from_pretrained(net, adapter, config=config, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    losses = []
    for k in range(STEPS):
        optimiser.zero_grad()
        loss = torch.nn.functional.mse_loss(model(batches[f"x{k}"]), batches[f"y{k}"])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.save_pretrained(out)
    return losses


def one(method, d, *options):
    what = " ".join([method, *map(str, options)])
    torch.manual_seed(3)
    net = Net()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    os.makedirs(d + "/model")
    save_file(net.state_dict(), d + "/model/model.safetensors", metadata={"format": "pt"})
    batches = {f"{n}{k}": torch.randn(30, 48 if n == "x" else 24) for n in "xy" for k in range(STEPS)}
    np.savez(d + "/batches.npz", **{k: v.numpy() for k, v in batches.items()})
    common = ["--rank", 4, "--alpha", 6, "--targets", "first,second", *options]
    run(program, "init", method, d + "/model", "-o", d + "/init", *common)
    base = d + "/init/base" if os.path.isdir(d + "/init/base") else d + "/model"
    theirs = train_in_peft(base, d + "/init", batches, d + "/theirs")
    start, wanted = tensors(d + "/init"), tensors(d + "/theirs")
    moved = max(difference(start[n], wanted[n]) for n in wanted)
    assert moved > 100 * LIMIT, f"{what}: five steps moved nothing"
    bases = {"": (base, d + "/init")}
    if method in ("loftq", "qpissa"):
        run(program, "init", method, d + "/model", "-o", d + "/packed", "--packed", *common)
        bases[" in 4 bits"] = (d + "/packed/base", d + "/packed")
    for name, (directory, adapter) in bases.items():
        r = subprocess.run([trainer, directory, adapter, d + "/batches.npz", str(RATE), str(DECAY), d + "/ours" + name], capture_output=True,
                           text=True)
        assert r.returncode == 0, r.stderr
        ours = [float(x) for x in r.stdout.split()]
        count.close("losses of five steps, relative", max(abs(a / b - 1) for a, b in zip(ours, theirs)), LIMIT, what + name)
        got = tensors(d + "/ours" + name)
        assert got.keys() == wanted.keys()
        for n in wanted:
            count.close("factors after five steps", difference(got[n], wanted[n]), LIMIT, f"{what}{name} {n}")


print(versions(torch, peft))
failed = []
for method in ("kaiming", "pissa", "milora", "olora", "loftq", "qpissa"):
    for options in ((), ("--rslora",)):
        with tempfile.TemporaryDirectory() as d:
            try:
                one(method, d, *options)
            except Exception as e:
                failed.append(f"{method} {options}: {type(e).__name__}: {str(e)[:500]}")
for line in failed:
    print("failed:", line)
count.report("peft, training")
sys.exit(bool(failed))
