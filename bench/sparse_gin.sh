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
  for seed in 0 1 2; do
    for task in tweets movies products news; do
      valid=data/sentiment-$task.valid.jsonl
      run lora "$task" $seed 15 "$valid" $lora --lr "${LORA_LR:-2e-3}"
      run causal "$task" $seed 15 "$valid" $causal --lr "${CAUSAL_LR:-1e-3}"
      run reference "$task" $seed 15 "$valid" $reference --lr "${REFERENCE_LR:-1e-3}"
    done
  done
  ;;
esac
