#!/usr/bin/env python3
"""One projection under the methods that PEFT does not have, as their authors' code computes it: start, output, merged weight, gradients.

Written from the equations; each was held against the authors' repository (LoRA-XS: MohammadrezaBanaei/LoRA-XS, LoLDU: SKDDJ/LoLDU, NLoRA:
TracyGuo2001/NLoRA, Hydra: extremebird/Hydra, RandLoRA: PaulAlbert31/RandLoRA). TLoRA has no public code: its equation, by einsum.

needs torch 2.15, peft 0.21.2 (for RandLoRA's bases)
"""
import json, math, pathlib

import peft
import torch
from safetensors.torch import save_file

here = pathlib.Path(__file__).parent
torch.set_default_dtype(torch.float64)
g = torch.Generator().manual_seed(18)
cases, tensors = [], {}


def normal(*shape, size=1.0):
    return torch.randn(*shape, generator=g) * size


def case(name, method, settings, w, change, start, moved, bias=None, frozen=(), bias_change=None):
    """`change` gives ΔW from the parameters. `start`: what they begin as; `moved`: those that are trained, as they are when y is computed."""
    x = normal(6, w.shape[1])
    p = {k: v.clone().requires_grad_() for k, v in moved.items()}
    merged = w + change({**start, **p})
    b = bias if bias is None or bias_change is None else bias + bias_change(p)
    y = torch.nn.functional.linear(x, merged, b)
    (y * y).sum().div(2).backward()
    out = {"w": w, "x": x, "y": y, "merged": merged} | ({} if bias is None else {"b": bias})
    out |= {f"start.{k}": v for k, v in start.items() if k in moved or k in frozen}
    out |= {f"moved.{k}": v for k, v in p.items()} | {f"grad.{k}": v.grad for k, v in p.items()}
    tensors.update({f"{name}.{k}": v.detach().clone().contiguous() for k, v in out.items()})
    cases.append(dict(name=name, method=method, settings=settings))


# LoRA-XS: the SVD is of the transposed weight, W^T ~ (U S) V; A is the first factor and B the second, each transposed.
w, r = normal(10, 12), 4
u, s, v = torch.linalg.svd(w.T, full_matrices=False)
# The signs of a singular pair are open; here the largest number of each of W's right vectors (the columns of u) is positive.
sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
u, v = u * sign, v * sign.T
a, b = (u[:, :r] * s[:r]).T, v[:r].T
case("lora_xs", "lora-xs", {"r": r, "lora_alpha": 8, "deviation": 0}, w, lambda p: 8 / r * p["lora_B"] @ p["lora_R"] @ p["lora_A"],
     {"lora_A": a, "lora_B": b, "lora_R": torch.zeros(r, r)}, {"lora_R": normal(r, r)}, frozen=("lora_A", "lora_B"))


# LoLDU: W = P L D U; the first r of each; alpha = 1 whatever r; z alone is trained; the start is subtracted from the weight.
def loldu(name, shape, r, settings, start_of=lambda d: d, sigma=None):
    w = normal(*shape)
    p, l, up = torch.linalg.lu(w)
    d = up.diagonal()
    lower, unit, d = (p @ l)[:, :r], (up / d.unsqueeze(-1))[:r], d[:r]
    z0, scale = start_of(d), settings.get("lora_alpha", 1) / r
    change = lambda q: lower @ torch.diag(q.get("loldu_sigma", scale) * q["loldu_z"] - scale * z0) @ unit
    start, moved = {"loldu_z": z0, "loldu_L": lower, "loldu_U": unit}, {"loldu_z": z0 + normal(r, size=0.3)}
    if sigma is not None:
        start["loldu_sigma"], moved["loldu_sigma"] = torch.tensor([scale]), torch.tensor([sigma])
    case(name, "loldu", {"r": r, **settings}, w, change, start, moved, frozen=("loldu_L", "loldu_U"))


loldu("loldu_tall", (12, 9), 5, {})
loldu("loldu_wide", (8, 11), 8, {})
loldu("loldu_constant", (9, 9), 4, {"start": "constant", "lora_alpha": 2}, lambda d: d.mean().expand(4).clone())
loldu("loldu_sigma", (9, 7), 3, {"train_sigma": True}, sigma=0.5)

# NLoRA. The code's start: slices of W itself, nothing subtracted.
w, r = normal(9, 11), 3
product = lambda p: 6 / r * p["lora_B"] @ p["lora_N"] @ p["lora_A"]
slices = {"lora_A": w[:r], "lora_N": w[:r, :r], "lora_B": w[:, :r]}
near = lambda start: {k: v + normal(*v.shape, size=0.2) for k, v in start.items()}
case("nlora_code", "nlora", {"r": r, "lora_alpha": 6, "start": "code"}, w, product, slices, near(slices))
case("nlora_inttune_code", "nlora", {"r": r, "lora_alpha": 6, "variant": "inttune", "start": "code"}, w, product, slices,
     near({"lora_N": slices["lora_N"]}), frozen=("lora_A", "lora_B"))
