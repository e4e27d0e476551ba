#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes fixtures/*.txt: one training step of a tiny Llama by PyTorch in double, autograd and torch.optim.AdamW.

    /usr/bin/python3 make_fixture.py          (python3-torch; written with 1.13)

The model is written as Hugging Face's modelling code has it: rotate_half, repeat_kv, RMSNorm, SwiGLU; an adapter adds
scale * (x A^T) B^T. Weights come from a formula that the C++ test repeats, so only results are stored:

    loss 1 1 <value>
    gradient <name> ...      after backward
    value <name> ...         after the step
    loss_after 1 1 <value>
"""
import math
import os
import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)
VOCAB, D, FF, LAYERS, HEADS, KV, THETA, EPS = 7, 5, 6, 2, 4, 2, 100.0, 1e-5
BATCH, TIME, RANK, SCALE = 2, 5, 2, 1.5
LR, BETAS, ADAM_EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1
# Heads of 8 have four frequencies; in a window of 100 they make 15.9, 5.0, 1.6 and 0.5 turns: two kept, one blended, one divided.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 100}
LINEAR = {"rope_type": "linear", "factor": 2.5}


def weight_list(tied, hd):
    """Names and shapes in the order of for_each_weight of config.hpp."""
    out = [("model.embed_tokens", (VOCAB, D))]
    for l in range(LAYERS):
        p = f"model.layers.{l}."
        out += [(p + "input_layernorm", (1, D)), (p + "post_attention_layernorm", (1, D)),
                (p + "self_attn.q_proj", (HEADS * hd, D)), (p + "self_attn.k_proj", (KV * hd, D)),
                (p + "self_attn.v_proj", (KV * hd, D)), (p + "self_attn.o_proj", (D, HEADS * hd)),
                (p + "mlp.gate_proj", (FF, D)), (p + "mlp.up_proj", (FF, D)), (p + "mlp.down_proj", (D, FF))]
    out.append(("model.norm", (1, D)))
    if not tied:
        out.append(("lm_head", (VOCAB, D)))
    return out


def formula(shape, number, amplitude=0.5):
    n = shape[0] * shape[1]
    return torch.tensor([amplitude * math.sin(1 + 0.7 * i + 1.3 * number) for i in range(n)]).reshape(shape)


def weights(tied, hd):
    return {name: (1 + formula(shape, t, 0.3) if "norm" in name else formula(shape, t))
            for t, (name, shape) in enumerate(weight_list(tied, hd))}


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def frequencies(hd, scaling):
    """Angles a position, by the wavelengths that modeling_rope_utils.py compares."""
    inverse = THETA ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)
    if scaling is None:
        return inverse
    if scaling["rope_type"] == "linear":
        return inverse / scaling["factor"]
    low, high, window = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    out = torch.where(wavelength > window / low, inverse / scaling["factor"], inverse)
    smooth = (window / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / scaling["factor"] + smooth * inverse
    between = (wavelength <= window / low) & (wavelength >= window / high)
    assert between.any() and (wavelength > window / low).any() and (wavelength < window / high).any()
    return torch.where(between, blended, out)


def model_loss(w, adapters, tokens, targets, tied, hd, scaling):
    def linear(name, x):
        y = x @ w[name].T
        if name in adapters:
            A, B = adapters[name]
            y = y + SCALE * (x @ A.T) @ B.T
        return y

    def norm(name, x):
        return w[name][0] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    x = w["model.embed_tokens"][tokens]
    if "model.embed_tokens" in adapters:
        A, B = adapters["model.embed_tokens"]  # A rank x vocab, B dim x rank
        x = x + SCALE * A.T[tokens] @ B.T
    angle = torch.outer(torch.arange(TIME, dtype=torch.float64), frequencies(hd, scaling))
    angle = torch.cat((angle, angle), dim=-1)
    mask = torch.full((TIME, TIME), float("-inf")).triu(1)
    for l in range(LAYERS):
        p = f"model.layers.{l}."
        h = norm(p + "input_layernorm", x)
        q = linear(p + "self_attn.q_proj", h).view(BATCH, TIME, HEADS, hd).transpose(1, 2)
        k = linear(p + "self_attn.k_proj", h).view(BATCH, TIME, KV, hd).transpose(1, 2)
        v = linear(p + "self_attn.v_proj", h).view(BATCH, TIME, KV, hd).transpose(1, 2)
        q = q * angle.cos() + rotate_half(q) * angle.sin()
        k = k * angle.cos() + rotate_half(k) * angle.sin()
        k, v = (z.repeat_interleave(HEADS // KV, dim=1) for z in (k, v))
        a = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(hd) + mask, dim=-1) @ v
        x = x + linear(p + "self_attn.o_proj", a.transpose(1, 2).reshape(BATCH, TIME, HEADS * hd))
        h = norm(p + "post_attention_layernorm", x)
        x = x + linear(p + "mlp.down_proj", F.silu(linear(p + "mlp.gate_proj", h)) * linear(p + "mlp.up_proj", h))
    h = norm("model.norm", x)
    logits = h @ w["model.embed_tokens"].T if tied else linear("lm_head", h)
    return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))


def write(path, tied, adapted, hd=4, scaling=None):
    w = weights(tied, hd)
    adapters, trained = {}, {}
    if adapted:
        for t, (name, (rows, cols)) in enumerate(weight_list(tied, hd)):
            if "norm" in name:
                continue
            embedding = name == "model.embed_tokens"
            a = formula((RANK, rows if embedding else cols), 100 + t).requires_grad_()
            b = formula((cols if embedding else rows, RANK), 200 + t).requires_grad_()
            adapters[name] = (a, b)
            kind = "lora_embedding_" if embedding else "lora_"
            trained[f"{name}.{kind}A"], trained[f"{name}.{kind}B"] = a, b
    else:
        for name, value in w.items():
            trained[name + ".weight"] = value.requires_grad_()
    tokens = torch.tensor([(3 * i * i + 2 * i + 1) % VOCAB for i in range(BATCH * TIME)]).reshape(BATCH, TIME)
    targets = torch.tensor([(5 * i * i + i + 2) % VOCAB for i in range(BATCH * TIME)]).reshape(BATCH, TIME)
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, betas=BETAS, eps=ADAM_EPS, weight_decay=DECAY)
    loss = model_loss(w, adapters, tokens, targets, tied, hd, scaling)
    loss.backward()
    lines = [f"loss loss 1 1 {loss.item():.17g}"]

    def add(what, name, tensor):
        numbers = " ".join(f"{x:.17g}" for x in tensor.detach().reshape(-1).tolist())
        lines.append(f"{what} {name} {tensor.shape[0]} {tensor.shape[1]} {numbers}")

    for name, tensor in trained.items():
        add("gradient", name, tensor.grad)
    optimizer.step()
    for name, tensor in trained.items():
        add("value", name, tensor)
    lines.append(f"loss_after loss 1 1 {model_loss(w, adapters, tokens, targets, tied, hd, scaling).item():.17g}")
    with open(path, "w", encoding="ascii") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")
    os.makedirs(here, exist_ok=True)
    write(os.path.join(here, "full_step.txt"), tied=False, adapted=False)
    write(os.path.join(here, "full_step_tied.txt"), tied=True, adapted=False)
    write(os.path.join(here, "lora_step.txt"), tied=False, adapted=True)
    write(os.path.join(here, "full_step_linear.txt"), tied=False, adapted=False, hd=8, scaling=LINEAR)
    write(os.path.join(here, "full_step_llama3.txt"), tied=False, adapted=False, hd=8, scaling=LLAMA3)
