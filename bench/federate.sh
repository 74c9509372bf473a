#!/usr/bin/env bash
# FLoRA's stack beside its baselines: the four sentiment tasks as four clients of unequal ranks, three rounds, and the global adapter's loss on the held-out rows of all
# four. `fedavg` is of one rank, the mean of theirs.
#
#   bench/federate.sh LORIMER RESULTS SEED…
#
# ROWS: rows of a client (128); EVAL: held-out rows of each task (60); RATE (1e-3).
set -euo pipefail
lorimer=$1 results=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
data=() held=()
for task in sentiment-movies sentiment-news sentiment-products sentiment-tweets; do
  data+=(--data "data/$task.train.jsonl")
  head -n "${EVAL:-60}" "data/$task.valid.jsonl" > "$work/$task.jsonl"
  held+=(--eval-data "$work/$task.jsonl")
done
for seed in "$@"; do
  for aggregate in stack zero-pad fedavg; do
    to="$results/$aggregate-$seed.json"
    [ -f "$to" ] && continue
    ranks=16,8,4,4
    [ "$aggregate" = fedavg ] && ranks=8
    "$lorimer" federate simulate "${data[@]}" "${held[@]}" --limit "${ROWS:-128}" --ranks "$ranks" --rounds 3 --lr "${RATE:-1e-3}" --batch-size 16 \
      --aggregate "$aggregate" --seed "$seed" -o "$work/$aggregate-$seed" --json > "$work/result.json"
    mv "$work/result.json" "$to"
  done
done
