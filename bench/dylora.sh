#!/bin/sh
# One DyLoRA run against five LoRA runs: total seconds of training, and accuracy at every rank. usage: bench/dylora.sh LORIMER MODEL FOLDER
set -e
steps=100 data=data/sentiment-movies
common="--model $2 --data $data.train.jsonl --max-steps $steps --warmup-steps 5 --json -q --overwrite"
# Half as many steps again, the smaller ranks more often.
"$1" train $common --max-steps 150 --method dylora --rank 16 --lr 2e-3 --set "ranks=[1,2,4,8,16]" --set distribution=geometric --set ratio=0.75 \
  --output "$3/dylora" > "$3/dylora.json"
for rank in 1 2 4 8 16; do
  "$1" train $common --method lora --rank $rank --lr 2e-3 --output "$3/lora-$rank" > "$3/lora-$rank.json"
done
"$1" eval --model "$2" --data $data.valid.jsonl --limit 400 --adapter "$3/dylora" --rank 1,2,4,8,16 --json -q > "$3/dylora-eval.json"
for rank in 1 2 4 8 16; do
  "$1" eval --model "$2" --data $data.valid.jsonl --limit 400 --adapter "$3/lora-$rank" --json -q > "$3/lora-$rank-eval.json"
done
# What is left of the LoRA of rank 16 when it is cut.
"$1" eval --model "$2" --data $data.valid.jsonl --limit 400 --adapter "$3/lora-16" --rank 1,2,4,8,16 --json -q > "$3/lora-16-cut.json"
python3 - "$3" <<'PY'
import json, sys
read = lambda name: json.load(open(f"{sys.argv[1]}/{name}.json"))
ranks = [1, 2, 4, 8, 16]
one, all_ = read("dylora")["seconds"], sum(read(f"lora-{r}")["seconds"] for r in ranks)
print(f"training: {one:.0f} s against {all_:.0f} s for five LoRAs ({one / all_:.2f})")
curve, cut = ({row["rank"]: row for row in read(name)["ranks"]} for name in ("dylora-eval", "lora-16-cut"))
print(f"{'rank':>5}{'dylora':>18}{'lora':>18}{'lora 16 cut':>18}")
show = lambda row: f"{100 * row['choice_accuracy']:.1f} % ({row['loss']:.4f})"
for r in ranks:
    print(f"{r:>5}{show(curve[r]):>18}{show(read(f'lora-{r}-eval')):>18}{show(cut[r]):>18}")
PY
