#!/bin/sh
# LoRAM at 50 %: an adapter trained on a pruned model, unaligned and aligned, and run on the whole base; peak memory by ratio.
# usage: bench/loram.sh LORIMER MODEL FOLDER [SEED...]    (STEPS=80, ALIGN=60, KEEP="--keep-first 4 --keep-last 2"; what is there is not computed again)
set -e
lorimer=$1 model=$2 folder=$3
shift 3
seeds=${*:-0 1 2} steps=${STEPS:-80} align=${ALIGN:-60} keep=${KEEP:---keep-first 4 --keep-last 2}
mkdir -p "$folder"
data=data/wordnet-kind
once() {
  out=$1
  shift
  [ -s "$out" ] || { "$@" > "$out.part" && mv "$out.part" "$out"; }
}
lora() {
  once "$folder/$1-train.json" "$lorimer" train --model "$2" --data $data.train.jsonl --method lora --rank 8 --lr 1e-3 --seed "$3" --max-steps "$steps" \
    --warmup-steps 5 --overwrite --json -q --output "$folder/$1"
}
evaluate() {
  result=$1
  shift
  once "$folder/$result.json" "$lorimer" eval --data $data.valid.jsonl --json -q "$@"
}
evaluate untuned --model "$model"
for seed in $seeds; do
  lora "whole-$seed" "$model" "$seed"
  evaluate "whole-$seed" --model "$model" --adapter "$folder/whole-$seed"
  small=$folder/pruned-$seed
  once "$small-made.json" "$lorimer" prune --model "$model" --method rand $keep --ratio 0.5 --seed "$seed" --output "$small" --json -q
  # Alignment: all parameters of the pruned model on whole texts of another task, definitions.
  once "$small-full.json" "$lorimer" train --model "$small" --data data/wordnet-define.train.jsonl --train-on-prompt --method full --lr 1e-4 --seed "$seed" \
    --max-steps "$align" --warmup-steps 5 --overwrite --json -q --output "$small-full"
  once "$small-merged.json" "$lorimer" merge --model "$small" --adapter "$small-full" --output "$folder/aligned-$seed" --json -q
  for kind in pruned aligned; do
    name=$kind-lora-$seed
    lora "$name" "$folder/$kind-$seed" "$seed"
    evaluate "$name-small" --model "$folder/$kind-$seed" --adapter "$folder/$name"
    once "$folder/$name-made.json" "$lorimer" recover --adapter "$folder/$name" --pruning "$small/pruning.json" --output "$folder/$name-recovered" --json -q
    evaluate "$name" --model "$model" --adapter "$folder/$name-recovered"
  done
  rm -rf "$small-full"
done
for ratio in 0 0.25 0.5 0.75; do
  once "$folder/at-$ratio-made.json" "$lorimer" prune --model "$model" --method rand $keep --ratio $ratio --output "$folder/at-$ratio" --json -q
  for dtype in f32 nf4; do
    once "$folder/at-$ratio-$dtype.json" "$lorimer" train --model "$folder/at-$ratio" --dtype $dtype --data $data.train.jsonl --method lora --rank 8 \
      --max-steps 5 --overwrite --json -q --output "$folder/at-$ratio-$dtype"
  done
done
python3 - "$folder" $seeds <<'PY'
import json, statistics as st, sys
folder, seeds = sys.argv[1], sys.argv[2:]
read = lambda name: json.load(open(f"{folder}/{name}.json"))
out = {"seeds": seeds, "loss": {}, "peak_bytes": {}}
print(f"{'':<46}{'held-out loss, mean (spread)':>30}{'exact match':>14}")
rows = [("base, untuned", ["untuned"]), ("base, LoRA trained on it", [f"whole-{s}" for s in seeds])]
for kind in ("pruned", "aligned"):
    rows.append((f"{kind} model, LoRA trained on it", [f"{kind}-lora-{s}-small" for s in seeds]))
    rows.append((f"base, LoRA recovered from the {kind} model", [f"{kind}-lora-{s}" for s in seeds]))
for what, names in rows:
    losses = [read(n)["loss"] for n in names]
    out["loss"][what] = losses
    exact = 100 * st.mean(read(n)["exact_match"] for n in names)
    print(f"{what:<46}{st.mean(losses):>21.4f} ({max(losses) - min(losses):.4f}){exact:>12.1f} %")
print(f"{'ratio':<8}{'parameters':>14}{'peak, f32':>14}{'peak, nf4':>14}")
for ratio in ("0", "0.25", "0.5", "0.75"):
    peaks = {dtype: read(f"at-{ratio}-{dtype}")["peak_bytes"] for dtype in ("f32", "nf4")}
    out["peak_bytes"][ratio] = peaks
    parameters = read(f"at-{ratio}-made")["parameters"]
    print(f"{ratio:<8}{parameters:>14}" + "".join(f"{peaks[d] / 1e6:>11.0f} MB" for d in ("f32", "nf4")))
json.dump(out, open(f"{folder}/results.json", "w"), indent=1)
PY
