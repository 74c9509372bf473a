#!/usr/bin/env python3
"""DiffoRA's search from its equations (arXiv 2502.08905; there is no public code) on tiny-llama: gates after some steps.

Every projection of layer l and kind k has y = W x + n s(g_l)_k 2 B A x, s a softmax over the n kinds of a layer (or a sigmoid, doubled). Rows at even
places step A and B, rows at odd places the gates, each with AdamW; projections that share a key share A and B.

needs torch 2.15, transformers 5.23
"""
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

here = pathlib.Path(__file__).parent
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
torch.manual_seed(9)
tokens = torch.randint(3, 259, (12, 11))
out = {"tokens": tokens.to(torch.float32)}


def seed_of(key):
    """FNV-1a, of which torch's generator takes the low 32 bits."""
    h = 0xCBF29CE484222325
    for byte in key.encode():
        h = ((h ^ byte) * 0x100000001B3) & (2**64 - 1)
    return h & 0xFFFFFFFF


def search(steps, rank, size, lr, gamma_lr, gate, sharing):
    model = AutoModelForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32)
    model.requires_grad_(False)
    layers, factors = len(model.model.layers), {}
    gammas = [torch.zeros(len(KINDS), requires_grad=True) for _ in range(layers)]

    def gated(layer, kind, module, key):
        def hook(_, inputs, y):
            a, b = factors[key]
            g = gammas[layer]
            factor = len(KINDS) * g.softmax(0)[kind] if gate == "softmax" else 2 * g[kind].sigmoid()
            return y + factor * 2 * inputs[0] @ a.T @ b.T
        module.register_forward_hook(hook)

    for path, module in model.named_modules():
        role = path.rsplit(".", 1)[-1]
        if role not in KINDS:
            continue
        key = f"{role} {module.out_features}x{module.in_features}" if sharing == "kind" else path
        if key not in factors:
            g = torch.Generator().manual_seed(seed_of(key))
            a = torch.nn.init.kaiming_uniform_(torch.empty(rank, module.in_features), a=5**0.5, generator=g)
            factors[key] = a.requires_grad_(), torch.zeros(module.out_features, rank, requires_grad=True)
        gated(int(path.split(".")[2]), KINDS.index(role), module, key)
    parameters = [t for pair in factors.values() for t in pair]
    optimizers = [torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0), torch.optim.AdamW(gammas, lr=gamma_lr, weight_decay=0.0)]
    for step in range(steps):
        for half, optimizer in enumerate(optimizers):
            rows = tokens[half::2]
            batch = rows[[(step * size + i) % len(rows) for i in range(size)]]
            logits = model(batch).logits[:, :-1].reshape(-1, 259)
            loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].reshape(-1))
            for o in optimizers:
                o.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.stack(gammas).detach()


for name, arguments in {
    "kind": dict(steps=6, rank=3, size=4, lr=5e-3, gamma_lr=1e-2, gate="softmax", sharing="kind"),
    "none": dict(steps=5, rank=2, size=3, lr=1e-2, gamma_lr=2e-2, gate="sigmoid", sharing="none"),
}.items():
    out[name] = search(**arguments)
    print(name, out[name])
save_file(out, here / "diffora.safetensors")
