#!/bin/sh
# LoRAPrune at 50 %: held-out loss by how units are scored, at the same steps and data; tuning after pruning at once; speed of decoding.
# usage: bench/loraprune.sh LORIMER MODEL FOLDER [SEED...]    (STEPS=100 by default; what is there is not computed again)
set -e
lorimer=$1 model=$2 folder=$3
shift 3
seeds=${*:-0 1 2} steps=${STEPS:-100}
mkdir -p "$folder"
data=data/wordnet-kind
# Once: a result that is there stays.
once() {
  out=$1
  shift
  [ -s "$out" ] || { "$@" > "$out.part" && mv "$out.part" "$out"; }
}
for seed in $seeds; do
  for score in lora magnitude random; do
    name=$score-$seed
    once "$folder/$name-train.json" "$lorimer" train --model "$model" --data $data.train.jsonl --method loraprune --rank 8 --lr 1e-3 --seed "$seed" \
      --max-steps "$steps" --warmup-steps 5 --set prune_every=5 --set "score=$score" --set protect=0.1 --overwrite --json -q --output "$folder/$name"
    once "$folder/$name.json" "$lorimer" eval --model "$model" --adapter "$folder/$name" --data $data.valid.jsonl --json -q
  done
  # At once: a tenth of the steps to score, all units gone in one step, the rest to repair.
  name=oneshot-$seed
  once "$folder/$name-train.json" "$lorimer" train --model "$model" --data $data.train.jsonl --method loraprune --rank 8 --lr 1e-3 --seed "$seed" \
    --max-steps "$steps" --warmup-steps 5 --set prune_every=1000000 --set warmup=0.05 --set cooldown=0.9 --set protect=0.1 --overwrite --json -q \
    --output "$folder/$name"
  once "$folder/$name.json" "$lorimer" eval --model "$model" --adapter "$folder/$name" --data $data.valid.jsonl --json -q
  name=plain-$seed
  once "$folder/$name-train.json" "$lorimer" train --model "$model" --data $data.train.jsonl --method lora --rank 8 --lr 1e-3 --seed "$seed" \
    --max-steps "$steps" --warmup-steps 5 --overwrite --json -q --output "$folder/$name"
  once "$folder/$name.json" "$lorimer" eval --model "$model" --adapter "$folder/$name" --data $data.valid.jsonl --json -q
done
first=${seeds%% *}
# Decoding, the whole and the sliced model in turns: every layer pruned (protect=0) and the first tenth and the last one whole.
once "$folder/all-train.json" "$lorimer" train --model "$model" --data $data.train.jsonl --method loraprune --rank 8 --lr 1e-3 --seed "$first" \
  --max-steps 20 --set prune_every=2 --set protect=0 --overwrite --json -q --output "$folder/all"
once "$folder/whole.json" "$lorimer" merge --model "$model" --adapter "$folder/plain-$first" --output "$folder/whole" --json -q
for name in "lora-$first" all; do
  once "$folder/$name-sliced.json" "$lorimer" merge --model "$model" --adapter "$folder/$name" --slice --output "$folder/$name-sliced" --json -q
done
for turn in 1 2 3 4 5; do
  for name in whole "lora-$first-sliced" all-sliced; do
    once "$folder/decode-$name-$turn.json" "$lorimer" bench serve --model "$folder/$name" --adapters 1 --requests 1 --input 16 --output 128 --rounds 1 --json -q
  done
done
python3 - "$folder" "$first" $seeds <<'PY'
import json, statistics as st, sys
folder, first, seeds = sys.argv[1], sys.argv[2], sys.argv[3:]
read = lambda name: json.load(open(f"{folder}/{name}.json"))
out = {"seeds": seeds, "loss": {}, "peak_bytes": {}, "seconds": {}}
print(f"{'score':<12}{'held-out loss, mean (spread)':>32}{'exact match':>14}{'seconds':>10}{'peak MB':>10}")
for name in ["lora", "magnitude", "random", "oneshot", "plain"]:
    losses = [read(f"{name}-{s}")["loss"] for s in seeds]
    exact = st.mean(read(f"{name}-{s}")["exact_match"] for s in seeds)
    runs = [read(f"{name}-{s}-train") for s in seeds]
    seconds, peak = st.mean(r["seconds"] for r in runs), max(r["peak_bytes"] for r in runs)
    out["loss"][name], out["seconds"][name], out["peak_bytes"][name] = losses, seconds, peak
    spread = max(losses) - min(losses)
    print(f"{name:<12}{st.mean(losses):>24.4f} ({spread:.4f}){100 * exact:>12.1f} %{seconds:>10.0f}{peak / 1e6:>10.0f}")
whole = None
out["decode"] = {}
for name in ["whole", f"lora-{first}-sliced", "all-sliced"]:
    rates = [read(f"decode-{name}-{turn}")["rows"][0]["output_tokens_per_second"] for turn in range(1, 6)]
    rate = st.median(rates)
    whole = whole or rate
    parameters = "" if name == "whole" else f", {read(name)['parameters'] / read(name)['whole_parameters']:.3f} of the parameters"
    out["decode"][name] = rates
    print(f"{name:<18}{rate:.1f} tokens/s (median of five, {min(rates):.1f} to {max(rates):.1f}), {rate / whole:.2f} times the whole one's{parameters}")
json.dump(out, open(f"{folder}/results.json", "w"), indent=1)
PY
