# SPDX-License-Identifier: Apache-2.0
"""What the tests beside real peers share: small random models of Transformers, running the program, counting comparisons."""
import json
import os
import subprocess
import sys
import warnings

SKIPPED = 77


def skip(why):
    print("skipped, because", why)
    sys.exit(SKIPPED)


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
warnings.filterwarnings("ignore", category=FutureWarning)
try:
    import torch
    import transformers
    import peft
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
except ImportError as e:
    skip(f"a peer cannot be imported: {e}")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(2)

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
TOKENS = torch.tensor([[5, 17, 3, 80, 41, 2, 66, 9, 30, 11, 95], [1, 0, 12, 12, 77, 54, 8, 23, 6, 90, 33]])


def config_of(family):
    t = transformers
    common = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if family == "llama":
        return t.LlamaConfig(**SIZES, tie_word_embeddings=False, **common)
    if family == "llama_tied":
        return t.LlamaConfig(**SIZES, tie_word_embeddings=True, **common)
    if family == "qwen2":
        sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
        return t.Qwen2Config(**sizes, tie_word_embeddings=False, **common)
    if family == "gpt2":
        return t.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48, resid_pdrop=0, embd_pdrop=0,
                            attn_pdrop=0, **common)
    if family == "t5":
        return t.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0,
                          feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, eos_token_id=2,
                          pad_token_id=0)
    if family == "mixtral":
        return t.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False, **common)
    if family == "qwen3_moe":
        return t.Qwen3MoeConfig(**SIZES, moe_intermediate_size=40, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
                                norm_topk_prob=True, **common)
    raise ValueError(family)


def auto_class(family):
    return transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM


def make_model(family, directory, seed=0):
    """A random model whose logits are of order one, saved as its users would save it; returned in float32."""
    torch.manual_seed(seed)
    model = auto_class(family).from_config(config_of(family)).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                fan_in = p.shape[0] if "c_attn" in name or "c_proj" in name or "c_fc" in name else p.shape[-1]
                p.copy_(torch.randn(p.shape) * (1.0 if "embed" in name or "wte" in name or "shared" in name else fan_in**-0.5))
            elif name.endswith("bias"):
                p.copy_(0.2 * torch.randn(p.shape))
            else:
                p.copy_(1 + 0.1 * torch.randn(p.shape))
        model.tie_weights()
    model.save_pretrained(directory)
    return model


def load_model(family, directory, **options):
    return auto_class(family).from_pretrained(directory, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model):
    if model.config.is_encoder_decoder:
        return model(input_ids=TOKENS, decoder_input_ids=TOKENS.flip(1)).logits.double()
    return model(input_ids=TOKENS).logits.double()


def difference(got, wanted):
    """The largest difference relative to the largest value."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def run(program, *arguments, code=0):
    r = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if code is not None and r.returncode != code:
        raise AssertionError(f"lowrank {' '.join(map(str, arguments))}: exit {r.returncode}: {r.stderr.strip()}")
    return r


def tensors(directory, name="adapter_model.safetensors"):
    return load_file(os.path.join(directory, name))


def checkpoint(directory):
    """All tensors of a model directory, whatever its shards."""
    out = {}
    for name in sorted(os.listdir(directory)):
        if name.endswith(".safetensors"):
            out.update(load_file(os.path.join(directory, name)))
    return out


def save_tensors(directory, changed, name="adapter_model.safetensors"):
    """Writes the tensors over the file, whose metadata stays."""
    path = os.path.join(directory, name)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    save_file({k: v.contiguous() for k, v in changed.items()}, path, metadata=metadata)


def shaken(adapter_tensors, seed, size=0.3):
    """The tensors of an adapter as after a training that changed all of them; no B is zero."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, t in adapter_tensors.items():
        noise = torch.randn(t.shape, generator=g)
        if "magnitude" in name:
            out[name] = t * (1 + 0.2 * noise)
        else:
            spread = t.float().std() if t.numel() > 1 and t.float().std() > 0 else torch.tensor(1.0)
            out[name] = (t.float() + size * noise * spread * (0.3 if t.abs().max() == 0 else 1.0)).to(t.dtype)
    return out


def load_adapter(base, directory):
    """What PEFT makes of an adapter's directory; a missing or an unexpected key, or a warning about one, is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, directory).eval()
    said = [str(w.message) for w in caught if "adapter keys" in str(w.message) or "nexpected" in str(w.message)]
    assert not said, (directory, said)
    result = peft.set_peft_model_state_dict(model, peft.load_peft_weights(directory))
    missing = [k for k in result.missing_keys if "lora_" in k]
    assert not missing and not result.unexpected_keys, (directory, missing, result.unexpected_keys)
    return model


class Count:
    """Comparisons made and the largest difference of each kind; `close` fails at once above `limit`."""

    def __init__(self):
        self.kinds = {}

    def close(self, kind, got, limit, what):
        n, largest, _ = self.kinds.get(kind, (0, 0.0, ""))
        self.kinds[kind] = (n + 1, max(largest, got), what if got >= largest else _)
        assert got <= limit, f"{kind}: {what}: {got:.3g}, more than {limit:.3g}"

    def equal(self, kind, same, what):
        self.close(kind, 0.0 if same else float("inf"), 0.0, what)

    def report(self, peer):
        total = sum(n for n, _, _ in self.kinds.values())
        assert total > 0, "nothing was compared"
        for kind, (n, largest, what) in self.kinds.items():
            print(f"  {kind}: {n} comparisons, largest difference {largest:.2e} ({what})")
        line = f"{peer}: {total} comparisons"
        print(line)
        directory = os.environ.get("LOWRANK_PEERS_RUN")  # count.py adds them up
        if directory:
            os.makedirs(directory, exist_ok=True)
            script = os.path.basename(sys.argv[0])
            with open(os.path.join(directory, script + ".txt"), "w") as f:
                f.write(f"{script}: {line}\n")


def versions(*modules):
    return ", ".join(f"{m.__name__} {m.__version__}" for m in modules)


def read_json(*path):
    return json.load(open(os.path.join(*path)))
