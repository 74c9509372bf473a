#!/usr/bin/env python3
"""Makes `combine/`: what peft 0.21.2's add_weighted_adapter makes of three small adapters, for each of its types, and KnOTS' steps in torch.

usage: make_combine.py [LORIMER]      (with a binary: combines the same adapters with it too, loads the results in PEFT and compares)

A rank of 5 for dare_linear_svd is left out: PEFT's SVD in f32 is 3e-5 away from f64's where the 5th and 6th singular values are 0.4 % apart.
DARE's masks are torch's: PEFT draws them from the global generator, which is seeded here before each projection with the number that Lorimer
seeds its own with. Tests read the files; Python is not needed to run them.
"""
import json, pathlib, shutil, subprocess, sys, tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.model import LoraModel
from peft.utils.merge_utils import ties
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

here = pathlib.Path(__file__).parent
out = here / "combine"
SEED = 3
# One of plain scaling, one of rsLoRA, one with a module that the others lack; all of rank 4. And one of other ranks for `cat` and the SVDs.
parents = {
    "plain": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "rooted": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "wider": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]),
    "ranks": LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"],
                        rank_pattern={r"layers.0.self_attn.q_proj": 3}, alpha_pattern={r"layers.1.self_attn.v_proj": 7}),
}
same, mixed = ["plain", "rooted", "wider"], ["plain", "ranks", "wider"]
W = [0.7, -0.4, 1.3]
# name, parents, weights, type, options
cases = [
    ("svd", mixed, W, "svd", {}),
    ("svd-3", mixed, W, "svd", {"svd_rank": 3}),
    ("linear", same, W, "linear", {}),
    ("cat", mixed, W, "cat", {}),
    ("ties", same, W, "ties", {"density": 0.5}),
    ("ties-frequency", same, W, "ties", {"density": 0.35, "majority_sign_method": "frequency"}),
    ("ties_svd", mixed, W, "ties_svd", {"density": 0.5}),
    ("ties_svd-frequency", mixed, W, "ties_svd", {"density": 0.3, "majority_sign_method": "frequency", "svd_rank": 6}),
    ("dare_ties", same, W, "dare_ties", {"density": 0.6}),
    ("dare_linear", same, W, "dare_linear", {"density": 0.4}),
    ("dare_ties_svd", mixed, W, "dare_ties_svd", {"density": 0.6}),
    ("dare_linear_svd", mixed, W, "dare_linear_svd", {"density": 0.4, "svd_rank": 3}),
    ("magnitude_prune", same, W, "magnitude_prune", {"density": 0.45}),
    ("magnitude_prune_svd", mixed, W, "magnitude_prune_svd", {"density": 0.45}),
    ("whole", same, W, "ties", {"density": 1.0}),
]


def site_seed(seed, path):
    """The seed of a projection: FNV-1a over its path from a start that the run's seed moves."""
    hash = 0xCBF29CE484222325 ^ (seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    for byte in path.encode():
        hash = ((hash ^ byte) * 0x100000001B3) & (1 << 64) - 1
    return hash & 0xFFFFFFFF


def fresh():
    return LlamaForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32).eval()


def deltas(model, name):
    """ΔW of every module of an adapter, by path in the base."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and name in module.lora_A:
            found[path] = module.get_delta_weight(name).detach()
    return found


def all_loaded(names):
    model = PeftModel.from_pretrained(fresh(), out / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(out / name, adapter_name=name)
    return model.eval()


def seeded(model):
    """Wraps PEFT's two functions so that torch is seeded before each projection."""
    paths = {id(module): path for path, module in model.base_model.model.named_modules()}
    for name in ("_svd_generalized_task_arithmetic_weighted_adapter", "_generalized_task_arithmetic_weighted_adapter"):
        original = getattr(LoraModel, name)

        def wrapped(*args, original=original, **kwargs):
            target = args[4] if "svd" in original.__name__ else args[3]
            torch.manual_seed(site_seed(SEED, paths[id(target)]))
            return original(model.base_model, *args, **kwargs)

        setattr(model.base_model, name, wrapped)


