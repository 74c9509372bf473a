#!/bin/sh
# Sparse-GIN's card: does a graph layer on the attention map generalise better than a LoRA of as many parameters? Four kinds of texts, 40 rows of each, three
# passes, three seeds; the loss on the rows that were learnt and on rows that were not, after the last step. `rates` goes first, on other rows.
# usage: bench/sparse_gin.sh LORIMER MODEL FOLDER rates|runs|table
set -e
lorimer=$1 model=$2 folder=$3 part=$4
mkdir -p "$folder"
# run NAME TASK SEED STEPS ROWS FLAGS…: one training with its evaluations, unless they are there. ROWS are not learnt.
run() {
  name=$1-$2-s$3 task=$2 seed=$3 steps=$4 rows=$5
  shift 5
  [ -s "$folder/$name.json" ] && return
  head -40 "data/sentiment-$task.train.jsonl" > "$folder/$name.rows.jsonl"
  "$lorimer" train --model "$model" --data "$folder/$name.rows.jsonl" --max-steps "$steps" --seed "$seed" --warmup-steps 3 --overwrite --json -q \
    --output "$folder/$name.adapter" "$@" > "$folder/$name.train.json"
  evaluate="$lorimer eval --model $model --adapter $folder/$name.adapter --json -q"
  case $name in rate-*) ;; *) $evaluate --data "$folder/$name.rows.jsonl" > "$folder/$name.own.json" ;; esac
  $evaluate --data "$rows" --limit 80 > "$folder/$name.json"
  rm -r "$folder/$name.adapter" "$folder/$name.rows.jsonl"
}
lora="--method lora --rank 22 --alpha 22"
causal="--method sparse-gin"
reference="--method sparse-gin --set direction=reference"
case $part in
rates)
  sed -n 101,180p data/sentiment-tweets.train.jsonl > "$folder/held-out.jsonl"
  rate() { run "rate-$1-$2" tweets 9 15 "$folder/held-out.jsonl" $3 --lr "$2"; }
  for lr in 1e-3 2e-3 5e-4 5e-3; do
    rate causal $lr "$causal"
    rate reference $lr "$reference"
    rate lora $lr "$lora"
  done
  rate dropped 1e-3 "$causal --set first_token=drop"
  rate normed 1e-3 "$causal --set input=normed"
  rate both 1e-3 "$causal --set input=normed --set first_token=drop"
  ;;
runs)
  for task in tweets movies products news; do
    for seed in 0 1 2; do
      valid=data/sentiment-$task.valid.jsonl
      run lora "$task" $seed 15 "$valid" $lora --lr "${LORA_LR:-1e-3}"
      run causal "$task" $seed 15 "$valid" $causal --lr "${CAUSAL_LR:-1e-3}"
      run reference "$task" $seed 15 "$valid" $reference --lr "${REFERENCE_LR:-1e-3}"
    done
  done
  ;;
table)
  python3 - "$folder" <<'PY'
import glob, json, math, statistics, sys
folder, student = sys.argv[1], {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
read = lambda path: json.load(open(path))
rates = {p.split("rate-")[1].split("-tweets")[0]: read(p)["loss"] for p in sorted(glob.glob(f"{folder}/rate-*-s9.json"))}
runs = {}
for path in sorted(glob.glob(f"{folder}/*.own.json")):
    name, task, seed = path.split("/")[-1][: -len(".own.json")].rsplit("-", 2)
    try:
        valid, own, train = read(path.replace(".own", "")), read(path), read(path.replace(".own", ".train"))
    except (OSError, ValueError):
        continue
    runs[name, task, seed] = valid["loss"], valid["loss"] - own["loss"], 100 * valid["choice_accuracy"], own["loss"]
whole = {key[1:] for key in runs if all((n, *key[1:]) in runs for n in ("lora", "causal", "reference"))}
runs = {key: run for key, run in runs.items() if key[1:] in whole}
found = [dict(zip(("line", "task", "seed", "loss", "gap", "accuracy", "own_loss"), (*key, *run))) for key, run in runs.items()]
json.dump({"rates": rates, "runs": found}, open(f"{folder}/results.json", "w"), indent=1)
print("rates, loss on other rows: " + ", ".join(f"{name} {loss:.4f}" for name, loss in rates.items()))
names, tasks = ["lora", "causal", "reference"], sorted({key[1] for key in runs})
print(f"tasks and seeds: {len(whole)}")
print("\n| | loss, rows not learnt | loss, rows learnt | gap | accuracy, % |\n|---|---|---|---|---|")
for name in names:
    mean = lambda i: statistics.mean(r[i] for (n, *_), r in runs.items() if n == name)
    print(f"| `{name}` | {mean(0):.4f} | {mean(3):.4f} | {mean(1):.4f} | {mean(2):.1f} |")
print("\n| against | loss, rows not learnt | gap | accuracy, points | lower loss in |\n|---|---|---|---|---|")
for name, base in [("causal", "lora"), ("reference", "lora"), ("causal", "reference")]:
    cells = []
    pairs = [(key, runs[key], runs.get((base, *key[1:]))) for key in runs if key[0] == name]
    pairs = [(key, a, b) for key, a, b in pairs if b]
    for i in range(3):
        by_task = [[a[i] - b[i] for key, a, b in pairs if key[1] == task] for task in tasks]
        means = [statistics.mean(d) for d in by_task if d]
        half = student[len(means) - 1] * statistics.stdev(means) / math.sqrt(len(means))
        cells.append(f"{statistics.mean(means):+.{1 if i == 2 else 4}f} ± {half:.{1 if i == 2 else 4}f}")
    print(f"| `{name}` and `{base}` | " + " | ".join(cells) + f" | {sum(a[0] < b[0] for _, a, b in pairs)} of {len(pairs)} |")
PY
  ;;
esac