# The paper's: N is the pseudo-inverse, and the start is subtracted.
paper = {**slices, "lora_N": torch.linalg.pinv(w[:r, :r])}
less = lambda p: product(p) - product(paper)
case("nlora_paper", "nlora", {"r": r, "lora_alpha": 6}, w, less, paper, near(paper))
case("nlora_inttune_paper", "nlora", {"r": r, "lora_alpha": 6, "variant": "inttune"}, w, less, paper, near({"lora_N": paper["lora_N"]}),
     frozen=("lora_A", "lora_B"))
zero = {"lora_A": normal(r, 11), "lora_N": normal(r, r), "lora_B": torch.zeros(9, r)}
case("nlora_slora", "nlora", {"r": r, "lora_alpha": 6, "variant": "slora"}, w, product, {}, near(zero))

# Hydra: the sequential branch takes the projection's output with its bias.
w, bias, s = normal(7, 10), normal(7), 0.5
ap, bp, as_, bs = "hydra_A_parallel", "hydra_B_parallel", "hydra_A_sequential", "hydra_B_sequential"
case("hydra", "hydra", {"r_parallel": 2, "r_sequential": 3, "s": s}, w, lambda p: s * (p[bp] @ p[ap] + p[bs] @ p[as_] @ w), {},
     {ap: normal(2, 10), bp: normal(7, 2), as_: normal(3, 7), bs: normal(7, 3)}, bias=bias, bias_change=lambda p: s * p[bs] @ p[as_] @ bias)

# TLoRA: a tensor-ring matrix of two cores, on either side, and a residual of rank 2.
for side, shape in (("input", (5, 12)), ("output", (12, 5))):
    w = normal(*shape)
    ring = lambda p: torch.einsum("ijab,klba->ikjl", p["tlora_core_0"], p["tlora_core_1"]).reshape(12, 12)
    turned = lambda p, w=w, side=side: w @ ring(p) if side == "input" else ring(p) @ w
    case(f"tlora_{side}", "tlora", {"r": 2, "ring": 2, "side": side}, w, lambda p, w=w, turned=turned: turned(p) - w + p["tlora_B"] @ p["tlora_A"], {},
         {"tlora_core_0": normal(3, 3, 2, 2), "tlora_core_1": normal(4, 4, 2, 2), "tlora_A": normal(2, shape[1]), "tlora_B": normal(shape[0], 2)})

# RandLoRA with the authors' scale, alpha / (r sqrt(N)) with alpha = 2 r, out of PEFT's layer, whose scale is alpha / r.
for name, (outputs, inputs) in (("tall", (11, 8)), ("wide", (8, 11))):
    r, n = 3, math.ceil(8 / 3)
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.float32))
    config = peft.RandLoraConfig(r=r, randlora_alpha=2 * r, target_modules=["0"], projection_prng_key=7)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    w = normal(outputs, inputs)
    small, large = layer.randlora_A["default"][:, :n, :8].double(), layer.randlora_B["default"][:11, :n].double()
    lam, gam = normal(r, n), normal(n, 8)

    def change(p, small=small, large=large, tall=outputs > inputs):
        # The flattened bases are counted (base, rank) in B and (rank, base) in A, in both codes.
        scaled = (small * p["randlora_lambda"][:, :, None] * p["randlora_gamma"]).flatten(end_dim=1)
        update = large.flatten(start_dim=1) @ scaled
        return (update if tall else update.T) * 2 / math.sqrt(n)

    layer.randlora_lambda["default"].data, layer.randlora_gamma["default"].data = lam.float(), gam.float()
    peft_delta = layer.get_delta_weight("default").double()
    ours = change({"randlora_lambda": lam, "randlora_gamma": gam})
    assert (ours * math.sqrt(n) - peft_delta).abs().max() < 1e-4 * peft_delta.abs().max()
    start = {"randlora_lambda": torch.zeros(r, n), "randlora_gamma": torch.full((n, 8), 1 / 8)}
    case(f"randlora_authors_{name}", "randlora", {"r": r, "projection_prng_key": 7, "scale": "authors"}, w, change, start,
         {"randlora_lambda": lam, "randlora_gamma": gam})

save_file(tensors, here / "projections.safetensors")
(here / "projections.json").write_text(json.dumps(cases, indent=1) + "\n")
