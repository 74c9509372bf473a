#!/usr/bin/env python3
"""What PEFT reaches on the same rows, steps and settings as `lorimer train --no-shuffle` (three classes).

usage: peft_sentiment.py FOLDER_OF_SMOLLM2_GGUF [STEPS [RATE]]     (torch 2.15, transformers 5.23, peft 0.21.2)

The same figures from Lorimer:
  lorimer train --data data/sentiment-movies.train.jsonl --eval-data data/sentiment-movies.valid.jsonl \\
      --no-shuffle --max-steps 60 --lr 5e-4 --output runs/three
"""
import json, pathlib, sys, time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, steps, rate = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60, float(sys.argv[3]) if len(sys.argv) > 3 else 5e-4
data = pathlib.Path(__file__).parents[2] / "data"
gguf = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
choices = ["negative", "neutral", "positive"]
choice_ids = [tokenizer(c, add_special_tokens=False).input_ids[0] for c in choices]


def rows(part):
    for line in open(data / f"sentiment-movies.{part}.jsonl"):
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        yield tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer(whole, add_special_tokens=False).input_ids, messages[1]["content"]


def pad(lists, value):
    longest = max(map(len, lists))
    return torch.tensor([l + [value] * (longest - len(l)) for l in lists])


@torch.no_grad()
def accuracy():
    model.eval()
    right = 0
    valid = list(rows("valid"))
    for prompt, _, label in valid:
        logits = model(torch.tensor([prompt])).logits[0, -1]
        right += choices[int(logits[choice_ids].argmax())] == label
    return right / len(valid)


before = accuracy()
train = list(rows("train"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
model.train()
clock, losses = time.time(), []
for step in range(steps):
    batch = train[step * 8:step * 8 + 8]
    ids = pad([w for _, w, _ in batch], tokenizer.pad_token_id)
    labels = pad([[-100] * len(p) + w[len(p):] for p, w, _ in batch], -100)
    for group in optimizer.param_groups:
        group["lr"] = rate * (1 - step / steps)
    loss = model(ids, attention_mask=(pad([[1] * len(w) for _, w, _ in batch], 0)), labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
seconds = time.time() - clock
print(json.dumps({"before": before, "after": accuracy(), "examples_per_second": steps * 8 / seconds, "losses": losses}))
