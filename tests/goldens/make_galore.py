#!/usr/bin/env python3
"""Twenty steps of galore-torch's AdamW on two weights, for each side that it projects on.

needs torch 2.15, galore-torch 1.0 (with transformers and bitsandbytes, which it imports)
"""
import pathlib

import torch
from galore_torch import GaLoreAdamW
from safetensors.torch import save_file

# Moments outlive a change of the space, so that the signs of singular vectors show in the steps after it. LAPACK leaves them open; here as
# in Lorimer the largest number of every right vector is positive.
svd = torch.linalg.svd


def signed(*arguments, **settings):
    u, s, vh = svd(*arguments, **settings)
    signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    return u * signs.T, s, vh * signs


torch.linalg.svd = signed
torch.manual_seed(4)
x, target = torch.randn(40, 12), torch.randn(40, 9)
start = [torch.randn(16, 12) * 0.3, torch.randn(9, 16) * 0.3]
out = {"x": x, "target": target, "w0": start[0], "w1": start[1]}
# Not "full": between both sides the first gradient is diagonal, and AdamW makes full steps of what rounding leaves beside the diagonal.
for kind in ("std", "reverse_std", "left", "right"):
    weights = [torch.nn.Parameter(w.clone()) for w in start]
    groups = [dict(params=weights, rank=4, update_proj_gap=6, scale=0.5, proj_type=kind)]
    optimizer = GaLoreAdamW(groups, lr=1e-2, eps=1e-8, weight_decay=0.01, no_deprecation_warning=True)
    losses = []
    for _ in range(20):
        loss = ((torch.tanh(x @ weights[0].T) @ weights[1].T - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out |= {f"{kind}.losses": torch.tensor(losses), f"{kind}.w0": weights[0].detach().clone(), f"{kind}.w1": weights[1].detach().clone()}
save_file(out, pathlib.Path(__file__).parent / "galore.safetensors")
