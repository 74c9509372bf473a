#!/bin/sh
# The norms of all heads of a model at three lengths: least, median and largest, and how many heads would gain (docs/limits.md).
# usage: bench/limits.sh LORIMER MODEL FOLDER
set -e
mkdir -p "$3"
"$1" limits --model "$2" --data data/sentiment-movies.train.jsonl --lengths 128,512,2048 --json -q --plot "$3/$2.svg" > "$3/$2.all.json"
python3 - "$3/$2" <<'PY'
import json, statistics, sys
report, rows = json.load(open(sys.argv[1] + ".all.json")), []
for own in report["lengths"]:
    heads = [head for layer in own["base"] for head in layer["heads"]]
    of = lambda key: [f(h[key] for h in heads if h[key] is not None) for f in (min, statistics.median, max)]
    row = {"length": own["length"], "root": own["root"], "heads": len(heads), "degree": of("degree")}
    row |= {key: [round(v, 2) for v in of(key)] for key in ("gamma_over_root", "tau", "tau_centred")}
    row["without_degree"] = sum(h["degree"] is None for h in heads)
    row["centred_tau_is_less"] = sum(h["tau_centred"] < h["tau"] for h in heads)
    row["gain"] = sum(h["chained_operations"] is not None and h["chained_operations"] < h["exact_operations"] for h in heads)
    rows.append(row)
    print(row)
json.dump({"model": report["model"], "tolerance": report["tolerance"], "lengths": rows}, open(sys.argv[1] + ".json", "w"), indent=1)
PY
rm "$3/$2.all.json"
