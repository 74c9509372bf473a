#!/bin/sh
# BA-LoRA's card: trained on film reviews of which 30 % have a random label, what becomes of the other three domains?
# Runs that are there are not made again.
# usage: bench/ba_lora.sh LORIMER MODEL FOLDER
set -e
mkdir -p "$3"
python3 - "$3" <<'PY'
import json, random, sys
rows = [json.loads(line) for line in open("data/sentiment-movies.train.jsonl")]
labels = sorted({row["messages"][-1]["content"] for row in rows})
random.seed(0)
for row in rows:
    if random.random() < 0.3:
        row["messages"][-1]["content"] = random.choice(labels)
open(f"{sys.argv[1]}/noisy.jsonl", "w").write("".join(json.dumps(row) + "\n" for row in rows))
PY
train() {
  name=$1
  shift
  [ -f "$folder/$name.json" ] && return
  "$lorimer" train --model "$model" --data "$folder/noisy.jsonl" --max-steps 100 --warmup-steps 5 --overwrite --json -q --output "$folder/$name" "$@" > "$folder/new"
  mv "$folder/new" "$folder/$name.json"
}
lorimer=$1 model=$2 folder=$3
train lora --method lora --rank 8 --lr 2e-3
train pissa --method lora --init pissa --rank 8 --lr 5e-4
train ba-lora --method ba-lora --rank 8 --lr 5e-4
train ba-lora-2 --method ba-lora --rank 8 --lr 5e-4 --set version=2
# A thousand times the code's weights, to see whether the terms do anything at all.
train ba-lora-1000 --method ba-lora --rank 8 --lr 5e-4 --set lambda1=0.1 --set lambda2=0.3 --set lambda3=0.1
for domain in movies tweets products news; do
  data="--model $model --data data/sentiment-$domain.valid.jsonl --limit 160 --json -q"
  for name in base lora pissa ba-lora ba-lora-2 ba-lora-1000; do
    [ -f "$folder/$name-$domain.json" ] && continue
    case $name in base) adapter= ;; *) adapter="--adapter $folder/$name" ;; esac
    "$lorimer" eval $data $adapter > "$folder/new"
    mv "$folder/new" "$folder/$name-$domain.json"
  done
done
python3 - "$folder" <<'PY'
import json, sys
domains = ["movies", "tweets", "products", "news"]
print(f"{'accuracy, % (loss)':<20}" + "".join(f"{d:>18}" for d in domains))
for name in ["base", "lora", "pissa", "ba-lora", "ba-lora-2", "ba-lora-1000"]:
    cells = (json.load(open(f"{sys.argv[1]}/{name}-{d}.json")) for d in domains)
    shown = "".join("{:>18}".format(f"{100 * c['choice_accuracy']:.1f} ({c['loss']:.3f})") for c in cells)
    print(f"{name:<20}{shown}")
PY
