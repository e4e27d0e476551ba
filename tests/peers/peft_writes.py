#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What PEFT writes, we read: `lowrank merge` equals merge_and_unload, `convert --to peft` gives PEFT the same model again.

    peft_writes.py PROGRAM [CASE...]
"""
import os
import sys
import tempfile

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import corda

from real_models import (Count, TOKENS, difference, load_adapter, load_model, logits, make_model, peft, run, shaken, torch,
                         transformers, versions)

program = sys.argv[1]
LIMIT = 1e-5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
count = Count()


def look_at_data(kind, model, lora):
    """The step PEFT asks for before get_peft_model where an initialisation looks at data."""
    if kind == "corda":  # its hooks take one sequence at a time

        @torch.no_grad()
        def run_model():
            for sequence in TOKENS:
                model(input_ids=sequence[None])

        corda.preprocess_corda(model, lora, run_model=run_model)
    if kind == "lora_ga":
        peft.tuners.lora.preprocess_loraga(model, lora, lambda: model(input_ids=TOKENS, labels=TOKENS).loss.backward())


def config(**options):
    return {"r": 4, "lora_alpha": 6, "target_modules": ALL, **options}


# name: (family, options of LoraConfig)
CASES = {f"init_{kind}": ("llama", config(init_lora_weights=kind))
         for kind in (True, False, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica")}
CASES |= {
    "init_corda": ("llama", config(init_lora_weights="corda")),
    "init_lora_ga": ("llama", config(init_lora_weights="lora_ga")),
    "init_eva": ("llama", config(init_lora_weights="eva")),
    "rslora": ("llama", config(use_rslora=True)),
    "dora": ("llama", config(use_dora=True)),
    "dora_rslora_qwen2": ("qwen2", config(use_dora=True, use_rslora=True)),
    "patterns": ("llama", config(rank_pattern={"layers.1.mlp.up_proj": 2, "q_proj": 3, r"layers\.0\.mlp\..*": 5},
                                 alpha_pattern={"layers.0.self_attn.v_proj": 1, r".*\.1\.mlp\..*": 7})),
    "patterns_overlap": ("llama", config(alpha_pattern={"q_proj": 1, "layers.1.self_attn.q_proj": 100})),
    "modules_to_save": ("llama", config(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])),
    "norms_to_save": ("llama", config(target_modules=["q_proj"], modules_to_save=["input_layernorm", "norm"])),
    "lora_bias": ("qwen2", config(target_modules=["q_proj", "k_proj", "v_proj"], lora_bias=True)),
    "bias_all": ("qwen2", config(bias="all")),
    "bias_lora_only": ("qwen2", config(target_modules=["q_proj"], bias="lora_only")),
    "layers_to_transform": ("llama", config(layers_to_transform=[1])),
    "exclude_modules": ("llama", config(exclude_modules=["k_proj", "layers.0.mlp.up_proj"])),
    "exclude_expression": ("llama", config(exclude_modules=r".*layers\.1\..*")),
    "expression": ("llama", config(target_modules=r".*\.layers\.[01]\.(self_attn\.[qv]_proj|mlp\.down_proj)")),
    "all_linear": ("qwen2", config(target_modules="all-linear")),
    "head": ("llama", config(target_modules=["q_proj", "lm_head"])),
    "embedding": ("llama", config(target_modules=["embed_tokens", "v_proj"])),
    "embedding_dora": ("llama", config(target_modules=["embed_tokens", "v_proj"], use_dora=True)),
    "embedding_tied": ("llama_tied", config(target_modules=["embed_tokens", "v_proj"])),
    "tied_weights": ("llama_tied", config(target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True)),
    "gpt2": ("gpt2", config(target_modules=["c_attn", "c_proj", "c_fc"])),
    "gpt2_dora": ("gpt2", config(target_modules=["c_attn", "c_proj", "c_fc"], use_dora=True)),
    "gpt2_embedding": ("gpt2", config(target_modules=["c_attn", "wpe"])),
    "gpt2_pissa": ("gpt2", config(target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights="pissa")),
    "t5": ("t5", config(target_modules=["q", "v", "wi_0", "wo"])),
    "mixtral_attention": ("mixtral", config(target_modules=["q_proj", "v_proj"])),
    "mixtral_experts": ("mixtral", config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "qwen3_moe_experts": ("qwen3_moe", config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "token_indices": ("llama", config(target_modules=["q_proj"], trainable_token_indices=[3, 17, 80])),
    "layer_replication": ("llama", config(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])),
    "kasa": ("llama", config(target_modules=["q_proj"], kasa_config="KasaConfig")),
    "velora": ("llama", config(target_modules=["q_proj"], velora_config="VeloraConfig")),
    "monteclora": ("llama", config(target_modules=["q_proj"], monteclora_config="MontecloraConfig")),
}
# Refused, by the name of the setting or of the tensors it brings: the adapter would compute something else without them.
REFUSED = {"token_indices": "trainable_token_indices", "layer_replication": "layer_replication", "kasa": "lora_diag",
           "velora": "lora_velora_embed", "monteclora": "lora_monteclora_sampler", "mixtral_experts": "target_parameters",
           "qwen3_moe_experts": "target_parameters", "tied_weights": "lm_head"}
# PEFT reads these otherwise than it meant them when it wrote them (docs/peers.md): we agree with its reading.
READ_OTHERWISE = {"patterns_overlap"}


def adapt(family, options, directory, out):
    """An adapter made, changed as by training, and saved by PEFT. Returns its model."""
    torch.manual_seed(1)
    options = {k: getattr(peft, v)() if k in ("kasa_config", "velora_config", "monteclora_config") else v for k, v in options.items()}
    kind = options.get("init_lora_weights", True)
    model = load_model(family, directory)
    if kind == "corda":
        options["corda_config"] = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
    if kind == "lora_ga":
        options["lora_ga_config"] = peft.tuners.lora.config.LoraGAConfig()
    if kind == "eva":
        options["eva_config"] = peft.tuners.lora.config.EvaConfig(rho=2.0)
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM", **options)
    look_at_data(kind, model, lora)
    model = get_peft_model(model, lora)
    if kind == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": TOKENS}] * 8, show_progress_bar=False)
    model.eval()
    with torch.no_grad():
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        for k, (n, p) in enumerate(shaken({n: p.detach() for n, p in trained.items()}, 4).items()):
            trained[n].copy_(p)
    model.save_pretrained(out)
    if isinstance(kind, str) and kind.split("_")[0] in ("pissa", "olora", "corda", "lora"):
        save_residual(model, family, directory, out + "-base")
    return model


def save_residual(model, family, directory, out):
    """The base that PEFT changed, as a checkpoint: what somebody has to keep who trains such an adapter."""
    base = load_model(family, directory)
    state = {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    result = base.load_state_dict(state, strict=True)
    assert not result.missing_keys
    base.save_pretrained(out)


def one(name, d):
    family, options = CASES[name]
    make_model(family, d + "/model")
    out = d + "/adapter"
    model = adapt(family, options, d + "/model", out)
    base, changed = d + "/model", []
    if os.path.isdir(out + "-base"):
        base, changed = out + "-base", ["--changed-base"]
    wanted = logits(model)
    if name in REFUSED:
        r = run(program, "merge", base, out, "-o", d + "/merged", "--allow-lossy", code=1)
        count.equal("refused by name", REFUSED[name] in r.stderr, name)
        return
    if name in READ_OTHERWISE:
        model, meant = load_adapter(load_model(family, base), out), wanted
        wanted = logits(model)
        assert difference(wanted, meant) > 1e-2, "PEFT now reads what it wrote: take this case out of READ_OTHERWISE"
    run(program, "merge", base, out, "-o", d + "/merged", "--allow-lossy", *changed)
    ours = load_model(family, d + "/merged")
    merged = model.merge_and_unload()
    if family == "llama_tied":
        wanted = logits(merged)  # merged into a table that is the head too: see docs/peers.md
    count.close("logits of the adapter in PEFT, and of `merge`", difference(logits(ours), wanted), LIMIT, name)
    state = ours.state_dict()
    for weight, value in merged.state_dict().items():
        count.close("weights of merge_and_unload, and of `merge`", difference(state[weight], value), LIMIT, f"{name} {weight}")
    if changed:
        return
    run(program, "convert", out, "--to", "peft", "-o", d + "/converted")
    again = load_adapter(load_model(family, base), d + "/converted")
    if family == "llama_tied":
        again = again.merge_and_unload()
    count.close("logits of the adapter in PEFT, before and after `convert`", difference(logits(again), wanted), LIMIT, name)


print(versions(torch, transformers, peft))
failed = []
for name in sys.argv[2:] or CASES:
    with tempfile.TemporaryDirectory() as d:
        try:
            one(name, d)
        except Exception as e:
            failed.append(f"{name}: {type(e).__name__}: {str(e)[:600]}")
for line in failed:
    print("failed:", line)
count.report("peft")
sys.exit(bool(failed))
