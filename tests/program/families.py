#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every family of models, tiny and random: which modules the program adapts, in which orientation, and what
adapter_config.json says. What init, extract and merge make of them is checked by arithmetic of Python's own. Python and nothing else."""
import json
import math
import os
import struct
import tempfile

from scan_support import check, finish, noise, rng, run, save, times, transposed, tool  # noqa: F401

D, F, V, P, E = 6, 9, 11, 7, 3  # hidden, inner, vocabulary, positions, experts

# family -> (config.json beside model_type, {embeddings}, {linear layers: (out, in)}, {stored in×out: (out, in)}, {routers}, {heads}, task)
QKVO = {f"self_attn.{n}_proj": (D, D) for n in "qkvo"}
GLU = {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}


def layers(prefix, names):
    return {prefix + n: s for n, s in names.items()}


def llama_like(architecture, prefix="model."):
    return dict(architecture=architecture, embeddings={prefix + "embed_tokens": V}, linear=layers(prefix + "layers.0.", {**QKVO, **GLU}),
                heads={"lm_head": (V, D)}, task="CAUSAL_LM")


def mixture(architecture, gate, experts):
    return dict(architecture=architecture, embeddings={"model.embed_tokens": V}, linear=layers("model.layers.0.", {**QKVO, **experts}),
                routers={"model.layers.0." + gate: (E, D)}, heads={"lm_head": (V, D)}, task="CAUSAL_LM")


def fused(architecture, embedding, prefix, attention, head):
    return dict(architecture=architecture, embeddings={embedding: V}, heads={head: (V, D)}, task="CAUSAL_LM",
                linear=layers(prefix, {attention + ".query_key_value": (3 * D, D), attention + ".dense": (D, D),
                                       "mlp.dense_h_to_4h": (F, D), "mlp.dense_4h_to_h": (D, F)}))


def bert_like(prefix, architecture, heads, task):
    layer = {"attention.self.query": (D, D), "attention.output.dense": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F)}
    return dict(architecture=architecture, heads=heads, task=task, linear=layers(prefix + ".encoder.layer.0.", layer),
                embeddings={f"{prefix}.embeddings.{n}_embeddings": P for n in ("word", "position", "token_type")})


