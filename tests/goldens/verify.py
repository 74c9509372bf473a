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
for adapter in sys.argv[3:]:
    plain = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    worst = max(worst, compare(adapter, plain, adapter))
sys.exit(worst > 1e-3)
