#!/bin/sh
# Seconds of a training step beside LoRA's, at the settings of bench/compare.yaml, in two rounds over all methods. LoRA is measured first
# and last in each. EVA's step is LoRA's and LoRA-SB's that of LoRA-XS: both differ in their start only.
# usage: bench/step_times.sh LORIMER [MODEL]
set -e
lorimer=$1 model=${2:-smollm2-135m}
for round in 1 2; do
  while read -r name set; do
    # shellcheck disable=SC2086
    "$lorimer" bench train --model "$model" --work data/sentiment-movies.train.jsonl --steps 7 --rounds 1 --json -q $set |
      tr -d '\n' | sed "s/^/$name /"
    echo
  done <<LIST
lora --method lora --rank 8
dora --method dora --rank 8
bone --method bone --rank 16
bone-bat --method bone --rank 16 --set variant=bat
randlora --method randlora --rank 32
lora-xs --method lora-xs --rank 64
loldu --method loldu --rank 64
nlora --method nlora --rank 8
tlora --method tlora --rank 2
hydra --method hydra --rank 8 --target-modules all-linear
vera --method vera
shira --method shira --set density=0.01
full --method full
lora --method lora --rank 8
LIST
done | python3 -c '
import collections, json, sys
found = collections.defaultdict(list)
for line in sys.stdin:
    name, row = line.split(" ", 1)
    found[name].append(json.loads(row)["rows"][0])
# The first step of a process also touches its memory for the first time.
median = lambda values: sorted(values)[len(values) // 2]
seconds = {name: sum(median(r["step_seconds"][1:]) for r in rows) / len(rows) for name, rows in found.items()}
base = seconds["lora"]
print("| method | seconds a step | of LoRA | peak memory |\n|---|---|---|---|")
for name, rows in found.items():
    peak = max(r["peak_bytes"] for r in rows) / 1e9
    print(f"| {name} | {seconds[name]:.2f} | {seconds[name] / base:.2f}× | {peak:.2f} GB |")
'
