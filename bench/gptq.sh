#!/bin/sh
# Held-out loss of a base in 4 bits: groups rounded to the nearest and as GPTQ does, beside NF4 and f32. It is that of all tokens of texts: the one answer of a
# row says little of what a base lost. What is there is not done again.
# usage: bench/gptq.sh LORIMER MODEL FOLDER
set -e
lorimer=$1 model=$2 folder=$3
mkdir -p "$folder"
task=${TASK:-movies} group=${GROUP:-64}
head -128 "data/sentiment-$task.train.jsonl" > "$folder/calibration.jsonl"
head -120 "data/sentiment-$task.valid.jsonl" |
  python3 -c 'import json, sys
for line in sys.stdin: print(json.dumps({"text": json.loads(line)["messages"][0]["content"]}))' > "$folder/valid.jsonl"
# base NAME FLAGS…
base() {
  name=$1
  shift
  [ -s "$folder/$name.quantize.json" ] ||
    { "$lorimer" quantize --model "$model" --output "$folder/$name" --json "$@" > "$folder/$name.tmp" && mv "$folder/$name.tmp" "$folder/$name.quantize.json"; }
  [ -s "$folder/$name.json" ] && return
  "$lorimer" eval --model "$folder/$name" --dtype stored --data "$folder/valid.jsonl" --json -q > "$folder/$name.tmp"
  mv "$folder/$name.tmp" "$folder/$name.json"
}
[ -s "$folder/f32.json" ] || "$lorimer" eval --model "$model" --data "$folder/valid.jsonl" --json -q > "$folder/f32.json"
base nf4 --method nf --bits 4
base rtn --method rtn --group-size "$group"
base rtn-asym --method rtn --group-size "$group" --asym
base gptq --method gptq --group-size "$group" --calibration "$folder/calibration.jsonl"
base gptq-asym --method gptq --group-size "$group" --asym --calibration "$folder/calibration.jsonl"
python3 - "$folder" <<'PY'
import json, sys
print("| base | bits | held-out loss |\n|---|---|---|")
for name in ["f32", "nf4", "rtn", "rtn-asym", "gptq", "gptq-asym"]:
    bits = json.load(open(f"{sys.argv[1]}/{name}.quantize.json"))["bits"] if name != "f32" else 32.0
    loss = json.load(open(f"{sys.argv[1]}/{name}.json"))["loss"]
    print(f"| {name} | {bits:.3f} | {loss:.4f} |")
PY
