#!/bin/sh
# Sparse-GIN's card: does a graph layer on the attention map generalise better than a LoRA of as many parameters? Four kinds of texts, 80 rows of each, three
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
  head -80 "data/sentiment-$task.train.jsonl" > "$folder/$name.rows.jsonl"
  "$lorimer" train --model "$model" --data "$folder/$name.rows.jsonl" --max-steps "$steps" --seed "$seed" --warmup-steps 3 --overwrite --json -q \
    --output "$folder/$name.adapter" "$@" > "$folder/$name.train.json"
  evaluate="$lorimer eval --model $model --adapter $folder/$name.adapter --json -q"
  case $name in rate-*) ;; *) $evaluate --data "$folder/$name.rows.jsonl" > "$folder/$name.own.json" ;; esac
  $evaluate --data "$rows" --limit 100 > "$folder/$name.json"
  rm -r "$folder/$name.adapter" "$folder/$name.rows.jsonl"
}
lora="--method lora --rank 22 --alpha 22"
causal="--method sparse-gin"
reference="--method sparse-gin --set direction=reference"
case $part in
rates)
  sed -n 101,200p data/sentiment-tweets.train.jsonl > "$folder/held-out.jsonl"
  for lr in 1e-3 2e-3 5e-3 5e-4; do
    run "rate-causal-$lr" tweets 9 15 "$folder/held-out.jsonl" $causal --lr $lr
    run "rate-reference-$lr" tweets 9 15 "$folder/held-out.jsonl" $reference --lr $lr
    run "rate-lora-$lr" tweets 9 15 "$folder/held-out.jsonl" $lora --lr $lr
  done
  for lr in 1e-3 2e-3; do
    run "rate-dropped-$lr" tweets 9 15 "$folder/held-out.jsonl" $causal --set first_token=drop --lr $lr
    run "rate-normed-$lr" tweets 9 15 "$folder/held-out.jsonl" $causal --set input=normed --lr $lr
    run "rate-both-$lr" tweets 9 15 "$folder/held-out.jsonl" $causal --set input=normed --set first_token=drop --lr $lr
  done
  ;;
runs)
  for seed in 0 1 2; do
    for task in tweets movies products news; do
      valid=data/sentiment-$task.valid.jsonl
      run lora "$task" $seed 30 "$valid" $lora --lr "${LORA_LR:-2e-3}"
      run causal "$task" $seed 30 "$valid" $causal --lr "${CAUSAL_LR:-1e-3}"
      run reference "$task" $seed 30 "$valid" $reference --lr "${REFERENCE_LR:-1e-3}"
    done
  done
  ;;
esac