T5 = {"layer.0.SelfAttention.q": (D, D), "layer.0.SelfAttention.o": (D, D), "layer.1.DenseReluDense.wi": (F, D), "layer.1.DenseReluDense.wo": (D, F)}
CLIP = {"self_attn.q_proj": (D, D), "self_attn.out_proj": (D, D), "mlp.fc1": (F, D), "mlp.fc2": (D, F)}
FAMILIES = {
    "llama": llama_like("LlamaForCausalLM"), "mistral": llama_like("MistralForCausalLM"), "qwen2": llama_like("Qwen2ForCausalLM"),
    "qwen3": llama_like("Qwen3ForCausalLM"), "gemma": llama_like("GemmaForCausalLM"), "gemma2": llama_like("Gemma2ForCausalLM"),
    "gemma3": llama_like("Gemma3ForConditionalGeneration", "language_model.model."), "gemma3_text": llama_like("Gemma3ForCausalLM"),
    "qwen3_moe": mixture("Qwen3MoeForCausalLM", "mlp.gate", {f"mlp.experts.{e}.{n}": s for e in range(E) for n, s in
                                                             (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F)))}),
    "mixtral": mixture("MixtralForCausalLM", "block_sparse_moe.gate", {f"block_sparse_moe.experts.{e}.{n}": s for e in range(E) for n, s in
                                                                       (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D)))}),
    "phi": dict(llama_like("PhiForCausalLM"), linear=layers("model.layers.0.", {**{f"self_attn.{n}_proj": (D, D) for n in "qkv"},
                                                                               "self_attn.dense": (D, D), "mlp.fc1": (F, D), "mlp.fc2": (D, F)})),
    "phi3": dict(llama_like("Phi3ForCausalLM"), linear=layers("model.layers.0.", {"self_attn.qkv_proj": (3 * D, D), "self_attn.o_proj": (D, D),
                                                                                 "mlp.gate_up_proj": (2 * F, D), "mlp.down_proj": (D, F)})),
    "gpt2": dict(architecture="GPT2LMHeadModel", embeddings={"transformer.wte": V, "transformer.wpe": P}, heads={"lm_head": (V, D)}, task="CAUSAL_LM",
                 in_by_out=layers("transformer.h.0.", {"attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "mlp.c_fc": (F, D), "mlp.c_proj": (D, F)})),
    "gpt_neox": fused("GPTNeoXForCausalLM", "gpt_neox.embed_in", "gpt_neox.layers.0.", "attention", "embed_out"),
    "falcon": fused("FalconForCausalLM", "transformer.word_embeddings", "transformer.h.0.", "self_attention", "lm_head"),
    "bloom": fused("BloomForCausalLM", "transformer.word_embeddings", "transformer.h.0.", "self_attention", "lm_head"),
    "opt": dict(architecture="OPTForCausalLM", embeddings={"model.decoder.embed_tokens": V, "model.decoder.embed_positions": P},
                linear=layers("model.decoder.layers.0.", {"self_attn.q_proj": (D, D), "self_attn.out_proj": (D, D), "fc1": (F, D), "fc2": (D, F)}),
                heads={"lm_head": (V, D)}, task="CAUSAL_LM"),
    "t5": dict(architecture="T5ForConditionalGeneration", heads={"lm_head": (V, D)}, task="SEQ_2_SEQ_LM", linear=layers("encoder.block.0.", T5),
               embeddings={"shared": V, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": 32}),
    "bert": bert_like("bert", "BertForSequenceClassification", {"classifier": (2, D)}, "SEQ_CLS"),
    "roberta": bert_like("roberta", "RobertaModel", {"classifier.out_proj": (2, D)}, "FEATURE_EXTRACTION"),
    "clip": dict(architecture="CLIPModel", task="FEATURE_EXTRACTION", linear={**layers("text_model.encoder.layers.0.", CLIP), "visual_projection": (D, D)},
                 embeddings={"text_model.embeddings.token_embedding": V, "text_model.embeddings.position_embedding": P,
                             "vision_model.embeddings.position_embedding": P}),
    "vit": dict(architecture="ViTForImageClassification", heads={"classifier": (4, D)}, task=None,
                linear=layers("vit.encoder.layer.0.", {"attention.attention.query": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F)}),
                convolutions={"vit.embeddings.patch_embeddings.projection": [D, 3, 2, 2]}),
}


def load(path):
    """name -> (shape, floats) of a file of F32."""
    raw = open(path, "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    out = {}
    for name, t in json.loads(raw[8:8 + n]).items():
        if name != "__metadata__":
            begin, end = t["data_offsets"]
            out[name] = (t["shape"], list(struct.unpack(f"<{(end - begin) // 4}f", raw[8 + n + begin:8 + n + end])))
    return out


def checkpoint(directory, family, model_type):
    """Writes one; returns name -> (shape, floats)."""
    os.makedirs(directory)
    shapes = {}
    for name, rows in family.get("embeddings", {}).items():
        shapes[name] = [rows, D]
    for part in ("linear", "routers", "heads"):
        for name, (m, n) in family.get(part, {}).items():
            shapes[name] = [m, n]
    for name, (m, n) in family.get("in_by_out", {}).items():
        shapes[name] = [n, m]
    shapes.update(family.get("convolutions", {}))
    tensors = {name + ".weight": ("F32", s, noise(1, math.prod(s))) for name, s in shapes.items()}
    tensors["norm.weight"] = ("F32", [D], noise(1, D))
    save(os.path.join(directory, "model.safetensors"), tensors)
    if model_type is not None:
        with open(os.path.join(directory, "config.json"), "w") as f:
            json.dump({"model_type": model_type, "architectures": [family["architecture"]], "num_attention_heads": 2, "hidden_size": D}, f)
    return load(os.path.join(directory, "model.safetensors"))


def update_of(tensors, config, module, out, n):
    """s·B·A of a linear layer, out×in, as PEFT would compute it."""
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    check(a[0][1] == n and b[0][0] == out, f"{module}: A {a[0]}, B {b[0]}, expected {out}x{n}")
    r = a[0][0]
    return [config["lora_alpha"] / r * x for x in times(b[1], a[1], out, r, n)] if a[0][1] == n and b[0][0] == out else [math.nan] * (out * n)


def close(x, y, tolerance):
    return len(x) == len(y) and max(abs(a - b) for a, b in zip(x, y)) <= tolerance


def read_adapter(directory):
    return load(os.path.join(directory, "adapter_model.safetensors")), json.load(open(os.path.join(directory, "adapter_config.json")))


with tempfile.TemporaryDirectory() as tmp:
    for model_type, family in FAMILIES.items():
        d = os.path.join(tmp, model_type)
        base = checkpoint(d + "/base", family, model_type)
        layers_ = {**family.get("linear", {}), **family.get("in_by_out", {})}
        turned = set(family.get("in_by_out", {}))

        # What all-linear means, and what the configuration says.
        r = run("init", "pissa", d + "/base", "-o", d + "/pissa", "--rank", "2", "--alpha", "3")
        check(r.stderr == "", f"{model_type}: nothing to say of a known family, got {r.stderr}")
        tensors, config = read_adapter(d + "/pissa")
        adapted = {n[len("base_model.model."):-len(".lora_A.weight")] for n in tensors if n.endswith(".lora_A.weight")}
        check(adapted == set(layers_), f"{model_type}: adapted {sorted(adapted ^ set(layers_))} too much or too little")
        check(config["fan_in_fan_out"] == bool(turned), f"{model_type}: fan_in_fan_out {config['fan_in_fan_out']}")
        check(config["task_type"] == family["task"], f"{model_type}: task_type {config['task_type']}, expected {family['task']}")

        # PiSSA: base + s·B·A is W, with ΔW laid on in the layer's own orientation.
        changed = load(d + "/pissa/base/model.safetensors")
        for module, (m, n) in layers_.items():
            delta = update_of(tensors, config, module, m, n)
            if module in turned:
                delta = transposed(delta, m, n)
            got = [x + y for x, y in zip(changed[module + ".weight"][1], delta)]
            check(close(got, base[module + ".weight"][1], 2e-6), f"{model_type}: base + s*B*A is not W of {module}")

        # merge puts it back.
        run("merge", d + "/pissa/base", d + "/pissa", "-o", d + "/merged", "--allow-lossy")
        merged = load(d + "/merged/model.safetensors")
        for name, (shape, values) in base.items():
            check(close(merged[name][1], values, 2e-6), f"{model_type}: merged {name}")

        # extract finds a change of rank 1 of each layer, in its orientation.
        tuned = {k: (s, list(v)) for k, (s, v) in base.items()}
        changes = {}
        for module, (m, n) in layers_.items():
            u, v = noise(m, 1), noise(n, 1)
            changes[module] = times(u, v, m, 1, n)
            stored = transposed(changes[module], m, n) if module in turned else changes[module]
            tuned[module + ".weight"] = (base[module + ".weight"][0], [x + y for x, y in zip(base[module + ".weight"][1], stored)])
        os.makedirs(d + "/tuned")
        save(d + "/tuned/model.safetensors", {k: ("F32", s, v) for k, (s, v) in tuned.items()})
        run("extract", d + "/base", d + "/tuned", "-o", d + "/extracted", "--rank", "1")
        tensors, config = read_adapter(d + "/extracted")
        check(config["fan_in_fan_out"] == bool(turned) and config["task_type"] == family["task"], f"{model_type}: configuration of extract")
        for module, (m, n) in layers_.items():
            check(close(update_of(tensors, config, module, m, n), changes[module], 1e-4), f"{model_type}: extract of {module}")

        # Named, an embedding is one: lora_embedding_A is r×rows.
        for name, rows in family.get("embeddings", {}).items():
            run("init", "kaiming", d + "/base", "-o", d + "/embedding", "--targets", name, "--rank", "2")
            tensors, _ = read_adapter(d + "/embedding")
            check(tensors.get(f"base_model.model.{name}.lora_embedding_A", ([], []))[0] == [2, rows], f"{model_type}: {name} is an embedding")
        for name in family.get("routers", {}):
            r = run("init", "kaiming", d + "/base", "-o", d + "/no", "--targets", name, "--rank", str(E + 1), code=1)
            check("router of 3 experts" in r.stderr and name in r.stderr, f"{model_type}: {r.stderr}")
            run("init", "kaiming", d + "/base", "-o", d + "/router", "--targets", name, "--rank", "2")

        # A flag that contradicts the family is an error, one that agrees is none.
        for command in (("init", "pissa", d + "/base"), ("extract", d + "/base", d + "/tuned")):
            r = run(*command, "-o", d + "/flag_" + command[0], "--rank", "1", "--fan-in-fan-out", code=0 if turned else 1)
            if not turned:
                check("--fan-in-fan-out contradicts" in r.stderr and model_type in r.stderr, f"{model_type}: {r.stderr}")

    # A square Conv1D weight and an adapter whose configuration says the wrong thing: PEFT goes by the layer, so does merge, and says so.
    d = tmp + "/gpt2"
    config = json.load(open(d + "/extracted/adapter_config.json"))
    with open(d + "/extracted/adapter_config.json", "w") as f:
        json.dump({**config, "fan_in_fan_out": False}, f)
    r = run("merge", d + "/base", d + "/extracted", "-o", d + "/merged2")
    check("fan_in_fan_out false" in r.stderr and "in x out" in r.stderr, r.stderr)
    merged, tuned = load(d + "/merged2/model.safetensors"), load(d + "/tuned/model.safetensors")
    for name, (shape, values) in tuned.items():
        check(close(merged[name][1], values, 1e-4), f"merged against fan_in_fan_out false: {name}")

    # No family: as the flag says, with a note.
    for model_type, said in ((None, "no config.json"), ("mamba9", 'model_type "mamba9" is not known')):
        d = f"{tmp}/unknown{model_type}"
        base = checkpoint(d + "/base", FAMILIES["gpt2"], model_type)
        run("init", "pissa", d + "/base", "-o", d + "/plain", "--rank", "2", "--targets", "c_attn")
        r = run("init", "pissa", d + "/base", "-o", d + "/flag", "--rank", "2", "--targets", "c_attn", "--fan-in-fan-out")
        check(said in r.stderr and "--fan-in-fan-out" in r.stderr, r.stderr)
        for directory, (out, n) in ((d + "/plain", (D, 3 * D)), (d + "/flag", (3 * D, D))):
            tensors, config = read_adapter(directory)
            check(tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"][0] == [2, n], f"{directory}: A for {n} inputs")
            check(config["fan_in_fan_out"] == (directory == d + "/flag") and config["task_type"] == "CAUSAL_LM", directory)

    # GPT-2's own checkpoint lacks the prefix its class has: PEFT would not find the adapter, and nothing else tells.
    d = tmp + "/bare"
    bare = dict(FAMILIES["gpt2"], in_by_out={k.removeprefix("transformer."): s for k, s in FAMILIES["gpt2"]["in_by_out"].items()})
    checkpoint(d + "/base", bare, "gpt2")
    r = run("init", "kaiming", d + "/base", "-o", d + "/a", "--rank", "2")
    check('lack the "transformer." that GPT2LMHeadModel has' in r.stderr and r.stderr.count("\n") == 1, r.stderr)
    check(read_adapter(d + "/a")[1]["fan_in_fan_out"], "the orientation does not hang on the prefix")

    # A weight that is not finite: tensor and element are named, whatever the method looks at.
    for model_type, module in (("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")):
        d = f"{tmp}/{model_type}"
        os.makedirs(d + "/nan")
        broken = load(d + "/base/model.safetensors")
        shape, values = broken[module + ".weight"]
        values[2 * shape[1] + 3] = math.nan
        save(d + "/nan/model.safetensors", {k: ("F32", s, v) for k, (s, v) in broken.items()})
        with open(d + "/nan/config.json", "w") as f:
            json.dump({"model_type": model_type}, f)
        for command in (*(("init", m, d + "/nan") for m in ("kaiming", "gaussian", "orthogonal", "pissa", "mica", "loftq")),
                        ("extract", d + "/base", d + "/nan"), ("extract", d + "/nan", d + "/base")):
            r = run(*command, "-o", d + "/never", "--rank", "2", code=1)
            check(module + ".weight" in r.stderr and "[2, 3]" in r.stderr and "nan" in r.stderr, f"{command[:2]}: {r.stderr}")
            check(not os.path.exists(d + "/never/adapter_config.json"), f"{command[:2]}: nothing is written")

    # Options that the method has no use for.
    base = tmp + "/llama/base"
    for method, options, owners in (
            ("pissa", ["--bits", "4"], "loftq and qpissa"), ("kaiming", ["--double-quant"], "loftq and qpissa"), ("milora", ["--packed"], "loftq and qpissa"),
            ("pissa", ["--iters", "2"], "loftq"), ("olora", ["--block-size", "64"], "loftq"), ("mica", ["--scale-search", "3"], "loftq"),
            ("pissa", ["--activations", "x.npz"], "eva and corda"), ("loftq", ["--gradients", "x.npz"], "lora_ga"), ("eva", ["--mode", "knowledge"], "corda"),
            ("lora_ga", ["--damping", "0.1"], "corda"), ("pissa", ["--gamma", "2"], "lora_ga"), ("corda", ["--rho", "2"], "eva"),
            ("pissa", ["--whiten"], "eva"), ("corda", ["--no-centre"], "eva")):
        r = run("init", method, base, "-o", tmp + "/no", *options, code=2)
        check(f"{method} has no use for {options[0]}" in r.stderr and owners in r.stderr, f"{method} {options}: {r.stderr}")
    for options, part in (([], "exactly one"), (["--rank", "2", "--energy", "0.9"], "got --rank and --energy"), (["--rank", "2", "--max-rank", "3"], "no use for --max-rank")):
        r = run("extract", base, base, "-o", tmp + "/no", *options, code=2)
        check(part in r.stderr, f"extract {options}: {r.stderr}")

    # An adapter of each architecture that llama.cpp has goes to GGUF and comes back.
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "gpt2", "gpt_neox", "bloom", "bert"):
        d = f"{tmp}/{model_type}"
        if model_type == "llama":  # heads of 3 rows are no pairs: 2 heads of 6 rows
            check("do not divide into pairs" in run("convert", d + "/extracted", "--to", "gguf", "-o", d + "/a.gguf", code=1).stderr, "odd heads")
            options = ["--heads", "1"]
        else:
            options = ["--heads", "1"] if model_type == "mistral" else []
        config = json.load(open(d + "/extracted/adapter_config.json"))
        run("convert", d + "/extracted", "--to", "gguf", "-o", d + "/a.gguf", "--base", d + "/base", *options)
        run("convert", d + "/a.gguf", "--to", "peft", "-o", d + "/back", "--base", d + "/base", *options)
        before, after = load(d + "/extracted/adapter_model.safetensors"), load(d + "/back/adapter_model.safetensors")
        check(set(before) == set(after) and all(close(before[n][1], after[n][1], 1e-6) for n in before), f"{model_type}: GGUF and back")
    for model_type in ("opt", "t5", "clip", "vit"):
        d = f"{tmp}/{model_type}"
        r = run("convert", d + "/extracted", "--to", "gguf", "-o", d + "/a.gguf", code=1)
        check("model_type" in r.stderr and "known are llama" in r.stderr, f"{model_type}: {r.stderr}")

    # A clone without its large files.
    os.makedirs(tmp + "/clone")
    with open(tmp + "/clone/model.safetensors", "w") as f:
        f.write("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n")
    for command in (("inspect", tmp + "/clone/model.safetensors"), ("init", "kaiming", tmp + "/clone", "-o", tmp + "/no")):
        r = run(*command, code=1)
        check("Git LFS pointer" in r.stderr and "git lfs pull" in r.stderr, r.stderr)

finish()