def close(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def knots(model, names, weights, density):
    """[ΔW1 … ΔWn] = U S [V1 … Vn], TIES of the S Vi, U times that; projection by projection."""
    found = [deltas(model, name) for name in names]
    merged = {}
    for path in sorted(set().union(*found)):
        own = [(d[path].double(), w) for d, w in zip(found, weights) if path in d]
        U, S, V = torch.linalg.svd(torch.cat([d for d, _ in own], dim=1), full_matrices=False)
        keep = S > 1e-5
        U, S, V = U[:, keep], S[keep], V[keep]
        parts = [p.float() for p in (S[:, None] * V).split(own[0][0].shape[1], dim=1)]
        merged[path] = (U @ ties(parts, torch.tensor([w for _, w in own]), density).double()).float()
    return merged


shutil.rmtree(out, ignore_errors=True)
for i, (name, config) in enumerate(parents.items()):
    torch.manual_seed(10 + i)
    model = get_peft_model(fresh(), config)
    for key, p in model.named_parameters():
        if "lora_" in key:
            with torch.no_grad():
                p.normal_(0, 0.1)
    model.save_pretrained(out / name)
    (out / name / "README.md").unlink(missing_ok=True)
    config = json.loads((out / name / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "tiny-llama"
    (out / name / "adapter_config.json").write_text(json.dumps(config, indent=1))

golden, index = {}, []
for case, names, weights, kind, options in cases:
    model = all_loaded(names)
    seeded(model)
    model.base_model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
    for path, delta in deltas(model, "merged").items():
        golden[f"{case}.{path}"] = delta.contiguous()
    settings = {{"svd_rank": "rank"}.get(k, k): v for k, v in options.items()}
    index.append({"case": case, "parents": names, "weights": weights, "method": kind, "settings": settings, "random": "dare" in kind})
model = all_loaded(mixed)
for path, delta in knots(model, mixed, W, 0.5).items():
    golden[f"knots.{path}"] = delta.contiguous()
index.append({"case": "knots", "parents": mixed, "weights": W, "method": "knots", "settings": {"density": 0.5}, "random": False})
# PEFT's clamp depends on the signs of singular vectors, so its own factors are kept, before and after.
for clamp, name in ((None, "before"), (0.9, "after")):
    model = all_loaded(mixed)
    model.base_model.add_weighted_adapter(mixed, W, "merged", combination_type="svd", svd_clamp=clamp)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    golden[f"clamp.{name}.A"] = layer.lora_A["merged"].weight.detach()
    golden[f"clamp.{name}.B"] = layer.lora_B["merged"].weight.detach()
torch.manual_seed(77)
golden["bernoulli"] = torch.bernoulli(torch.full((5, 7), 0.4))
save_file({k: v.contiguous() for k, v in golden.items()}, out / "golden.safetensors")
(out / "golden.json").write_text(json.dumps({"seed": SEED, "cases": index}, indent=1))

if len(sys.argv) > 1:
    worst = 0.0
    for case in index:
        with tempfile.TemporaryDirectory() as folder:
            target = pathlib.Path(folder) / "out"
            flags = [f"--set={k}={v}" for k, v in case["settings"].items()] + ([f"--seed={SEED}"] if case["random"] else [])
            subprocess.run([sys.argv[1], "merge", "-q", *(str(out / p) for p in case["parents"]), "--method", case["method"],
                            "--weights=" + ",".join(map(str, case["weights"])), *flags, "--output", target], check=True, stdout=subprocess.DEVNULL)
            ours = deltas(PeftModel.from_pretrained(fresh(), target, adapter_name="ours"), "ours")
        theirs = {k.split(".", 1)[1]: v for k, v in golden.items() if k.split(".", 1)[0] == case["case"]}
        assert ours.keys() == theirs.keys(), case["case"]
        error = max(close(ours[path], theirs[path]) for path in ours)
        worst = max(worst, error)
        print(f"{case['case']:<22} loads in PEFT, differs by {error:.1e}")
    assert worst < 1e-5, worst
