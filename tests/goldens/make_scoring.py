#!/usr/bin/env python3
"""Makes scoring.json beside it: log p of the tokens of some texts under the tiny base, as transformers 5.23 and torch 2.15 compute them. They
are what lm-evaluation-harness asks a server for (`local-completions`: echo, logprobs, max_tokens 0 or 1).

usage: make_scoring.py
"""
import json, pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

here = pathlib.Path(__file__).parent
model = AutoModelForCausalLM.from_pretrained(here / "tiny-llama", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(here / "tiny-llama")

# Contexts with continuations, letters of several bytes among them; one longer than a step of the engine takes.
pairs = [("The capital of Norway is", " Oslo"), ("The capital of Norway is", " Bergen"), ("naïve café,", " 東京 🙂"), ("x", "y"),
         ("The tide comes twice a day. " * 15, "It is high at noon.")]
rows = []
for context, continuation in pairs:
    given = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = given + tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = [p[i - 1, ids[i]].item() for i in range(1, len(ids))]
    rows.append({
        "context": context, "continuation": continuation, "tokens": ids, "context_tokens": len(given),
        "log_probabilities": [round(x, 6) for x in own],
        "sum": round(sum(own[len(given) - 1:]), 5),
        "greedy": all(p[i - 1].argmax().item() == ids[i] for i in range(len(given), len(ids))),
    })
# What the model itself goes on with is greedy.
ids = tokenizer("up 3", add_special_tokens=False)["input_ids"]
with torch.no_grad():
    whole = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0].tolist()
    p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
own = [p[i - 1, whole[i]].item() for i in range(1, len(whole))]
rows.append({"context": "up 3", "continuation": None, "tokens": whole, "context_tokens": len(ids),
             "log_probabilities": [round(x, 6) for x in own], "sum": round(sum(own[len(ids) - 1:]), 5), "greedy": True})
(here / "scoring.json").write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
