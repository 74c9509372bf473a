#!/usr/bin/env python3
"""The work of `lorimer bench train` with PEFT: torch 2.15, transformers 5.23, peft 0.21.2, f32, LoRA r 8 on all seven projections.

usage: peft_train.py FOLDER_OF_SMOLLM2_GGUF WORK STEPS BATCH

WORK is `dense` (4 rows of 256 random tokens, all supervised) or a JSONL file of chat rows (only answers supervised, rows padded to the
longest of their batch, in the file's order). Prints one JSON object; the first step is not counted in the speed.
"""
import json, resource, sys, time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, work, steps, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
gguf = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
model.train()


def encode(line):
    messages = json.loads(line)["messages"]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    learnt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return whole, [-100] * learnt + whole[learnt:]


if work == "dense":
    size = 4
    rows = [(ids, ids) for ids in torch.randint(3, 49152, (size * steps, 256)).tolist()]
else:
    rows = [encode(line) for line in open(work).read().splitlines()[:size * steps]]


def pad(lists, value):
    longest = max(map(len, lists))
    return torch.tensor([l + [value] * (longest - len(l)) for l in lists])


rate = 5e-4
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
losses, tokens, examples, clock = [], 0, 0, 0.0
for step in range(steps):
    batch = rows[step * size:(step + 1) * size]
    if not batch:
        break
    start = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = rate * (1 - step / steps)
    mask = pad([[1] * len(ids) for ids, _ in batch], 0)
    loss = model(pad([ids for ids, _ in batch], 0), attention_mask=mask, labels=pad([l for _, l in batch], -100)).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
    if step > 0:
        clock += time.perf_counter() - start
        tokens += sum(len(ids) for ids, _ in batch)
        examples += len(batch)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"name": "peft 0.21.2", "examples_per_second": examples / clock, "tokens_per_second": tokens / clock,
                  "peak_bytes": peak, "losses": losses}))
