#!/usr/bin/env python3
"""LQ-LoRA's quantiser and decomposition, from the formulas of HanGuo97/lq-lora: writes lq_lora.safetensors beside this file.

pip install torch==2.15 safetensors; python make_lq_lora.py

The quantiser follows models/quantization_utils_2.py there (scales rounded as pytorch_quantization does: half to even, clamped), the decomposition
models/lq_utils.py with the exact SVD in the place of the randomised one. Everything is in f32, as there.
"""
import json, pathlib

import torch
from safetensors.torch import save_file

here = pathlib.Path(__file__).parent
torch.manual_seed(0)
DELTA = 0.9677083
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def levels(bits):
    normal = torch.distributions.normal.Normal(0.0, 1.0)
    half = 2 ** (bits - 1)
    left = torch.linspace(1 - DELTA, 0.5, half, dtype=torch.float64)[:-1]
    right = torch.linspace(0.5, DELTA, half + 1, dtype=torch.float64)
    return (normal.icdf(torch.cat([left, right])) / normal.icdf(torch.tensor(DELTA, dtype=torch.float64))).float()


def quantise(w, bits, scale_bits, scale_type, block, scale_block):
    groups = w.reshape(-1, scale_block, block)
    absmax = groups.abs().amax(2, keepdim=True)
    offset = absmax.min()
    second = (absmax - offset).amax(1, keepdim=True).to(HALVES[scale_type]).float()
    most = 2.0 ** scale_bits - 1
    factor = most / second
    index = ((absmax - offset) * factor).round().clamp(0, most)
    scales = index / factor + offset
    values = levels(bits)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize((groups / scales).contiguous(), middles, right=False)
    return (values[codes] * scales).reshape(w.shape), codes.reshape(w.shape).to(torch.uint8)


def stored(w, bits, scale_bits, scale_type, block, scale_block):
    """Codes, their scales' codes, second scales and offset, as a `lorimer-nf` checkpoint has them."""
    groups = w.reshape(-1, scale_block, block)
    absmax = groups.abs().amax(2)
    offset = absmax.min()
    second = (absmax - offset).amax(1).to(HALVES[scale_type])
    most = 2.0 ** scale_bits - 1
    index = ((absmax - offset) * (most / second.float()[:, None])).round().clamp(0, most).to(torch.int64)
    return quantise(w, bits, scale_bits, scale_type, block, scale_block)[1], index, second, offset.reshape(1)


def bit_stream(numbers, bits):
    """Numbers one after the other, each from its highest bit, eight bits a byte."""
    flat = numbers.flatten().to(torch.int64)
    stream = (flat[:, None] >> torch.arange(bits - 1, -1, -1)) & 1
    stream = torch.nn.functional.pad(stream.flatten(), (0, -flat.numel() * bits % 8)).reshape(-1, 8)
    return (stream << torch.arange(7, -1, -1)).sum(1).to(torch.uint8)


def factors(w, rank):
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = s.sqrt()
    return (u * root)[:, :rank], (vt * root[:, None])[:rank]


def decompose(w, rank, config, fisher=None):
    """The errors of all steps to the first that rises, and the change L1 L2 and Q of the best."""
    q, errors, best = torch.zeros_like(w), [], None
    for _ in range(100):
        if fisher is None:
            l1, l2 = factors(w - q, rank)
        else:
            rows, columns = fisher.mean(1, keepdim=True).sqrt(), fisher.mean(0, keepdim=True).sqrt()
            l1, l2 = factors(rows * (w - q) * columns, rank)
            l1, l2 = l1 / rows, l2 / columns
        q = quantise(w - l1 @ l2, *config)[0]
        difference = w - l1 @ l2 - q
        error = (difference if fisher is None else fisher.sqrt() * difference).norm().item()
        errors.append(error)
        if best is not None and error > best[0]:
            break
        best = (error, l1 @ l2, q)
    return errors, best


def main():
    tensors = {}
    weight = torch.randn(64, 256) * torch.logspace(-2, 0, 64)[:, None]
    tensors["weight"] = weight
    cases = []
    for bits in [2, 3, 4, 8]:
        tensors[f"levels.{bits}"] = levels(bits)
    for number, config in enumerate([(2, 2, "bf16", 16, 16), (3, 3, "fp16", 32, 64), (3, 8, "fp32", 64, 256), (4, 4, "bf16", 64, 16),
                                     (4, 8, "fp32", 64, 256), (8, 8, "fp32", 64, 256), (8, 2, "fp16", 16, 256)]):
        back, codes = quantise(weight, *config)
        tensors[f"case.{number}.dequantised"], tensors[f"case.{number}.codes"] = back.contiguous(), codes.contiguous()
        cases.append(config)

    # Ten directions more than the rank are all there are, so that the randomised SVD is exact.
    small = torch.randn(32, 48) @ torch.diag(torch.logspace(0, -1, 48))
    fisher = (torch.randn(32, 48) ** 2) * torch.logspace(-1, 1, 32)[:, None]
    tensors["small"], tensors["fisher"] = small, fisher
    runs = []
    for number, (rank, config, weighted) in enumerate([(22, (3, 8, "fp32", 16, 16), False), (8, (2, 4, "bf16", 16, 16), False),
                                                       (22, (3, 8, "fp32", 16, 16), True)]):
        errors, (error, change, q) = decompose(small, rank, config, fisher if weighted else None)
        print(rank, config, weighted, errors, "quantised alone", (small - quantise(small, *config)[0]).norm().item())
        tensors[f"run.{number}.change"], tensors[f"run.{number}.quantised"] = change.contiguous(), q.contiguous()
        runs.append({"rank": rank, "config": config, "weighted": weighted, "errors": errors})
    save_file(tensors, here / "lq_lora.safetensors")
    (here / "lq_lora.json").write_text(json.dumps({"cases": cases, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
