#!/usr/bin/env python3
"""LLaVA-MoLE on text: experts in the MLPs of tiny-llama, the balance of their routes, and gradients of both losses. Makes llava_mole/.

Written from the equations; `experts` and `balance` were held against forwchen/LLaVA-MoLE at 5876301 (`moe.py`: LoRA_MOE_LM, sparse and dense; `model.py`: the
loop over samples). `top1-st` has no code but ours: the forward of top1 with the gradient of a factor p.

The adapter's files are those that Lorimer writes (attention by PEFT's keys). Of each routing: `<routing>.logits` of all rows (sequences, length, vocabulary),
`<routing>.loss`, the mean −log p over supervised tokens, `<routing>.balance`, the mean over sequences, and `<routing>.grad.<tensor>` of loss + W · balance.
Computed in f64, kept in f32. `padded.balance` is that of the same sequences padded to another length.
The second largest p is APART from the largest everywhere.

needs torch 2.15, transformers 5.23
"""
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

here = pathlib.Path(__file__).parent
E, R, ALPHA, W, APART = 3, 2, 6, 0.7, 1e-3


def experts(z, p, pairs, routing):
    """Δ of rows z (…, inputs) with p (…, E) and pairs [(A, B)]."""
    chosen = F.one_hot(p.argmax(-1), p.shape[-1]).to(p)
    gates = {"dense": p, "top1": chosen, "top1-st": chosen * (1 + p - p.detach())}[routing]
    each = torch.stack([ALPHA / R * (z @ a.T) @ b.T for a, b in pairs], -1)
    return (each * gates.unsqueeze(-2)).sum(-1)


def balance(shares, mask):
    """Mean over sequences of Σ_e P_e C_e; shares (layers, sequences, length, E), mask (sequences, length)."""
    chosen = F.one_hot(shares.argmax(-1), shares.shape[-1]).to(shares)
    each = [(shares[:, i, m].flatten(0, 1).mean(0) * chosen[:, i, m].flatten(0, 1).mean(0)).sum() for i, m in enumerate(mask)]
    return sum(each) / len(each)


class Unit(torch.nn.Module):
    """A gated MLP with experts; its p of the last forward are kept."""

    def __init__(self, mlp, path, adapter, routing):
        super().__init__()
        self.mlp, self.path, self.adapter, self.routing = mlp, path, adapter, routing

    def pairs(self, name):
        key = f"base_model.model.{self.path}.{name}.experts"
        return [(self.adapter[f"{key}.{e}.lora_A.weight"], self.adapter[f"{key}.{e}.lora_B.weight"]) for e in range(E)]

    def forward(self, x):
        key = f"base_model.model.{self.path}.router"
        self.shares = F.softmax(x @ self.adapter[f"{key}.weight"].T + self.adapter[f"{key}.bias"], -1)
        change = lambda z, name: getattr(self.mlp, name)(z) + experts(z, self.shares, self.pairs(name), self.routing)
        return change(self.mlp.act_fn(change(x, "gate_proj")) * change(x, "up_proj"), "down_proj")


class Lora(torch.nn.Module):
    def __init__(self, linear, path, adapter):
        super().__init__()
        self.linear, self.key, self.adapter = linear, f"base_model.model.{path}", adapter

    def forward(self, x):
        a, b = (self.adapter[f"{self.key}.lora_{which}.weight"] for which in "AB")
        return self.linear(x) + ALPHA / R * (x @ a.T) @ b.T


class Norm(torch.nn.Module):
    """RMS norm in f64: that of transformers computes in f32, as its eager softmax does, and gradients of small heads feel it."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def model_with(adapter, routing):
    model = AutoModelForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float64, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    for i, layer in enumerate(model.model.layers):
        path = f"model.layers.{i}"
        for name in "qkvo":
            own = getattr(layer.self_attn, f"{name}_proj")
            setattr(layer.self_attn, f"{name}_proj", Lora(own, f"{path}.self_attn.{name}_proj", adapter))
        layer.input_layernorm, layer.post_attention_layernorm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        layer.mlp = Unit(layer.mlp, f"{path}.mlp", adapter, routing)
    model.model.norm = Norm(model.model.norm)
    return model


def shapes(model):
    for i, layer in enumerate(model.model.layers):
        path = f"base_model.model.model.layers.{i}"
        for name in "qkvo":
            own = getattr(layer.self_attn, f"{name}_proj")
            yield f"{path}.self_attn.{name}_proj", "", own
        for name in ("gate_proj", "up_proj", "down_proj"):
            for e in range(E):
                yield f"{path}.mlp.{name}", f"experts.{e}.", getattr(layer.mlp, name)
        yield f"{path}.mlp.router", None, layer.mlp.gate_proj


def main():
    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32)
    adapter = {}
    for path, key, linear in shapes(base):
        draw = lambda *shape: 0.4 * torch.randn(*shape)
        if key is None:
            adapter[f"{path}.weight"], adapter[f"{path}.bias"] = draw(E, linear.in_features), draw(E)
        else:
            adapter[f"{path}.{key}lora_A.weight"] = draw(R, linear.in_features)
            adapter[f"{path}.{key}lora_B.weight"] = draw(linear.out_features, R)
    adapter = {name: t.double().requires_grad_() for name, t in adapter.items()}
    tokens = torch.randint(3, base.config.vocab_size, (3, 9))
    lengths = torch.tensor([9, 5, 7])
    mask = torch.arange(9) < lengths[:, None]
    out = {"tokens": tokens, "lengths": lengths, "weight": torch.tensor(W)}
    for routing in ("top1", "top1-st", "dense"):
        model = model_with(adapter, routing)
        logits = model(input_ids=tokens, attention_mask=mask.long()).logits
        shares = torch.stack([layer.mlp.shares for layer in model.model.layers])
        two = shares[:, mask].sort(-1).values
        assert (two[..., -1] - two[..., -2]).min() > APART, (two[..., -1] - two[..., -2]).min()
        supervised = mask[:, 1:].flatten()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1)[supervised], tokens[:, 1:].flatten()[supervised])
        term = balance(shares, mask)
        for t in adapter.values():
            t.grad = None
        (loss + W * term).backward()
        out |= {f"{routing}.logits": logits.detach(), f"{routing}.loss": loss.detach(), f"{routing}.balance": term.detach()}
        out |= {f"{routing}.shares": shares.detach().permute(1, 2, 0, 3)}
        out |= {f"{routing}.grad.{name}": t.grad.clone() for name, t in adapter.items()}
        if routing == "top1":
            # More padding changes nothing.
            more = torch.cat([tokens, torch.full((3, 4), 5)], 1)
            wider = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
            model(input_ids=more, attention_mask=wider.long())
            again = balance(torch.stack([layer.mlp.shares for layer in model.model.layers]), wider)
            assert math.isclose(again.item(), term.item(), rel_tol=1e-5)
            out["padded.balance"] = again.detach()
    folder = here / "llava_mole"
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LLAVA_MOLE", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "experts": E, "routing": "top1", "balance": W, "lora_dropout": 0.0,
              "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"], "base_model_name_or_path": "tiny-llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    single = lambda t: t.detach().float() if t.is_floating_point() else t
    save_file({name: single(t).contiguous() for name, t in adapter.items()}, folder / "adapter_model.safetensors")
    save_file({name: single(t).contiguous() for name, t in out.items()}, folder / "golden.safetensors")


if __name__ == "__main__":
    main()
