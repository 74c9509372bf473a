#!/usr/bin/env python3
"""What is chosen a token: SMoRA, FlyLoRA and Sparse-GIN as their authors' code computes them. Makes gated.safetensors and gated.json.

Written from the equations; held against StyxXuan/smora at 7e7ada1 (`tuners/srmole/layer.py`), gfyddha/FlyLoRA at 91d9e36 (its changed
`tuners/lora/layer.py`, and `flylora.py`) and lamm-mit/Graph-Aware-Transformers at fb2c6ef (`llama_decoder_layer_with_gnn.py`,
`graph_neural_network.py`). Cases whose `held` is empty are ours alone: a form that no code has, or the choice among equals.

Tensors of a case are `<name>.<what>`, all in f64: what is given (`x`, `lora_A` …, `upstream`, the gradient of the output), what comes out, `grad.<what>` of
the sum of output times `upstream`. Of equal scores the lowest index is chosen; but for the cases that are there for that, scores that decide are apart.

needs torch 2.15
"""
import json
import math
import pathlib

import torch
from safetensors.torch import save_file

here = pathlib.Path(__file__).parent
APART = 1e-3


def largest(v, k):
    """The k largest of each row, the lowest index first among equals, as 0 and 1."""
    order = v.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(v).scatter(-1, order, 1.0)


