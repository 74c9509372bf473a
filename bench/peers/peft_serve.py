#!/usr/bin/env python3
"""The requests of `lorimer bench serve` with PEFT: torch 2.15, transformers 5.23, peft 0.21.2, f32, greedy.

usage: peft_serve.py FOLDER_OF_SMOLLM2_GGUF single|mixed REQUESTS

`single` answers one request after the other with its adapter active; `mixed` answers all in one batch with `adapter_names`. All adapters are
loaded before the clock starts. Prints one JSON object.
"""
import json, resource, sys, time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder, mode, path = sys.argv[1:4]
asked = json.load(open(path))
requests = asked["requests"]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
model = PeftModel.from_pretrained(model, asked["adapters"][0], adapter_name="a0")
for i, adapter in enumerate(asked["adapters"][1:], 1):
    model.load_adapter(adapter, adapter_name=f"a{i}")
model.eval()


@torch.no_grad()
def answer(batch, **more):
    longest = max(len(r["prompt"]) for r in batch)
    pad = lambda r, value, own: [value] * (longest - len(r["prompt"])) + own
    ids = torch.tensor([pad(r, 0, r["prompt"]) for r in batch])
    mask = torch.tensor([pad(r, 0, [1] * len(r["prompt"])) for r in batch])
    most = max(r["output"] for r in batch)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0, **more)
    return out.shape[1] - longest


answer([dict(prompt=[1, 2, 3], output=2)])
start = time.perf_counter()
if mode == "mixed":
    answer(requests, adapter_names=[f"a{r['adapter']}" for r in requests])
else:
    for r in requests:
        model.set_adapter(f"a{r['adapter']}")
        answer([r])
seconds = time.perf_counter() - start
tokens = sum(r["output"] for r in requests)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"name": f"peft 0.21.2, {mode}", "seconds": seconds, "output_tokens_per_second": tokens / seconds,
                  "requests_per_second": len(requests) / seconds, "peak_bytes": peak}))
