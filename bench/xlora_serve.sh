#!/bin/sh
# Served throughput of an X-LoRA beside that of one of its experts: a server each, in turns.
# usage: bench/xlora_serve.sh LORIMER MODEL EXPERT MIXTURE [ROUNDS [REQUESTS]]
set -e
lorimer=$1 model=$2 rounds=${5:-7} requests=${6:-16}
folder=$(mktemp -d)
mkdir "$folder/expert" "$folder/mixture"
"$lorimer" convert --to peft --model "$model" -q --output "$folder/expert/a0" "$3" > /dev/null
"$lorimer" convert --to peft --model "$model" -q --output "$folder/mixture/a0" "$4" > /dev/null
# A server reads experts below its folder only.
python3 - "$folder/mixture" <<'PY'
import json, os, shutil, sys
path = sys.argv[1] + "/a0/adapter_config.json"
config = json.load(open(path))
for number, expert in config["adapters"].items():
    shutil.copytree(os.path.join(sys.argv[1], "a0", expert), f"{sys.argv[1]}/expert{number}", ignore=shutil.ignore_patterns("tensorboard", "*.png", "*.svg"))
config["adapters"] = {number: f"../expert{number}" for number in config["adapters"]}
json.dump(config, open(path, "w"))
PY
for round in $(seq "$rounds"); do
  for kind in expert mixture; do
    "$lorimer" bench serve --model "$model" --adapters 1 --folder "$folder/$kind" --rounds 1 --requests "$requests" --input 128 --output 32 --seed "$round" --json -q >> "$folder/$kind.jsonl"
  done
done
python3 - "$folder" <<'PY'
import json, statistics, sys
rate = {kind: [json.loads(line)["rows"][0]["output_tokens_per_second"] for line in open(f"{sys.argv[1]}/{kind}.jsonl")] for kind in ("expert", "mixture")}
ratios = [m / e for e, m in zip(rate["expert"], rate["mixture"])]
for kind, values in rate.items():
    print(f"{kind:8} {statistics.median(values):7.1f} output tokens/s  ({', '.join(f'{v:.1f}' for v in values)})")
print(f"ratio    {statistics.median(ratios):.3f} by pairs ({', '.join(f'{r:.2f}' for r in ratios)}), {statistics.median(rate['mixture']) / statistics.median(rate['expert']):.3f} of the medians")
PY
rm -r "$folder"
