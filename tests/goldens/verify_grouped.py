#!/usr/bin/env python3
"""Reads the GPTQ and AWQ checkpoints that `lorimer quantize` writes by their formats, and compares weights and losses: verify_grouped.py LORIMER [gptqmodel]

pip install torch==2.15 transformers==5.23 safetensors; for the second half gptqmodel==7.7.0 optimum==2.3.0 too

What config.json says goes through transformers' own classes; the weights are unpacked here as AutoGPTQ 0.7.1 and AutoAWQ 0.2.9 do: a word's lowest four bits come
first, AWQ's eight outputs of a word are 0 2 4 6 1 3 5 7. With a second argument, transformers loads them with gptqmodel as well.
"""
import json, pathlib, subprocess, sys, tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import AwqConfig, GPTQConfig

here, lorimer = pathlib.Path(__file__).parent, sys.argv[1]
folder = pathlib.Path(tempfile.mkdtemp())
texts = ["Rain fell on the roof all night.", "1, 2, 3, 5, 8, 13", "A short line", "the quick brown fox jumps over the lazy dog"]
data = folder / "rows.jsonl"
data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(*arguments):
    out = subprocess.run([lorimer, *map(str, arguments), "--json", "-q"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def theirs(model, tokenizer):
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
        with torch.no_grad():
            logits = model(ids).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item())
    return losses


def numbers(packed):
    """(rows, k) words to (rows, 8k) numbers of 4 bits."""
    return (packed[:, :, None] >> torch.arange(0, 32, 4)).bitwise_and(15).flatten(1)


def gptq(tensors, module, settings):
    """(outputs, inputs)"""
    codes = numbers(tensors[f"{module}.qweight"].T.contiguous())
    zeros = numbers(tensors[f"{module}.qzeros"]) + (1 if settings.format == "gptq" else 0)
    groups = tensors[f"{module}.g_idx"].long()
    steps = tensors[f"{module}.scales"].float()
    assert settings.bits == 4 and not settings.desc_act and (not settings.sym or (zeros == 8).all())
    size = codes.shape[1] if settings.group_size == -1 else settings.group_size
    assert (groups == torch.arange(codes.shape[1]) // size).all()
    return (steps[groups] * (codes.T - zeros[groups])).T


def awq(tensors, module, settings):
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    plain = lambda packed: numbers(packed).reshape(packed.shape[0], -1, 8)[:, :, order].flatten(1)
    codes, zeros = (plain(tensors[f"{module}.{part}"]) for part in ["qweight", "qzeros"])
    steps = tensors[f"{module}.scales"].float()
    assert settings.bits == 4 and settings.zero_point and settings.format == "gemm"
    size = codes.shape[0] // steps.shape[0]
    assert settings.group_size in (size, -1)
    return (steps.repeat_interleave(size, 0) * (codes - zeros.repeat_interleave(size, 0))).T


tokenizer = AutoTokenizer.from_pretrained(here / "tiny-llama")
calibration = ["--calibration", data]
for more in [["--method", "rtn"], ["--method", "rtn", "--asym"], ["--method", "rtn", "--format", "awq"], ["--method", "rtn", "--group-size", -1],
             ["--method", "gptq", *calibration], ["--method", "gptq", "--asym", *calibration], ["--method", "gptq", "--format", "awq", *calibration]]:
    name = "-".join(str(part) for part in more if part != data)
    packed, dense = folder / name, folder / f"{name}.dense"
    group = [] if "--group-size" in more else ["--group-size", 16]
    run("quantize", "--model", here / "tiny-llama", *more, *group, "--output", packed, "--export-dense", dense)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    kind, unpack = {"gptq": (GPTQConfig, gptq), "awq": (AwqConfig, awq)}[config["quant_method"]]
    settings = kind.from_dict(config)
    assert settings.quant_method.value == config["quant_method"] and settings.meta["rounding"] == more[1]
    kept = {key: value for key, value in settings.to_dict().items() if key in config}
    assert all(kept[key] == config[key] for key in kept), (kept, config)
    tensors, model = load_file(packed / "model.safetensors"), AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    assert sorted(modules) == sorted(path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and path != "lm_head")
    for module in modules:
        linear = model.get_submodule(module)
        weight = unpack(tensors, module, settings)
        assert torch.equal(weight, linear.weight.data), module
        linear.weight.data = weight
    rows = folder / "losses.jsonl"
    run("eval", "--model", packed, "--data", data, "--rows", rows)
    ours = [json.loads(line)["loss"] for line in rows.read_text().splitlines()]
    worst = max(abs(a - b) for a, b in zip(ours, theirs(model, tokenizer)))
    unknown = sorted(set(config) - set(settings.to_dict()))
    print(f"{name}: {len(modules)} weights equal, losses apart by {worst:.1e}; keys that transformers has no field for: {unknown}")
    assert worst < 2e-4
if len(sys.argv) > 2:
    # Groups of 32, which gptqmodel's products on the CPU take.
    torch.manual_seed(0)
    config = {**json.loads((here / "tiny-llama/config.json").read_text()), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    wide = LlamaForCausalLM(LlamaConfig(**config)).float()
    for name, p in wide.named_parameters():
        p.data.normal_(1.0 if "norm" in name else 0.0, 0.12)
    wide.save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")
    ids = tokenizer(texts[3], return_tensors="pt").input_ids
    for more in [["--format", "gptq"], ["--format", "gptq", "--asym"], ["--format", "awq"]]:
        packed, dense = folder / f"wide{''.join(more)}", folder / f"wide{''.join(more)}.dense"
        run("quantize", "--model", folder / "wide", "--method", "gptq", *calibration, *more, "--group-size", 32, "--output", packed, "--export-dense", dense)
        model = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu", dtype=torch.float32)
        whole = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        assert hasattr(model.model.layers[0].self_attn.q_proj, "qweight")
        with torch.no_grad():
            a, b = model(ids).logits.float(), whole(ids).logits
        apart = (a - b).abs().max().item()
        print(f"gptqmodel, {' '.join(more)}: {type(model.model.layers[0].self_attn.q_proj).__name__}, logits apart by {apart:.1e} of {b.abs().max().item():.1f}")
        # Its products on the CPU round activations.
        assert apart < 2e-2 * b.abs().max().item()
print("all well")
