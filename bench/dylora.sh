#!/bin/sh
# One DyLoRA run against five LoRA runs: total seconds of training, and accuracy at each rank on the 815 rows that none of them saw (the
# last 500 of the training file and the validation file). `dylora` draws every rank up to 16 and scales by α/rank, as the paper does; `dylora-fixed`
# draws five ranks, the smaller ones more often, and scales by α/r at each. The first is also measured at ranks between. Runs that are there are not
# made again.
# usage: bench/dylora.sh LORIMER MODEL FOLDER
set -e
mkdir -p "$3"
data=data/sentiment-tweets
head -n 970 $data.train.jsonl > "$3/train.jsonl"
{ tail -n 500 $data.train.jsonl; cat $data.valid.jsonl; } > "$3/unseen.jsonl"
lorimer=$1 model=$2 folder=$3
train() { # name, flags
  name=$1
  shift
  [ -f "$folder/$name.json" ] && return
  "$lorimer" train --model "$model" --data "$folder/train.jsonl" --warmup-steps 5 --lr 2e-3 --json -q --overwrite --output "$folder/$name" "$@" > "$folder/new"
  mv "$folder/new" "$folder/$name.json"
}
measure() { # name, adapter, flags
  name=$1 adapter=$2
  shift 2
  [ -f "$folder/$name.json" ] && return
  "$lorimer" eval --model "$model" --data "$folder/unseen.jsonl" --json -q --adapter "$folder/$adapter" "$@" > "$folder/new"
  mv "$folder/new" "$folder/$name.json"
}
# A fifth as many steps again.
train dylora --max-steps 120 --method dylora --rank 16
train dylora-fixed --max-steps 120 --method dylora --rank 16 --set scaling=fixed --set "ranks=[1,2,4,8,16]" --set distribution=geometric --set ratio=0.75
for rank in 1 2 4 8 16; do
  train lora-$rank --max-steps 100 --method lora --rank $rank
done
measure dylora-eval dylora --rank 1,2,3,4,6,8,12,16
measure dylora-fixed-eval dylora-fixed --rank 1,2,4,8,16
for rank in 1 2 4 8 16; do
  measure lora-$rank-eval lora-$rank
done
# What is left of the LoRA of rank 16 when it is cut.
measure lora-16-cut lora-16 --rank 1,4
python3 - "$folder" <<'PY'
import json, sys
read = lambda name: json.load(open(f"{sys.argv[1]}/{name}.json"))
ranks = [1, 2, 4, 8, 16]
all_ = sum(read(f"lora-{r}")["seconds"] for r in ranks)
result = {"lora": {r: {k: read(f"lora-{r}-eval")[k] for k in ("choice_accuracy", "loss")} for r in ranks}, "lora_seconds": all_}
curves = {}
for name in ("dylora", "dylora-fixed"):
    one = read(name)["seconds"]
    print(f"{name}: {one:.0f} s of training against {all_:.0f} s for five LoRAs ({one / all_:.3f})")
    curves[name] = {row["rank"]: row for row in read(f"{name}-eval")["ranks"]}
curves["lora-16-cut"] = {row["rank"]: row for row in read("lora-16-cut")["ranks"]}
for name, curve in curves.items():
    result[name] = {r: {k: row[k] for k in ("choice_accuracy", "loss")} for r, row in curve.items()}
print("| rank | DyLoRA | DyLoRA, five ranks, α/r | LoRA of that rank | LoRA of rank 16, cut |\n|---|---|---|---|---|")
show = lambda row: f"{100 * row['choice_accuracy']:.1f} % ({row['loss']:.4f})" if row else "-"
for r in sorted(curves["dylora"]):
    cells = [curves["dylora"].get(r), curves["dylora-fixed"].get(r), result["lora"].get(r), curves["lora-16-cut"].get(r)]
    print(f"| {r} | " + " | ".join(map(show, cells)) + " |")
json.dump(result, open(f"{sys.argv[1]}/results.json", "w"), indent=1)
PY
