#!/bin/sh
# One DyLoRA run against five LoRA runs: total seconds of training, and accuracy at every rank on the 815 rows that none of them saw (the
# last 500 of the training file and the validation file). usage: bench/dylora.sh LORIMER MODEL FOLDER
set -e
data=data/sentiment-tweets
head -n 970 $data.train.jsonl > "$3/train.jsonl"
{ tail -n 500 $data.train.jsonl; cat $data.valid.jsonl; } > "$3/unseen.jsonl"
common="--model $2 --data $3/train.jsonl --warmup-steps 5 --lr 2e-3 --json -q --overwrite"
# A fifth as many steps again, the smaller ranks more often.
"$1" train $common --max-steps 120 --method dylora --rank 16 --set scaling=fixed --set "ranks=[1,2,4,8,16]" --set distribution=geometric --set ratio=0.75 \
  --output "$3/dylora" > "$3/dylora.json"
for rank in 1 2 4 8 16; do
  "$1" train $common --max-steps 100 --method lora --rank $rank --output "$3/lora-$rank" > "$3/lora-$rank.json"
done
measure="--model $2 --data $3/unseen.jsonl --json -q"
"$1" eval $measure --adapter "$3/dylora" --rank 1,2,4,8,16 > "$3/dylora-eval.json"
for rank in 1 2 4 8 16; do
  "$1" eval $measure --adapter "$3/lora-$rank" > "$3/lora-$rank-eval.json"
done
# What is left of the LoRA of rank 16 when it is cut.
"$1" eval $measure --adapter "$3/lora-16" --rank 1,4 > "$3/lora-16-cut.json"
python3 - "$3" <<'PY'
import json, sys
read = lambda name: json.load(open(f"{sys.argv[1]}/{name}.json"))
ranks = [1, 2, 4, 8, 16]
one, all_ = read("dylora")["seconds"], sum(read(f"lora-{r}")["seconds"] for r in ranks)
print(f"training: {one:.0f} s against {all_:.0f} s for five LoRAs ({one / all_:.3f})")
curve, cut = ({row["rank"]: row for row in read(name)["ranks"]} for name in ("dylora-eval", "lora-16-cut"))
print(f"{'rank':>5}{'dylora':>18}{'lora':>18}{'lora 16 cut':>18}")
show = lambda row: f"{100 * row['choice_accuracy']:.1f} % ({row['loss']:.4f})" if row else "-"
for r in ranks:
    print(f"{r:>5}{show(curve[r]):>18}{show(read(f'lora-{r}-eval')):>18}{show(cut.get(r)):>18}")
PY
