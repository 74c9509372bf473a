#!/usr/bin/env python3
"""The other direction: peft loads adapters that Lorimer trained; logits and losses are compared.

usage: verify.py LORIMER_BINARY [FOLDER_OF_SMOLLM2_GGUF ADAPTER...]    (needs torch, transformers, peft; see make.py for versions)

With the folder of SmolLM2-135M-Instruct.Q4_1.gguf, adapters that Lorimer trained on it are compared too.
"""
import json, pathlib, subprocess, sys, tempfile

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

here = pathlib.Path(__file__).parent
base = here / "tiny-llama"
work = pathlib.Path(tempfile.mkdtemp())
data = work / "data.jsonl"
data.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"{q} {i}"}, {"role": "assistant", "content": a}]}) + "\n"
                        for i in range(8) for q, a in (("up", "yes"), ("down", "no"))))
cases = {
    "lora": [], "rslora": ["--rslora"], "dora": ["--method", "dora"], "pissa": ["--init", "pissa"], "olora": ["--init", "olora"],
    "pissa-rslora": ["--init", "pissa", "--rslora"],
    "rank_pattern": ["--set", 'rank_pattern={"q_proj": 3}', "--set", 'alpha_pattern={"up_proj": 5}'],
    "modules_to_save": ["--modules-to-save", "lm_head,model.norm", "--target-modules", "q_proj,v_proj"],
    "layers": ["--layers", "1", "--target-modules", "q_proj,down_proj"],
    "layers-of-pattern": ["--layers", "1", "--target-modules", r".*(?<!o)_proj"],
    "head": ["--target-modules", "lm_head,q_proj"],
    "bone": ["--method", "bone", "--rank", "6"],
    "bone-bat": ["--method", "bone", "--rank", "8", "--set", "variant=bat"],
    "bone-mini": ["--method", "bone", "--rank", "8", "--set", "variant=mini", "--set", "mini_r=4"],
    "randlora": ["--method", "randlora", "--rank", "6", "--alpha", "12"],
    "randlora-full": ["--method", "randlora", "--rank", "8", "--alpha", "12", "--set", "save_projection=true"],
    "randlora-sparse": ["--method", "randlora", "--rank", "8", "--alpha", "12", "--set", "variant=sparse"],
    "eva": ["--method", "eva", "--rank", "3"],
    "shira": ["--method", "shira", "--rank", "4"],
    "randlora-exclude": ["--method", "randlora", "--rank", "6", "--alpha", "12", "--set", 'exclude_modules=["k_proj"]'],
    "shira-density": ["--method", "shira", "--set", "density=0.05"],
    "shira-exclude": ["--method", "shira", "--rank", "2", "--layers", "0", "--set", 'exclude_modules=["k_proj"]'],
    "shira-struct": ["--method", "shira", "--rank", "3", "--set", "mask_type=struct"],
    "lora-pro": ["--method", "lora-pro", "--rank", "4", "--set", "variant=full", "--lr", "1e-3"],
    "allora": ["--method", "allora", "--rank", "4"],
    "dylora": ["--method", "dylora", "--rank", "4"],
    "sora": ["--method", "sora", "--rank", "6", "--set", "xi=0.05"],
    "diffora": ["--method", "diffora", "--rank", "3", "--set", "search_steps=4"],
    "ba-lora": ["--method", "ba-lora", "--rank", "4"],
    "vera": ["--method", "vera", "--rank", "12"],
    "vera-exclude": ["--method", "vera", "--rank", "12", "--set", 'exclude_modules=["k_proj"]'],
    "vera-full": ["--method", "vera", "--rank", "9", "--set", "save_projection=true"],
}
# Methods that PEFT does not have, as the LoRA that `convert` writes.
exported = {
    "lora-xs": ["--rank", "8"], "lora-sb": ["--rank", "8", "--set", "samples=8"], "loldu": ["--rank", "12"],
    "nlora": ["--rank", "4", "--lr", "3e-3"], "tlora": [], "hydra": ["--rank", "8"], "full": ["--lr", "1e-3"], "galore": ["--rank", "8", "--lr", "1e-3"],
}
def compare(name, plain, adapter):
    """Largest difference of the golden answers' log p, in PEFT and as Lorimer wrote it down."""
    model = PeftModel.from_pretrained(plain, adapter).eval()
    difference = 0.0
    for golden in json.loads((pathlib.Path(adapter) / "lorimer.json").read_text())["golden"]:
        ids, first = torch.tensor([golden["tokens"]]), golden["first"]
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        own = logp[first - 1:-1].gather(1, ids[0, first:, None])[:, 0]
        difference = max(difference, (own - torch.tensor(golden["log_probabilities"])).abs().max().item())
    print(f"{name:16} log p differs by {difference:.2e}")
    return difference


