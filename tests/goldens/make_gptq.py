#!/usr/bin/env python3
"""4 bits in groups, rounded to the nearest and as GPTQ does, as GPTQ's and AWQ's checkpoints hold them: writes gptq.safetensors beside this file.

pip install torch==2.15 safetensors; python make_gptq.py

GPTQ's rounding is that of its paper's section 3.1 (arXiv 2210.17323), without Cholesky: after each column the inverse Hessian of the columns that are left is
had by elimination. Everything is in f64 but for the steps, which the files keep in half precision. Packed as AutoGPTQ 0.7.1 and AutoAWQ 0.2.9 read.
"""
import pathlib

import torch
from safetensors.torch import save_file

here = pathlib.Path(__file__).parent
torch.manual_seed(0)
OUTPUTS, INPUTS = 16, 64
# Outputs of different size, one of them of one sign, one without weights; inputs that are alike, one that is always zero.
weight = torch.randn(OUTPUTS, INPUTS) * torch.logspace(-2, 1, OUTPUTS)[:, None]
weight[3] = weight[3].abs() + 0.1 * weight[3].abs().max()
weight[7, 16:32] = 0
inputs = torch.randn(96, 12) @ torch.randn(12, INPUTS) + 0.3 * torch.randn(96, INPUTS)
inputs[:, 20] = 0


def grid(w, symmetric):
    """Step and zero point of some weights (outputs, n)."""
    least, most = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    wide = 2 * torch.maximum(-least, most) if symmetric else most - least
    step = torch.where(wide > 0, wide / 15, 1).half().double()
    zero = torch.full_like(step, 8) if symmetric else (-least / step).round().clamp(0, 15)
    return step, zero


def column(w, step, zero):
    return ((w / step).round() + zero).clamp(0, 15)


def rtn(w, group, symmetric):
    codes, steps, zeros = [], [], []
    for begin in range(0, INPUTS, group):
        part = w[:, begin:begin + group]
        step, zero = grid(part, symmetric)
        codes.append(column(part, step[:, None], zero[:, None]))
        steps.append(step), zeros.append(zero)
    return torch.cat(codes, 1), torch.stack(steps), torch.stack(zeros)


def gptq(w, hessian, group, symmetric):
    w, inverse = w.clone(), torch.linalg.inv(hessian)
    codes, steps, zeros = torch.zeros_like(w), [], []
    for j in range(INPUTS):
        if j % group == 0:
            step, zero = grid(w[:, j:j + group], symmetric)
            steps.append(step), zeros.append(zero)
        codes[:, j] = column(w[:, j], step, zero)
        error = (w[:, j] - step * (codes[:, j] - zero)) / inverse[j, j]
        w[:, j + 1:] -= error[:, None] * inverse[j, j + 1:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, torch.stack(steps), torch.stack(zeros)


def words(numbers, order):
    """(rows, 8k) numbers of 4 bits to (rows, k) of 32."""
    packed = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
    for place, of in enumerate(order):
        packed |= numbers[:, of::8].long() << (4 * place)
    return torch.where(packed >= 2 ** 31, packed - 2 ** 32, packed).int()


def tensors(codes, steps, zeros, group, kind):
    plain, awq = range(8), [0, 2, 4, 6, 1, 3, 5, 7]
    if kind == "awq":
        return {"qweight": words(codes.T, awq), "qzeros": words(zeros, awq), "scales": steps.half()}
    less = 1 if kind == "gptq" else 0
    return {"qweight": words(codes, plain).T.contiguous(), "qzeros": words(zeros - less, plain), "scales": steps.half(),
            "g_idx": (torch.arange(INPUTS) // group).int()}


mean = inputs.double().T @ inputs.double() / len(inputs)
hessian = mean + 0.01 * mean.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
found = {"weight": weight, "inputs": inputs}
for group in [16, INPUTS]:
    for kind, symmetric in [("gptq", True), ("gptq_v2", False), ("awq", False)]:
        for method, (codes, steps, zeros) in {"rtn": rtn(weight.double(), group, symmetric),
                                              "gptq": gptq(weight.double(), hessian, group, symmetric)}.items():
            for part, tensor in tensors(codes, steps, zeros, group, kind).items():
                found[f"{method}.{kind}.{group}.{part}"] = tensor.contiguous()
            lost = weight.double() - steps.T.repeat_interleave(group, 1) * (codes - zeros.T.repeat_interleave(group, 1))
            print(method, kind, group, "of weights", lost.norm().item(), "of outputs", (lost @ inputs.double().T).norm().item())
save_file(found, here / "gptq.safetensors")
