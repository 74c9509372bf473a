#!/bin/sh
# LQ-LoRA's card: a base of 2.75 or 3 bits whose LoRA begins as its repair, beside plain NormalFloat. Held-out loss before tuning and after as many steps from each
# start with several seeds, and the peak memory of training. What is there is not done again.
# usage: bench/lq_lora.sh LORIMER MODEL FOLDER [SEED…]; bench/lq_lora.sh table FOLDER
set -e
if [ "$1" = table ]; then
  python3 - "$2" <<'PY'
import glob, json, math, statistics, sys
folder, student = sys.argv[1], {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
read = lambda path: json.load(open(path))
bases, runs = {}, {}
for path in sorted(glob.glob(f"{folder}/*.base.json")):
    name = path.split("/")[-1][: -len(".base.json")]
    made = read(f"{folder}/{name}.quantize.json") if name != "f32" else {"bits": 32.0, "error": 0.0, "bound": None}
    bases[name] = {"bits": made["bits"], "error": made["error"], "bound": made["bound"], "loss": read(path)["loss"]}
for path in sorted(glob.glob(f"{folder}/*.train.json")):
    name, seed = path.split("/")[-1][: -len(".train.json")].rsplit("-s", 1)
    try:
        runs.setdefault(name, {})[seed] = {"loss": read(path.replace(".train", ".tuned"))["loss"], "peak": read(path)["peak_bytes"]}
    except OSError:
        continue
json.dump({"bases": bases, "runs": runs}, open(f"{folder}/results.json", "w"), indent=1)
print("| base and start | bits | squared error | held-out loss before | after, mean ± half an interval of 95 % | seeds | peak, MB |\n|---|---|---|---|---|---|---|")
for name, base in bases.items():
    after = [run["loss"] for run in runs.get(name, {}).values()]
    half = student.get(len(after) - 1, float("nan")) * statistics.stdev(after) / math.sqrt(len(after)) if len(after) > 1 else float("nan")
    shown = f"{statistics.mean(after):.4f} ± {half:.4f}" if after else ""
    peak = f"{max(run['peak'] for run in runs[name].values()) / 1e6:.0f}" if after else ""
    print(f"| {name} | {base['bits']:.3f} | {base['error']:.1f} | {base['loss']:.4f} | {shown} | {len(after)} | {peak} |")
print("\n| against | loss after, difference by seed |\n|---|---|")
for name, other in [("lq-2.75", "nf4"), ("lq-3", "nf4"), ("lq-3", "nf3"), ("lq-2.75", "nf3"), ("lq-2.75-fisher", "lq-2.75"), ("lq-2.5-fisher", "lq-2.5")]:
    both = sorted(set(runs.get(name, {})) & set(runs.get(other, {})))
    if both:
        print(f"| {name} and {other} | " + ", ".join(f"{runs[name][s]['loss'] - runs[other][s]['loss']:+.4f}" for s in both) + " |")
PY
  exit
fi
lorimer=$1 model=$2 folder=$3
shift 3
mkdir -p "$folder"
task=${TASK:-movies} steps=${STEPS:-60} rank=64 alpha=16 lr=${LR:-5e-4}
head -300 "data/sentiment-$task.train.jsonl" > "$folder/rows.jsonl"
head -120 "data/sentiment-$task.valid.jsonl" > "$folder/valid.jsonl"
sed -n 301,364p "data/sentiment-$task.train.jsonl" > "$folder/fisher.jsonl"
wanted() { # ONLY="nf4 lq-2.75": only these bases
  case " ${ONLY:-$name} " in *" $name "*) ;; *) return 1 ;; esac
}
# base NAME FLAGS…: a base, and the held-out loss with its start.
base() {
  name=$1
  shift
  wanted || return 0
  [ -s "$folder/$name.quantize.json" ] ||
    { "$lorimer" quantize --model "$model" --output "$folder/$name" --json "$@" > "$folder/$name.tmp" && mv "$folder/$name.tmp" "$folder/$name.quantize.json"; }
  [ -s "$folder/$name.base.json" ] && return
  start=""
  [ -d "$folder/$name/adapter" ] && start="--adapter $folder/$name/adapter"
  "$lorimer" eval --model "$folder/$name" --dtype stored $start --data "$folder/valid.jsonl" --json -q > "$folder/$name.tmp"
  mv "$folder/$name.tmp" "$folder/$name.base.json"
}
# tune NAME MODEL SEED FLAGS…: as many steps from a start.
tune() {
  name=$1
  wanted || return 0
  name=$1-s$3 from=$2 seed=$3
  shift 3
  [ -s "$folder/$name.tuned.json" ] && return
  "$lorimer" train --model "$from" --data "$folder/rows.jsonl" --max-steps "$steps" --batch-size 8 --lr "$lr" --seed "$seed" --warmup-steps 3 --overwrite --json -q \
    --output "$folder/$name.adapter" "$@" > "$folder/$name.train.json"
  dtype=stored
  case $name in f32-*) dtype=f32 ;; esac
  "$lorimer" eval --model "$from" --dtype $dtype --adapter "$folder/$name.adapter" --data "$folder/valid.jsonl" --json -q > "$folder/$name.tmp"
  mv "$folder/$name.tmp" "$folder/$name.tuned.json"
  rm -r "$folder/$name.adapter"
}
[ -s "$folder/f32.base.json" ] || "$lorimer" eval --model "$model" --data "$folder/valid.jsonl" --json -q > "$folder/f32.base.json"
base nf4 --method nf --bits 4
base nf3 --method nf --bits 3
base lq-2.75 --method lq-lora --bits 2.75 --rank $rank --alpha $alpha
base lq-3 --method lq-lora --bits 3 --rank $rank --alpha $alpha
for seed in "$@"; do
  zero="--method lora --rank $rank --alpha $alpha"
  tune nf4 "$folder/nf4" "$seed" --dtype stored $zero
  tune lq-2.75 "$folder/lq-2.75" "$seed" --dtype stored --adapter "$folder/lq-2.75/adapter"
  tune lq-3 "$folder/lq-3" "$seed" --dtype stored --adapter "$folder/lq-3/adapter"
  tune nf3 "$folder/nf3" "$seed" --dtype stored $zero
done
base lq-2.5 --method lq-lora --bits 2.5 --rank $rank --alpha $alpha
base lq-2.5-fisher --method lq-lora --bits 2.5 --rank $rank --alpha $alpha --fisher "$folder/fisher.jsonl" --samples 64
for seed in "$@"; do
  tune f32 "$model" "$seed" --method lora --rank $rank --alpha $alpha
done