worst = 0.0
for name, flags in cases.items():
    out = work / name
    subprocess.run([sys.argv[1], "train", "-q", "--model", base, "--data", data, "--output", out, "--max-steps", "12", "--lr", "1e-2", *flags],
                   check=True, stdout=subprocess.DEVNULL)
    worst = max(worst, compare(name, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out))
for name, flags in exported.items():
    out, lora = work / name, work / f"{name}-as-lora"
    flags = ["--method", name, "--max-steps", "12", *([] if "--lr" in flags else ["--lr", "1e-2"]), *flags]
    subprocess.run([sys.argv[1], "train", "-q", "--model", base, "--data", data, "--output", out, *flags], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.argv[1], "convert", "-q", out, "--to", "lora", "--model", base, "--output", lora], check=True, stdout=subprocess.DEVNULL)
    # An export that is not exact has no golden answers of its own; the tiny model's matrices have no more than its default rank.
    manifest, before = json.loads((lora / "lorimer.json").read_text()), json.loads((out / "lorimer.json").read_text())
    manifest["golden"] = before["golden"]
    (lora / "lorimer.json").write_text(json.dumps(manifest))
    worst = max(worst, compare(lora.name, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora))
# A pruned model opens in transformers and its adapter in PEFT; recovered, that gives the same on the whole base with the dropped units zeroed.
def lorimer(*flags):
    subprocess.run([sys.argv[1], *flags], check=True, stdout=subprocess.DEVNULL)


small, own, recovered = (work / name for name in ("pruned", "on-pruned", "recovered"))
lorimer("prune", "-q", "--model", base, "--method", "rand", "--ratio", "0.5", "--keep-first", "0", "--keep-last", "0", "--output", small)
lorimer("train", "-q", "--model", small, "--data", data, "--output", own, "--max-steps", "12", "--lr", "1e-2")
lorimer("recover", "-q", "--adapter", own, "--pruning", small / "pruning.json", "--output", recovered)
worst = max(worst, compare(small.name, AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32), own))
whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
with torch.no_grad():
    for layer, kept in zip(whole.model.layers, json.loads((small / "pruning.json").read_text())["kept"]):
        d = whole.config.head_dim
        heads = torch.tensor([i not in kept["heads"] for i in range(whole.config.num_attention_heads)]).repeat_interleave(d)
        channels = torch.tensor([i not in kept["channels"] for i in range(whole.config.intermediate_size)])
        layer.self_attn.o_proj.weight[:, heads] = 0
        layer.mlp.down_proj.weight[:, channels] = 0
manifest = json.loads((recovered / "lorimer.json").read_text())
manifest["golden"] = json.loads((own / "lorimer.json").read_text())["golden"]
(recovered / "lorimer.json").write_text(json.dumps(manifest))
worst = max(worst, compare(recovered.name, whole, recovered))
# What LoRAPrune writes sliced opens in transformers where all layers are alike.
masked, sliced = work / "loraprune", work / "loraprune-sliced"
lorimer("train", "-q", "--model", base, "--data", data, "--output", masked, "--max-steps", "20", "--lr", "1e-2", "--method", "loraprune",
        "--set", "prune_every=2", "--set", "protect=0")
lorimer("merge", "-q", "--model", base, "--adapter", masked, "--slice", "--output", sliced)
plain = AutoModelForCausalLM.from_pretrained(sliced, dtype=torch.float32).eval()
for golden in json.loads((masked / "lorimer.json").read_text())["golden"]:
    ids, first = torch.tensor([golden["tokens"]]), golden["first"]
    with torch.no_grad():
        logp = plain(ids).logits[0].log_softmax(-1)
    difference = (logp[first - 1:-1].gather(1, ids[0, first:, None])[:, 0] - torch.tensor(golden["log_probabilities"])).abs().max().item()
    worst = max(worst, difference)
    print(f"{sliced.name:16} log p differs by {difference:.2e}")
for adapter in sys.argv[3:]:
    plain = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    worst = max(worst, compare(adapter, plain, adapter))
sys.exit(worst > 1e-3)
