#!/usr/bin/env python3
"""Packed checkpoints of tiny Llamas with the logits that they give: writes the folder packed/ beside this file.

pip install torch==2.15 transformers==5.23 bitsandbytes==0.50.2 accelerate safetensors; python make_packed.py

bitsandbytes' are written by transformers. GPTQ's and AWQ's are packed here as their packages do (AutoGPTQ 0.7.1, AutoAWQ 0.2.9: eight numbers of 4 bits to an
int32, the first lowest; GPTQ along inputs, zero points less one in its first format; AWQ along outputs in the order 0 2 4 6 1 3 5 7), as is `lorimer-nf` (docs/quantize.md), and the logits are those of transformers with the expanded weights.
"""
import json, pathlib, shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

here = pathlib.Path(__file__).parent
out = here / "packed"
shutil.rmtree(out, ignore_errors=True)
tokens = torch.tensor([[5, 99, 17, 200, 3, 258, 44, 45, 46, 8, 120]])


def golden(model, folder, **tensors):
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
    save_file({"tokens": tokens[0].float(), "logits": logits.contiguous(), **tensors}, folder / "golden.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)


NAME = "model.layers.1.mlp.down_proj.weight"
# Rows of whole blocks: bitsandbytes 0.50.2 expands others wrongly on the CPU.
torch.manual_seed(1)
json_config = json.loads((here / "tiny-llama/config.json").read_text())
wide = LlamaForCausalLM(LlamaConfig(**{**json_config, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})).float()
for key, p in wide.named_parameters():
    p.data.normal_(1.0 if "norm" in key else 0.0, 0.12)
wide.save_pretrained(out / "wide")
for name, settings in {"bnb-nf4": {}, "bnb-nf4-double": {"bnb_4bit_use_double_quant": True},
                       "bnb-fp4": {"bnb_4bit_quant_type": "fp4"}}.items():
    config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **settings})
    model = AutoModelForCausalLM.from_pretrained(out / "wide", quantization_config=config, dtype=torch.float32, device_map="cpu")
    model.save_pretrained(out / name)
    import bitsandbytes.functional as bnb
    weight = model.get_submodule(NAME.removesuffix(".weight")).weight
    dense = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    whole = AutoModelForCausalLM.from_pretrained(out / "wide", dtype=torch.float32)
    for path, module in model.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            whole.get_submodule(path).weight.data = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    golden(whole, out / name, **{"weight": dense.contiguous()})
shutil.rmtree(out / "wide")


def pack(numbers, order=range(8)):
    """(rows, 8k) of 4 bits to int32 (rows, k)."""
    parts = numbers.reshape(numbers.shape[0], -1, 8).to(torch.int64)
    packed = sum(parts[:, :, o] << (4 * i) for i, o in enumerate(order))
    return torch.where(packed >= 2 ** 31, packed - 2 ** 32, packed).to(torch.int32)


def checkpoint(name, group, settings, make):
    """make(q (inputs, outputs), zeros, scales (groups, outputs), groups of inputs) -> tensors of a module."""
    config = LlamaConfig(**json.loads((here / "tiny-llama/config.json").read_text()))
    model = LlamaForCausalLM.from_pretrained(here / "tiny-llama", config=config, dtype=torch.float32)
    folder = out / name
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for path, module in model.model.layers.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        outputs, inputs = module.weight.shape
        size = inputs if group == -1 else group
        groups = torch.arange(inputs) // size
        if settings.get("desc_act"):
            groups = groups[torch.randperm(inputs)]
        count = -(-inputs // size)
        q = torch.randint(0, 16, (inputs, outputs))
        zeros = torch.randint(1, 16, (count, outputs)) if not settings.get("sym", False) else torch.full((count, outputs), 8)
        scales = (torch.rand(count, outputs) * 0.05 + 0.01).half()
        module.weight.data = (scales.float()[groups] * (q - zeros[groups])).T.contiguous()
        full = f"model.layers.{path}"
        del tensors[f"{full}.weight"]
        tensors.update({f"{full}.{key}": value.contiguous() for key, value in make(q, zeros, scales, groups).items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    own = json.loads((folder / "config.json").read_text())
    own["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(own, indent=2) + "\n")
    golden(model, folder, weight=model.get_submodule(NAME.removesuffix(".weight")).weight.data.clone())


def gptq(minus):
    return lambda q, zeros, scales, groups: {"qweight": pack(q.T).T, "qzeros": pack(zeros - minus), "scales": scales, "g_idx": groups.to(torch.int32)}


def awq(q, zeros, scales, groups):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {"qweight": pack(q, order), "qzeros": pack(zeros, order), "scales": scales}


torch.manual_seed(0)
plain = {"quant_method": "gptq", "bits": 4, "damp_percent": 0.1}
checkpoint("gptq", 16, {**plain, "group_size": 16, "desc_act": False, "sym": False}, gptq(1))
checkpoint("gptq-act-order-v2", 16, {**plain, "group_size": 16, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"}, gptq(0))
checkpoint("gptq-sym", -1, {**plain, "group_size": -1, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}, gptq(1))
checkpoint("awq", 16, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, awq)


# Of each module another configuration; their blocks divide the matrices.
from make_lq_lora import bit_stream, quantise, stored

model = LlamaForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32)
folder = out / "lorimer-nf"
model.save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
configs = [(3, 8, "fp32", 16, 16), (2, 3, "bf16", 16, 4), (4, 4, "fp16", 32, 4), (8, 8, "bf16", 64, 2), (3, 2, "fp16", 16, 2)]
modules = {}
linears = [(f"model.layers.{p}", m) for p, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)]
for number, (path, module) in enumerate(linears):
    config = configs[number % len(configs)]
    codes, index, second, offset = stored(module.weight.data, *config)
    name = f"{path}.weight"
    tensors.update({name: bit_stream(codes, config[0]), f"{name}.absmax": bit_stream(index, config[1]),
                    f"{name}.nested_absmax": second, f"{name}.nested_offset": offset})
    modules[path] = dict(zip(["shape", "num_bits", "num_bits_0", "num_bits_1", "block_size_0", "block_size_1"], [list(module.weight.shape), *config]))
    module.weight.data = quantise(module.weight.data, *config)[0]
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
own = json.loads((folder / "config.json").read_text())
own["quantization_config"] = {"quant_method": "lorimer-nf", "modules": modules}
(folder / "config.json").write_text(json.dumps(own, indent=2) + "\n")
golden(model, folder, weight=model.get_submodule(NAME.removesuffix(".weight")).weight.data.clone())
