#!/usr/bin/env python3
"""Makes training/*.safetensors: what the ways to train do in their authors' code, written again from the equations.

needs torch 2.15, transformers 5.23, numpy; `adam8bit` needs bitsandbytes 0.50 (it computes on the CPU)

usage: make_training.py [NAME...]      (all, where none is given)

Each function says which repository and commit it was held against.
"""
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

here = pathlib.Path(__file__).parent
out = here / "training"


def linear_rate(step, total, warmup):
    """transformers' linear schedule, as a share of the peak."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def lora_sb():
    """RaghavSinghal10/lora-sb at 37b33d4: `utils/gradient_utils.py`, `utils/svd_utils.py`, `train_cr.py`.

    Gradients of the mean loss of each batch, summed over the batches; minus the sign times the peak rate over the steps of the
    warm-up; the best approximation of rank r between orthonormal factors in bf16. Then AdamW on the middle.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(12)
    model = LlamaForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float64).eval()
    ids, prompt, rank, peak, total, ratio = torch.randint(3, 259, (6, 14)), 5, 6, 2e-3, 40, 0.1
    labels = ids.clone()
    labels[:, :prompt] = -100

    def loss_of(rows):
        logits = model(ids[rows]).logits[:, :-1].reshape(-1, 259)
        return F.cross_entropy(logits, labels[rows][:, 1:].reshape(-1))

    names = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    weights = {name: model.get_submodule(name).weight for name in names}
    for batch in (range(0, 3), range(3, 6)):
        (loss_of(list(batch)) / 3).backward()
    eta = peak / max(1, math.ceil(ratio * total))
    golden = {"tokens": ids.float(), "prompt": torch.tensor(prompt), "lr": torch.tensor(peak, dtype=torch.float64),
              "eta": torch.tensor(eta, dtype=torch.float64)}
    middles = {}
    for name, weight in weights.items():
        g = weight.grad
        assert g.abs().min() > 5e-6 * g.abs().max(), f"{name}: a sign hangs on rounding"
        step = -eta * g.sign()
        u, s, vt = torch.linalg.svd(step)
        # Their randomised decomposition with ten power iterations comes to the same product.
        torch.manual_seed(42)
        lu, ls, lv = torch.svd_lowrank(step.T.float(), q=rank, niter=10)
        best = u[:, :rank] * s[:rank] @ vt[:rank]
        theirs = (lu * ls @ lv.T).T.double()
        assert ((theirs - step).norm() - (best - step).norm()) < 0.02 * step.norm()
        b, a, r = u[:, :rank].bfloat16().double(), vt[:rank].bfloat16().double(), torch.diag(s[:rank])
        middles[name] = (b, r.clone().requires_grad_(), a)
        golden[f"{name}.singular"] = s[:rank].float()
        golden[f"{name}.change"] = (b @ r @ a).float()
    originals = {name: w.detach().clone() for name, w in weights.items()}
    optimizer = torch.optim.AdamW([r for _, r, _ in middles.values()], lr=peak, weight_decay=0.0)
    losses = []
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = peak * linear_rate(step, total, math.ceil(ratio * total))
        changed = {f"{n}.weight": originals[n] + b @ r @ a for n, (b, r, a) in middles.items()}
        logits = torch.func.functional_call(model, changed, (ids,)).logits[:, :-1].reshape(-1, 259)
        loss = F.cross_entropy(logits, labels[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    golden["losses"] = torch.tensor(losses, dtype=torch.float64)
    return golden


def sora():
    """TsinghuaC3I/SoRA at c275ac2: `src/sparse_optimizer.py`, `src/trainer.py`, `run_glue.py`.

    Gates have a loss term λ·Σ|g|/p over all p gates, an AdamW of their own at the same linear schedule, and after each of its steps
    three updates that look at what the one before left: so that all below 2ξ is closed, and ξ itself stays.
    """
    torch.manual_seed(12)
    steps, warmup, peak, ratio, weight = 40, 4, 0.05, 0.375, 10.0
    gates = [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    slopes = [[torch.randn(5, dtype=torch.float64) * 0.1 for _ in gates] for _ in range(steps)]
    golden = {f"gate.{i}": g.clone() for i, g in enumerate(gates)}
    golden |= {f"slope.{i}": torch.stack([s[i] for s in slopes]) for i in range(3)}
    xi = ratio * peak
    for kind in ("masked", "soft"):
        parameters = [torch.nn.Parameter(g.clone()) for g in gates]
        # eps is theirs where it does not matter: transformers' AdamW adds 1e-6 before the correction of the bias.
        optimizer = torch.optim.AdamW(parameters, lr=peak, eps=1e-8, weight_decay=0.0)
        path = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * linear_rate(step, steps, warmup)
            count = sum(p.numel() for p in parameters)
            loss = sum((p * s).sum() for p, s in zip(parameters, slopes[step]))
            loss = loss + weight * sum(p.abs().sum() for p in parameters) / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for p in parameters:
                    if kind == "soft":
                        p.copy_(p.sign() * (p.abs() - xi).clamp(min=0))
                        continue
                    p[p > xi] -= xi
                    p[p < -xi] += xi
                    p[p.abs() < xi] = 0.0
            path.append(torch.cat([p.detach().clone() for p in parameters]))
        golden[f"{kind}.path"] = torch.stack(path)
    low, high, count = 1e-4, 7e-4, 7
    golden["linear"] = torch.tensor(np.linspace(low, high, count))
    golden["log_linear"] = torch.tensor(np.log(np.linspace(np.exp(low), np.exp(high), count)))
    golden["exp_linear"] = torch.tensor(np.exp(np.linspace(np.log(low), np.log(high), count)))
    golden["log_linear.wide"] = torch.tensor(np.log(np.linspace(np.exp(0.5), np.exp(3.0), 5)))
    golden["linear.zero"] = torch.tensor(np.linspace(0, high, count))
    return golden


def ba_lora():
    """cyp-jlu-ai/BA-LoRA at e119f2f (first version) and llm172/BA-LoRA at 2829797 (second), `compute_loss` of `train.py`.

    Values and gradients of the terms at the supervised positions of two rows. The first version's singular values are those of the paper's
    matrix, positions × vocabulary: the code's own line fails on its shape.
    """
    torch.manual_seed(13)
    rows, count, width = 2, 7, 30
    z, base = torch.randn(count, width, dtype=torch.float64) * 2, torch.randn(count, width, dtype=torch.float64) * 2
    golden = {"logits": z, "base": base, "rows": torch.tensor(rows)}

    def put(name, term):
        logits = z.clone().requires_grad_()
        value = term(logits)
        value.backward()
        golden[f"{name}.value"], golden[f"{name}.gradient"] = value.detach(), logits.grad

    def share(logits, k, root):
        s = torch.linalg.svdvals(logits)
        return -s[:k].sum() / ((s * s).sum().sqrt() if root else s.sum())

    def nlg(logits):
        # kl_div with "batchmean" divides the sum over rows, positions and words by the rows.
        kl = F.kl_div(F.log_softmax(logits, -1), F.softmax(base, -1), reduction="sum") / rows
        p = F.softmax(logits, -1)
        entropy = -(p * torch.log(p + 1e-10)).sum(-1).mean()
        return 1e-4 * kl - 3e-4 * entropy + 1e-4 * share(logits, 3, False)

    def nlu(logits):
        distance = F.mse_loss(F.normalize(logits, dim=-1), F.normalize(base, dim=-1))
        centred = logits - logits.mean(0)
        cov = centred.T @ centred / (logits.shape[0] - 1)
        off = cov - torch.diag(torch.diag(cov))
        return 1e-4 * distance + 3e-4 * (off ** 2).sum() / width + 1e-4 * share(logits, 3, False)

    def second(step, total):
        def term(logits):
            lambda1 = 0.1 * 0.025 + 0.9 * 0.025 * 0.5 * (1 + math.cos(math.pi * step / total))
            warmup, ramp = int(0.2 * total), max(int(0.05 * total), 1)
            focus = 0.0 if step < warmup else min((step - warmup) / ramp, 1.0)
            kl = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(base / 2, -1), reduction="none").sum(-1).mean() * 4
            top = F.log_softmax(torch.topk(logits, 20, dim=-1).values, dim=-1)
            entropy = -(top.exp() * top).sum(-1).mean()
            return lambda1 * kl + focus * 0.005 * (-entropy + share(logits, 5, True))
        return term

    put("nlg", nlg)
    put("nlu", nlu)
    for step in (0, 19, 20, 22, 25, 70, 99):
        put(f"second.{step}", second(step, 100))
    return golden


def dylora():
    """huawei-noah/Efficient-NLP at 278c345: `DyLoRA/loralib/DyLoRA.py`, `layers.py`.

    A forward at rank b takes the first b rows of A and columns of B, each times the root of r/b, and multiplies the product with α/r: α/b
    in all. Frozen, only the last of them has a gradient.
    """
    torch.manual_seed(14)
    r, alpha, inputs, outputs = 4, 6.0, 7, 5
    a, b = torch.randn(r, inputs, dtype=torch.float64), torch.randn(outputs, r, dtype=torch.float64)
    x, direction = torch.randn(3, inputs, dtype=torch.float64), torch.randn(3, outputs, dtype=torch.float64)
    golden = {"a": a, "b": b, "x": x, "direction": direction, "alpha": torch.tensor(alpha, dtype=torch.float64)}
    for rank in range(1, r + 1):
        for frozen in (False, True):
            ga, gb = a.clone().requires_grad_(), b.clone().requires_grad_()
            factor = math.sqrt(r / rank)

            def cut(t):
                if not frozen:
                    return t[:, :rank] * factor
                return torch.cat([t[:, :rank - 1].detach(), t[:, rank - 1:rank]], -1) * factor

            y = x @ cut(ga.T) @ cut(gb).T * (alpha / r)
            (y * direction).sum().backward()
            name = f"{rank}.{'frozen' if frozen else 'all'}"
            golden |= {f"{name}.y": y.detach(), f"{name}.a": ga.grad, f"{name}.b": gb.grad}
    return golden


def lora_pro():
    """mrflogs/LoRA-Pro at fe26027: `lorapro_full_adjustment` in `DeepSpeed-0.15.1/deepspeed/runtime/zero/stage_1_and_2.py`, with SGD.

    The repository counts its steps from 2 where the bias of the moments is corrected, which makes the first steps smaller (0.74, 0.79, …)
    than Adam's; here they count from 1. Its scaling 16/8 is α/r.
    """
    torch.manual_seed(15)
    outputs, inputs, r, scaling, rate, delta = 6, 8, 3, 2.0, 2e-3, 1e-8
    target = torch.randn(outputs, inputs, dtype=torch.float64)
    golden = {"target": target, "scaling": torch.tensor(scaling), "rate": torch.tensor(rate, dtype=torch.float64)}
    start = torch.randn(r, inputs, dtype=torch.float64) * 0.5
    golden["a"] = start
    for kind in ("zero", "moved"):
        a = start.clone()
        b = torch.zeros(outputs, r, dtype=torch.float64) if kind == "zero" else torch.randn(outputs, r, dtype=torch.float64) * 0.3
        golden[f"{kind}.b"] = b.clone()
        m = v = torch.zeros(outputs, inputs, dtype=torch.float64)
        eye = torch.eye(r, dtype=torch.float64)

        def parts(ga, gb):
            aa, bb = torch.linalg.pinv(a @ a.T + delta * eye), torch.linalg.pinv(b.T @ b + delta * eye)
            left = torch.eye(outputs, dtype=torch.float64) - b @ bb @ b.T
            return bb @ ga / scaling ** 2, left @ gb @ aa / scaling ** 2, bb

        for step in range(1, 9):
            g = scaling * b @ a - target
            ga, gb, _ = parts(scaling * b.T @ g, scaling * g @ a.T)
            whole = scaling * b @ ga + scaling * gb @ a
            m, v = 0.9 * m + 0.1 * whole, 0.999 * v + 0.001 * whole * whole
            g = (m / (1 - 0.9 ** step)) / (v.sqrt() / math.sqrt(1 - 0.999 ** step) + 1e-8)
            plain_a, plain_b = scaling * b.T @ g, scaling * g @ a.T
            ga, gb, bb = parts(plain_a, plain_b)
            # BᵀB X + X A Aᵀ = −s⁻²(BᵀB + δ)⁻¹ g_A Aᵀ, as one system of equations.
            system = torch.kron(b.T @ b, eye) + torch.kron(eye, a @ a.T)
            c = -(bb @ plain_a @ a.T) / scaling ** 2
            x = torch.linalg.solve(system, c.reshape(-1)).reshape(r, r)
            a, b = a - rate * (ga + x @ a), b - rate * (gb - b @ x)
            golden |= {f"{kind}.{step}.a": a.clone(), f"{kind}.{step}.b": b.clone()}
    return golden


def lora_pro_light():
    """mrflogs/LoRA-Pro at a5de2f4: `step_efficient` in `peta/optim.py`, the release before the one of `lora_pro`: AdamW on the adjusted gradients."""
    torch.manual_seed(18)
    outputs, inputs, r, scaling, rate, decay, delta = 6, 8, 3, 2.0, 5e-3, 0.1, 1e-8
    target = torch.randn(outputs, inputs, dtype=torch.float64)
    start = torch.randn(r, inputs, dtype=torch.float64) * 0.5
    golden = {"target": target, "a": start, "scaling": torch.tensor(scaling), "rate": torch.tensor(rate, dtype=torch.float64),
              "decay": torch.tensor(decay, dtype=torch.float64)}
    eye = torch.eye(r, dtype=torch.float64)
    for kind in ("zero", "moved"):
        b = torch.zeros(outputs, r, dtype=torch.float64) if kind == "zero" else torch.randn(outputs, r, dtype=torch.float64) * 0.3
        golden[f"{kind}.b"] = b.clone()
        pair, moments = [start.clone(), b], [[torch.zeros_like(t), torch.zeros_like(t)] for t in (start, b)]
        for step in range(1, 9):
            a, b = pair
            g = scaling * b @ a - target
            plain_a, plain_b = scaling * b.T @ g, scaling * g @ a.T
            aa, bb = torch.linalg.pinv(a @ a.T + delta * eye), torch.linalg.pinv(b.T @ b + delta * eye)
            # BᵀB X + X A Aᵀ = −s⁻²(BᵀB + δ)⁻¹ g_A Aᵀ, as one system of equations.
            system = torch.kron(b.T @ b, eye) + torch.kron(eye, a @ a.T)
            x = torch.linalg.solve(system, -(bb @ plain_a @ a.T).reshape(-1) / scaling ** 2).reshape(r, r)
            left = torch.eye(outputs, dtype=torch.float64) - b @ bb @ b.T
            adjusted = bb @ plain_a / scaling ** 2 + x @ a, left @ plain_b @ aa / scaling ** 2 - b @ x
            for i, (g, (m, v)) in enumerate(zip(adjusted, moments)):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                pair[i] = (1 - rate * decay) * pair[i] - rate * (m / (1 - 0.9 ** step)) / (v.sqrt() / math.sqrt(1 - 0.999 ** step) + 1e-8)
            golden |= {f"{kind}.{step}.a": pair[0].clone(), f"{kind}.{step}.b": pair[1].clone()}
    return golden


def adam8bit():
    """bitsandbytes 0.50.2's own AdamW8bit, on the CPU: forty steps, and which parameters keep 32 bits."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import create_dynamic_map

    torch.manual_seed(16)
    golden = {"signed": create_dynamic_map(True), "unsigned": create_dynamic_map(False)}
    large, small = torch.randn(72, 64) * 0.3, torch.randn(60, 60) * 0.3
    goal, near = torch.randn(72, 64), torch.randn(60, 60)
    golden |= {"large": large, "small": small, "goal": goal, "near": near}
    parameters = [torch.nn.Parameter(large.clone()), torch.nn.Parameter(small.clone())]
    optimizer = bnb.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.01)
    losses = []
    for step in range(40):
        loss = ((parameters[0] - goal) ** 2).mean() + ((parameters[1] - near) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 0:
            golden["first.large"] = parameters[0].detach().clone()
            golden["first.indices"] = optimizer.state[parameters[0]]["state1"].clone().float()
            golden["first.scales"] = optimizer.state[parameters[0]]["absmax1"].clone()
    kinds = [optimizer.state[p]["state1"].dtype for p in parameters]
    assert kinds == [torch.uint8, torch.float32], kinds
    golden |= {"losses": torch.tensor(losses), "last.large": parameters[0].detach().clone(), "last.small": parameters[1].detach().clone()}
    return golden


def label_smoothing():
    """transformers 5.23's own LabelSmoother."""
    from transformers.trainer_pt_utils import LabelSmoother

    torch.manual_seed(17)
    logits = (torch.randn(2, 6, 20, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.randint(0, 20, (2, 6))
    labels[0, :3] = labels[1, 4:] = -100
    loss = LabelSmoother(epsilon=0.1)({"logits": logits}, labels)
    loss.backward()
    kept = labels != -100
    return {"logits": logits.detach()[kept], "targets": labels[kept].float(), "loss": loss.detach(), "gradient": logits.grad[kept]}


if __name__ == "__main__":
    out.mkdir(exist_ok=True)
    for make in (lora_sb, sora, ba_lora, dylora, lora_pro, lora_pro_light, adam8bit, label_smoothing):
        if len(sys.argv) == 1 or make.__name__ in sys.argv[1:]:
            save_file({k: t.contiguous() for k, t in make().items()}, out / f"{make.__name__}.safetensors")