def apart(v, k, block=1):
    """How far the last that is chosen is from the first that is not, counting a block of equal scores once."""
    s = v[..., ::block].sort(dim=-1, descending=True).values
    return math.inf if k == v.shape[-1] else (s[..., k // block - 1] - s[..., k // block]).min().item()


def balanced(bias, counts, rate):
    return bias + rate * (counts.mean() - counts).sign()


def smora(x, a, b, router, bias, k, alpha, q=1, gate="code", floor=1e-6):
    """Gates (tokens, r), Δy (tokens, outputs), counts (r). `floor` is ours: what is chosen counts at least so much in a gate."""
    p = (x @ router.T).sigmoid().repeat_interleave(q, dim=-1)
    v = p + bias
    chosen = largest(v.detach(), k)
    value = (v if gate == "code" else p).clamp(min=floor) * chosen
    gates = k * value / value.sum(-1, keepdim=True)
    return gates, alpha / k * (gates * (x @ a.T)) @ b.T, chosen.sum(0)


def flylora(x, a, b, bias, k, alpha, select="signed", input_gradient="keep"):
    """y (tokens, r), what is chosen (tokens, r), Δ (tokens, outputs), counts (r)."""
    y = (x if input_gradient == "keep" else x.detach()) @ a.T
    score = (y + bias).detach()
    chosen = largest(score.abs() if select == "magnitude" else score, k)
    return y, chosen, alpha / a.shape[0] * (chosen * y) @ b.T, chosen.sum(0)


def weights(maps, sharpness, threshold, cut):
    """S and w (tokens, tokens) of maps (heads, tokens, tokens); w is 0 where there is no edge."""
    s = maps.sum(0).clamp(max=1.0)
    w = (sharpness * (s - threshold)).sigmoid()
    return s, torch.where(w > cut, w, 0.0).tril()


def sparse_gin(h, into, brought, p, norm_eps=1e-5):
    """What the layer makes of hidden states, of their projection `into` and of what the edges brought (all: tokens, width), by name."""
    act = lambda t: torch.where(t > 0, t, p["act"] * t)
    u = p["eps"] * into + brought
    v = act(u @ p["fc1.weight"].T + p["fc1.bias"]) @ p["fc2.weight"].T + p["fc2.bias"] + u
    g = act(v) @ p["out.weight"].T + p["out.bias"]
    normed = g * (g.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * p["norm"]
    return {"p": into, "u": u, "v": v, "g": g, "y": h + p["scale"] * normed}


def sparse_gin_whole(h, maps, p, settings, direction="causal"):
    """S, w and the layer of all tokens at once. `reference`: of a token's edges only the one with itself counts."""
    s, w = weights(maps, *settings)
    into = h @ p["in.weight"].T + p["in.bias"]
    counted = w if direction == "causal" else torch.diag(w.diagonal())
    return {"s": s, "w": w, **sparse_gin(h, into, counted @ into, p)}


def sparse_gin_cached(h, maps, p, settings):
    """The rows one after the other, of earlier tokens only their p being known."""
    cache, rows = torch.empty(0, p["in.bias"].shape[0], dtype=h.dtype), []
    for t in range(h.shape[0]):
        into = h[t : t + 1] @ p["in.weight"].T + p["in.bias"]
        cache = torch.cat([cache, into])
        # The lower triangle of this one row would be its first place.
        s = maps[:, t, : t + 1].sum(0).clamp(max=1.0)
        w = (settings[0] * (s - settings[1])).sigmoid()
        brought = torch.where(w > settings[2], w, 0.0) @ cache
        rows.append(sparse_gin(h[t : t + 1], into, brought[None], p)["y"])
    return torch.cat(rows), cache


class Goldens:
    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)
        self.cases, self.tensors = [], {}

    def normal(self, *shape, size=1.0):
        return torch.randn(*shape, generator=self.g, dtype=torch.float64) * size

    def uniform(self, *shape, bound):
        return (torch.rand(*shape, generator=self.g, dtype=torch.float64) * 2 - 1) * bound

    def put(self, name, method, settings, tensors, held, **more):
        self.tensors |= {f"{name}.{k}": v.detach().double().clone().contiguous() for k, v in tensors.items()}
        self.cases.append(dict(name=name, method=method, settings=settings, held=held, **more))

    def sparse_rows(self, r, inputs, p):
        """A: p places a row, N(0, 1/r²)."""
        a = torch.zeros(r, inputs, dtype=torch.float64)
        for row in a:
            row[torch.randperm(inputs, generator=self.g)[:p]] = self.normal(p, size=1 / r)
        return a


def leaves(**tensors):
    return {k: v.clone().requires_grad_() for k, v in tensors.items()}


def drawn(draw):
    """What `draw` gives before its last word, which is whether it will do."""
    while True:
        *found, will_do = draw()
        if will_do:
            return found


def gradients(output, upstream, leaf):
    """Of every leaf; zero where nothing reaches one."""
    (output * upstream).sum().backward()
    return {f"grad.{k}": torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaf.items()}


def make_smora(out):
    inputs, outputs, tokens, rate = 12, 10, 9, 1e-2
    authors = "StyxXuan/smora: SRMoLELinear.forward"

    def case(name, r, k, alpha, q=1, gate="code", bias=None, router=None, held=authors, tie=False):
        bias = torch.zeros(r, dtype=torch.float64) if bias is None else bias

        def draw():
            given = leaves(x=out.normal(tokens, inputs), lora_A=out.normal(r, inputs), lora_B=out.normal(outputs, r),
                           lora_router=out.normal(r // q, inputs, size=0.4) if router is None else router)
            scores = (given["x"] @ given["lora_router"].T).sigmoid().repeat_interleave(q, dim=-1).detach() + bias
            counted = scores[largest(scores, k) > 0]
            # The authors' code has no floor, so what is held against it must not come near one.
            return given, tie or apart(scores, k, q) > APART and (counted.min() > APART if held else counted.abs().min() > APART)

        (given,) = drawn(draw)
        x, a, b, w = given.values()
        gates, delta, counts = smora(x, a, b, w, bias, k, alpha, q, gate)
        upstream = out.normal(tokens, outputs)
        found = gradients(delta, upstream, given)
        settings = {"r": r, "lora_alpha": alpha, "activate_r": k, "rank_partition": q, "gate": gate, "bias_update_rate": rate}
        out.put(name, "smora", settings, {**given, "lora_biases": bias, "upstream": upstream, "gates": gates, "delta": delta, "counts": counts,
                                          "after.lora_biases": balanced(bias, counts, rate), **found}, held)

    some = lambda n, size=0.15: out.normal(n, size=size)
    case("smora", 8, 3, 6, bias=some(8))
    case("smora_unbiased", 8, 3, 6, gate="unbiased", bias=some(8), held="")
    # Without a bias the two are one.
    case("smora_unbiased_start", 8, 3, 6, gate="unbiased")
    # The rule moves the ranks of a block alike.
    case("smora_blocks", 8, 4, 8, q=2, bias=some(4).repeat_interleave(2))
    case("smora_blocks_unbiased", 8, 4, 8, q=2, gate="unbiased", bias=some(4).repeat_interleave(2), held="")
    case("smora_one_block", 9, 3, 6, q=3)
    case("smora_all", 6, 6, 12, bias=some(6))
    # Every score is 1/2: the k lowest, each with gate 1, and LoRA with α/k on them. Counts then fall apart at once.
    case("smora_tie", 8, 3, 6, router=torch.zeros(8, inputs, dtype=torch.float64), held="", tie=True)
    # A bias so low that what is chosen counts less than nothing.
    case("smora_floor", 5, 4, 8, bias=torch.tensor([0.1, -1.5, 0.0, -1.2, -1.3], dtype=torch.float64), held="")


def make_flylora(out):
    inputs, outputs, tokens, rate = 12, 10, 9, 1e-2
    authors = "gfyddha/FlyLoRA: peft/tuners/lora/layer.py, Linear.forward"

    def case(name, r, k, alpha, select="signed", input_gradient="keep", bias=None, x=None, held=authors, tie=False):
        p = inputs // (r // k)
        bias = torch.zeros(r, dtype=torch.float64) if bias is None else bias

        def draw():
            a = out.sparse_rows(r, inputs, p)
            given = leaves(x=out.normal(tokens, inputs) if x is None else x, lora_B=out.normal(outputs, r))
            score = (given["x"] @ a.T).detach() + bias
            return given, a, tie or apart(score.abs() if select == "magnitude" else score, k) > APART

        given, a = drawn(draw)
        y, chosen, delta, counts = flylora(given["x"], a, given["lora_B"], bias, k, alpha, select, input_gradient)
        upstream = out.normal(tokens, outputs)
        found = gradients(delta, upstream, given)
        settings = {"r": r, "lora_alpha": alpha, "top_k": k, "select": select, "input_gradient": input_gradient, "bias_u": rate}
        out.put(name, "flylora", settings, {**given, "lora_A": a, "lora_topk_bias": bias, "upstream": upstream, "y": y, "chosen": chosen, "delta": delta,
                                            "counts": counts, "after.lora_topk_bias": balanced(bias, counts, rate), **found}, held, nonzeros=p)

    some = lambda n: out.normal(n, size=0.1)
    case("flylora_cut", 8, 2, 16, input_gradient="cut", bias=some(8))
    four_bit = "gfyddha/FlyLoRA: peft/tuners/lora/bnb.py, Linear4bit.forward"
    case("flylora", 8, 2, 16, bias=some(8), held=four_bit)
    case("flylora_magnitude", 8, 2, 16, select="magnitude", bias=some(8), held="gfyddha/FlyLoRA: flylora.py, FlyLoRALinear.forward")
    # 7 // 2 = 3: a third of the places, where k/r asks for two sevenths.
    case("flylora_uneven", 7, 2, 14, input_gradient="cut", bias=some(7))
    case("flylora_all", 6, 6, 12, input_gradient="cut")
    # Inputs of nothing: every score is 0.
    still = out.normal(tokens, inputs)
    still[2:5] = 0.0
    case("flylora_tie", 8, 2, 16, x=still, held="", tie=True)
    shapes = [(576, 32, 8), (1536, 32, 8), (576, 32, 32), (576, 30, 8), (576, 7, 2), (1536, 20, 8), (192, 32, 5), (100, 32, 8), (12, 8, 2)]
    rows = [{"inputs": n, "r": r, "top_k": k, "code": n // (r // k), "one_file": max(1, int(n * (k / r))), "rounded": round(n * k / r)} for n, r, k in shapes]
    out.put("flylora_nonzeros", "flylora", {}, {}, "gfyddha/FlyLoRA: reset_lora_parameters, and flylora.py", rows=rows)


def make_sparse_gin(out):
    tokens, heads, hidden, d = 8, 3, 10, 4
    sharpness, threshold, cut = 10.0, 0.1, 0.6
    bound = threshold + math.log(cut / (1 - cut)) / sharpness
    earlier = torch.ones(tokens, tokens).tril().bool()

    def draw():
        maps = out.normal(heads, tokens, tokens, size=2.5).masked_fill(~earlier, -math.inf).softmax(-1)
        s = maps.sum(0)[earlier]
        return maps, min((s - bound).abs().min(), (s - 1.0).abs().min()) > APART

    (maps,) = drawn(draw)
    linear = lambda name, o, i: {f"{name}.weight": out.uniform(o, i, bound=i**-0.5), f"{name}.bias": out.uniform(o, bound=i**-0.5)}
    one = lambda value: torch.tensor([value], dtype=torch.float64)
    parameters = {**linear("in", d, hidden), **linear("fc1", d, d), **linear("fc2", d, d), **linear("out", hidden, d), "act": one(0.25), "eps": one(0.3),
                  "norm": 1 + out.normal(hidden, size=0.2), "scale": one(0.4)}
    h, upstream = out.normal(tokens, hidden, size=2.0), out.normal(tokens, hidden)

    for name, way in (("sparse_gin", "causal"), ("sparse_gin_reference", "reference")):
        given = leaves(maps=maps, h=h, **parameters)
        p = {k: v for k, v in given.items() if k not in ("maps", "h")}
        found = sparse_gin_whole(given["h"], given["maps"], p, (sharpness, threshold, cut), way)
        w = found["w"].detach()
        edges = ((w if way == "causal" else torch.diag(w.diagonal())) > 0).nonzero()
        offsets = torch.searchsorted(edges[:, 0].contiguous(), torch.arange(tokens + 1))
        grads = gradients(found["y"], upstream, given)
        if way == "causal":
            rows, cache = sparse_gin_cached(h, maps, parameters, (sharpness, threshold, cut))
            assert (rows - found["y"]).abs().max() < 1e-12 and (cache - found["p"]).abs().max() < 1e-12
        settings = {"gin_dim": d, "edge_sharpness": sharpness, "edge_threshold": threshold, "edge_cut": cut, "norm_eps": 1e-5, "dropout": 0.0, "direction": way}
        held = "" if way == "causal" else "lamm-mit/Graph-Aware-Transformers: construct_adjacency, _apply_single_gnn"
        out.put(name, "sparse-gin", settings, {**given, "upstream": upstream, **found, "edges.offsets": offsets, "edges.columns": edges[:, 1],
                                               "edges.weights": w[edges[:, 0], edges[:, 1]], **grads}, held)


def make(seed=23):
    out = Goldens(seed)
    make_smora(out)
    make_flylora(out)
    make_sparse_gin(out)
    return out


if __name__ == "__main__":
    goldens = make()
    save_file(goldens.tensors, here / "gated.safetensors")
    (here / "gated.json").write_text(json.dumps(goldens.cases, indent=1) + "\n")
