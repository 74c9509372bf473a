#!/bin/sh
# LLaVA-MoLE's card on text: two tasks that conflict. The same question about the same texts (movie reviews, newspaper editorials), where one word of the
# prompt says whether the answer is the text's subject or the other one; loss and accuracy on other texts. LoRA of the same active rank, with the experts' parameters in all (rank 24), and the
# experts by top1 and dense. One rate for all, which is tuned for none. Runs that are there are not made again.
# usage: bench/llava_mole.sh LORIMER MODEL FOLDER [SEED...]        the table of what is there: bench/llava_mole.sh LORIMER MODEL FOLDER table
set -e
lorimer=$1 model=$2 folder=$3
shift 3
seeds=${*:-0 1 2}
steps=${STEPS:-100} lr=${RATE:-1e-3}
mkdir -p "$folder"
[ -s "$folder/train.jsonl" ] || python3 - "$folder" <<'PY'
import json, sys
folder = sys.argv[1]
for part, count in (("train", 240), ("valid", 40)):
    rows, swapped = [], {"film": "newspaper", "newspaper": "film"}
    texts = {}
    for kind, name in (("film", "movies"), ("newspaper", "news")):
        users = (json.loads(line)["messages"][0]["content"] for line in open(f"data/sentiment-{name}.{part}.jsonl"))
        found = [user.split("\n\n", 1)[1] for user in users]
        texts[kind] = [text for text in found if len(text) < 120][:count // 2]
    for pair in zip(*texts.values()):
        for kind, text in zip(texts, pair):
            for domain, label in (("Straight", kind), ("Mirror", swapped[kind])):
                question = f"{domain}: is this about a film or from a newspaper?\n\n{text}"
                rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": label}]})
    with open(f"{folder}/{part}.jsonl", "w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
PY
run() {
  name=$1-s$2 seed=$2
  shift 2
  [ -s "$folder/$name.json" ] && return
  "$lorimer" train --model "$model" --data "$folder/train.jsonl" --max-steps "$steps" --batch-size 8 --seed "$seed" --lr "$lr" --warmup-steps 5 --overwrite \
    --json -q --output "$folder/$name.adapter" "$@" > "$folder/$name.train.json"
  cp "$folder/$name.adapter/log.jsonl" "$folder/$name.log.jsonl" 2>/dev/null || true
  "$lorimer" eval --model "$model" --adapter "$folder/$name.adapter" --data "$folder/valid.jsonl" --json -q > "$folder/$name.part"
  mv "$folder/$name.part" "$folder/$name.json"
  rm -r "$folder/$name.adapter"
}
case $seeds in table) ;; *)
  for seed in $seeds; do
    run lora8 "$seed" --method lora --rank 8 --alpha 16
    run top1 "$seed" --method llava-mole --rank 8 --alpha 16 --dropout 0 --set experts=3
  done
  for seed in $seeds; do
    run dense "$seed" --method llava-mole --rank 8 --alpha 16 --dropout 0 --set experts=3 --set routing=dense
    run lora24 "$seed" --method lora --rank 24 --alpha 48
  done
esac
python3 - "$folder" <<'PY'
import glob, json, math, statistics, sys
folder, student = sys.argv[1], {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
runs = {}
for path in sorted(glob.glob(f"{folder}/*-s*.json")):
    if path.endswith(".train.json"):
        continue
    name, seed = path.split("/")[-1][:-5].rsplit("-s", 1)
    found, train = json.load(open(path)), json.load(open(path.replace(".json", ".train.json")))
    try:
        last = [json.loads(line) for line in open(path.replace(".json", ".log.jsonl"))][-1]
    except (OSError, ValueError, IndexError):
        last = {}
    shares = last.get("expert_shares")
    runs[name, int(seed)] = {"loss": found["loss"], "accuracy": found["choice_accuracy"], "seconds": train.get("seconds"), "expert_shares": shares,
                             "router_balance": last.get("router_balance")}
json.dump([{"line": name, "seed": seed, **run} for (name, seed), run in runs.items()], open(f"{folder}/results.json", "w"), indent=1)
print("| | loss, texts not learnt | accuracy, % | seeds |\n|---|---|---|---|")
for name in ("lora8", "lora24", "top1", "dense"):
    own = [run for (n, _), run in runs.items() if n == name]
    if own:
        spread = f" ± {statistics.stdev(r['loss'] for r in own):.4f}" if len(own) > 1 else ""
        print(f"| `{name}` | {statistics.mean(r['loss'] for r in own):.4f}{spread} | {100 * statistics.mean(r['accuracy'] for r in own):.1f} | {len(own)} |")
print("\n| against | loss, mean difference with its 95 % interval | lower in |\n|---|---|---|")
for name, base in (("top1", "lora8"), ("dense", "lora8"), ("top1", "lora24"), ("dense", "lora24")):
    pairs = [(run["loss"], runs[base, s]["loss"]) for (n, s), run in runs.items() if n == name and (base, s) in runs]
    d = [a - b for a, b in pairs]
    if d:
        half = f" ± {student[len(d) - 1] * statistics.stdev(d) / math.sqrt(len(d)):.4f}" if 1 < len(d) < 6 else ""
        print(f"| `{name}` and `{base}` | {statistics.mean(d):+.4f}{half} | {sum(x < 0 for x in d)} of {len(d)} |")
for (name, seed), run in runs.items():
    if run["expert_shares"]:
        largest = sorted(max(s) for s in run["expert_shares"].values())
        print(f"\n`{name}`, seed {seed}: the largest share of an expert, by block: least {largest[0]:.2f}, median {statistics.median(largest):.2f}, "
              f"largest {largest[-1]:.2f}; Σ P C {run['router_balance']:.4f}")
PY
