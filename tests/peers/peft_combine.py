#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`lowrank combine` and `resize` beside PEFT's add_weighted_adapter, where the method is the same.

    peft_combine.py PROGRAM
"""
import sys
import tempfile

from peft import PeftModel

from real_models import (Count, difference, load_adapter, load_model, logits, make_model, peft, run, save_tensors, shaken, tensors, torch,
                         transformers, versions)

program = sys.argv[1]
LIMIT = 1e-5
WEIGHTS = (0.7, 1.6)
count = Count()


def updates(directory_or_model):
    """Every module's update as PEFT computes it."""
    return {n: m.get_delta_weight(m.active_adapters[0]).double() for n, m in directory_or_model.named_modules()
            if hasattr(m, "get_delta_weight")}


def exact_sum(parts):
    return {n: sum(w * part[n] for w, part in zip(WEIGHTS, parts)) for n in parts[0]}


def best_of_rank(matrix, r):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


def relative(got, wanted):
    return (sum((got[n] - wanted[n]).norm() ** 2 for n in wanted) / sum(w.norm() ** 2 for w in wanted.values())).sqrt().item()


def compare(d, ranks, alphas, rslora):
    what = f"ranks {ranks}, alphas {alphas}{', rsLoRA' if rslora else ''}"
    parts = []
    for k in (0, 1):
        out = f"{d}/{k}"
        run(program, "init", "kaiming", d + "/model", "-o", out, "--rank", ranks[k], "--alpha", alphas[k], "--seed", k,
            *(["--rslora"] if rslora else []))
        save_tensors(out, shaken(tensors(out), 10 + k))
        parts.append(updates(load_adapter(load_model("llama", d + "/model"), out)))
    wanted = exact_sum(parts)

    def theirs(combination, **options):
        model = PeftModel.from_pretrained(load_model("llama", d + "/model"), d + "/0", adapter_name="a")
        model.load_adapter(d + "/1", adapter_name="b")
        model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "sum", combination_type=combination, **options)
        model.set_adapter("sum")
        # PEFT gives the result a scale of 1 by r = alpha, but keeps use_rslora: it then is √r (docs/peers.md).
        layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
        for m in layers:
            times = m.r["sum"] ** 0.5 if rslora else 1.0
            assert abs(m.scaling["sum"] - times) < 1e-9, (m.scaling["sum"], times)
            m.scaling["sum"] = 1.0
        return updates(model), logits(model.eval())

    def ours(method, *options):
        out = f"{d}/{method}"
        run(program, "combine", d + "/0", d + "/1", "-o", out, "--method", method, "--weights", ",".join(map(str, WEIGHTS)), *options)
        model = load_adapter(load_model("llama", d + "/model"), out)
        return updates(model), logits(model)

    their_cat, cat_logits = theirs("cat")
    our_cat, our_logits = ours("cat")
    count.close("cat: updates against the exact sum", relative(our_cat, wanted), LIMIT, what)
    count.close("PEFT's cat against the exact sum", relative(their_cat, wanted), LIMIT, what)
    count.close("cat: logits", difference(our_logits, cat_logits), LIMIT, what)

    rank = 5
    best = {n: best_of_rank(w, rank) for n, w in wanted.items()}
    our_svd, _ = ours("svd", "--rank", rank)
    their_svd, _ = theirs("svd", svd_rank=rank)
    count.close("svd: updates against the best of this rank", relative(our_svd, best), LIMIT, what)
    count.close("svd: our error over PEFT's, less one", max(0.0, relative(our_svd, wanted) / relative(their_svd, wanted) - 1), 1e-5, what)
    print(f"  svd {what}: error ours {relative(our_svd, wanted):.6f}, PEFT {relative(their_svd, wanted):.6f}, least possible "
          f"{relative(best, wanted):.6f}")

    if ranks[0] == ranks[1]:  # PEFT's linear needs equal ranks
        their_linear, linear_logits = theirs("linear")
        our_linear, our_logits = ours("linear")
        count.close("linear: updates", relative(our_linear, their_linear), LIMIT, what)
        count.close("linear: logits", difference(our_logits, linear_logits), LIMIT, what)
        print(f"  linear {what}: PEFT's is {relative(their_linear, wanted):.2f} of the sum away from it")
        for method, options in [("magnitude_prune", {}), ("ties", {"majority_sign_method": "total"}),
                                ("ties", {"majority_sign_method": "frequency"})]:
            density = 0.4
            their_sparse, sparse_logits = theirs(method, density=density, **options)
            election = ["--election", options["majority_sign_method"]] if options else []
            our_sparse, our_logits = ours(method, "--density", density, "--space", "factors", *election)
            name = " ".join([method, *options.values()])
            count.close(f"{name} of factors: updates", relative(our_sparse, their_sparse), LIMIT, what)
            count.close(f"{name} of factors: logits", difference(our_logits, sparse_logits), LIMIT, what)


print(versions(torch, transformers, peft))
failed = []
for ranks, alphas, rslora in [((4, 4), (6, 6), False), ((4, 4), (6, 3), False), ((4, 6), (6, 9), False), ((4, 6), (5, 3), True)]:
    with tempfile.TemporaryDirectory() as d:
        make_model("llama", d + "/model")
        try:
            compare(d, ranks, alphas, rslora)
        except Exception as e:
            failed.append(f"{ranks} {alphas}: {type(e).__name__}: {str(e)[:600]}")
for line in failed:
    print("failed:", line)
count.report("peft")
sys.exit(bool(failed))
