#!/bin/sh
# X-LoRA's small reproduction: two LoRAs trained apart, a head trained on both tasks mixed, and controls.
# usage: bench/xlora.sh LORIMER MODEL FOLDER [SEED …]      then bench/xlora.py FOLDER      HEADS="bias shared": only these
set -e
lorimer=$1 model=$2 folder=$3
shift 3
seeds=${*:-0 1 2}
mkdir -p "$folder"
for task in kind define; do
  head -n 1000 data/wordnet-$task.train.jsonl > "$folder/$task.jsonl"
  sed -n 1001,1480p data/wordnet-$task.train.jsonl
done > "$folder/mixed.jsonl"
train() {
  name=$1
  shift
  [ -f "$folder/$name.json" ] && return
  "$lorimer" train --model "$model" --seed "$seed" --overwrite --json -q --output "$folder/$name" "$@" > "$folder/$name.new"
  mv "$folder/$name.new" "$folder/$name.json"
}
measure() {
  name=$1
  shift
  for task in kind define; do
    out="$folder/$name-on-$task"
    [ -f "$out.json" ] && continue
    "$lorimer" eval --model "$model" --data data/wordnet-$task.valid.jsonl --limit 150 --rows "$out.jsonl" --json -q "$@" > "$out.new"
    mv "$out.new" "$out.json"
  done
}
# mix HEAD FLAG …: a head of this seed on both tasks.
mix() {
  head=$1
  shift
  train $head-$seed --data "$folder/mixed.jsonl" --method xlora --adapter "$folder/kind-$seed" --adapter "$folder/define-$seed" --lr 5e-4 "$@"
  measure $head-$seed --adapter "$folder/$head-$seed"
}
for seed in $seeds; do
  for task in kind define; do
    train $task-$seed --data "$folder/$task.jsonl" --rank 8 --lr 2e-3 --max-steps 40
    measure $task-$seed --adapter "$folder/$task-$seed"
  done
  measure uniform-$seed --adapter "$folder/kind-$seed=0.5" --adapter "$folder/define-$seed=0.5"
done
for head in ${HEADS:-layerwise bias shared depth2}; do
  case $head in
    layerwise) set -- --set layerwise_scalings=true ;;
    bias) set -- --set layerwise_scalings=true --set bias_only=true ;;
    shared) set -- ;;
    depth2) set -- --set layerwise_scalings=true --set xlora_depth=2 --set xlora_size=64 ;;
  esac
  for seed in $seeds; do
    mix $head "$@"
  done
done
