#!/usr/bin/env python3
"""Loads what `lorimer quantize` writes with transformers, PEFT and bitsandbytes, and compares losses: verify_quantize.py LORIMER

pip install torch==2.15 transformers==5.23 peft==0.21.2 bitsandbytes==0.50.2 accelerate safetensors
"""
import json, pathlib, subprocess, sys, tempfile

import bitsandbytes.functional
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

here, lorimer = pathlib.Path(__file__).parent, sys.argv[1]
folder = pathlib.Path(tempfile.mkdtemp())
texts = ["Rain fell on the roof all night.", "1, 2, 3, 5, 8, 13", "A short line", "the quick brown fox jumps over the lazy dog"]
data = folder / "rows.jsonl"
data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(*arguments):
    out = subprocess.run([lorimer, *map(str, arguments), "--json", "-q"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def ours(model, *more):
    rows = folder / "losses.jsonl"
    run("eval", "--model", model, "--data", data, "--rows", rows, *more)
    return [json.loads(line)["loss"] for line in rows.read_text().splitlines()]


def theirs(model, tokenizer):
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
        with torch.no_grad():
            logits = model(ids).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item())
    return losses


def compare(what, a, b, most=2e-4):
    worst = max(abs(x - y) for x, y in zip(a, b))
    print(f"{what}: {a} {b}, apart by {worst:.1e}")
    assert worst < most


tokenizer = AutoTokenizer.from_pretrained(here / "tiny-llama")
compare("base", ours(here / "tiny-llama"), theirs(AutoModelForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32), tokenizer))

packed, dense = folder / "packed", folder / "dense"
run("quantize", "--model", here / "tiny-llama", "--bits", 2.75, "--rank", 4, "--output", packed, "--export-dense", dense)
model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
compare("Q, expanded", ours(packed), theirs(model, tokenizer))
model = PeftModel.from_pretrained(model, packed / "adapter")
compare("Q with the adapter, in PEFT", ours(packed, "--adapter", packed / "adapter"), theirs(model, tokenizer))

# Rows of whole blocks: bitsandbytes 0.50.2 expands others wrongly on the CPU.
torch.manual_seed(0)
config = {**json.loads((here / "tiny-llama/config.json").read_text()), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
wide = LlamaForCausalLM(LlamaConfig(**config)).float()
for name, p in wide.named_parameters():
    p.data.normal_(1.0 if "norm" in name else 0.0, 0.12)
wide.save_pretrained(folder / "wide")
tokenizer.save_pretrained(folder / "wide")
bnb = folder / "bnb"
run("quantize", "--model", folder / "wide", "--method", "nf", "--bits", 4, "--format", "bitsandbytes", "--output", bnb)
model = AutoModelForCausalLM.from_pretrained(bnb, device_map="cpu", dtype=torch.float32)
assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
# Before the first product, which lays the weights out anew.
for path, module in model.named_modules():
    if hasattr(getattr(module, "weight", None), "quant_state"):
        dense = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        wide.get_submodule(path).weight.data = dense
compare("bitsandbytes' weights", ours(bnb), theirs(wide.eval(), tokenizer))
# Its products on the CPU round activations.
compare("bitsandbytes", ours(bnb), theirs(model, tokenizer), 2e-2)
print("all well")
