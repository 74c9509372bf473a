#!/bin/sh
# Sparse-GIN's card: does a graph layer on the attention map generalise better than a LoRA of as many parameters? Four kinds of texts, 80 rows of each, four
# passes; the loss on the rows that were learnt and on rows that were not, after the last step.
# usage: bench/sparse_gin.sh LORIMER MODEL FOLDER [rates | runs | table]
set -e
lorimer=$1 model=$2 folder=$3 part=${4:-runs}
mkdir -p "$folder"
tasks="movies tweets products news"
for task in $tasks; do head -80 "data/sentiment-$task.train.jsonl" > "$folder/$task.jsonl"; done
# run NAME TASK SEED STEPS ROWS FLAGS: one training with its two evaluations, unless it is there. ROWS: valid, or rows of the training file that are not learnt.
run() {
  name=$1-$2-s$3 task=$2 seed=$3 steps=$4 rows=$5
  shift 5
  [ -s "$folder/$name.json" ] && return
  "$lorimer" train --model "$model" --data "$folder/$task.jsonl" --max-steps "$steps" --seed "$seed" --warmup-steps 4 --overwrite --json -q \
    --output "$folder/adapter" "$@" > "$folder/$name.train.json"
  "$lorimer" eval --model "$model" --adapter "$folder/adapter" --data "$folder/$task.jsonl" --json -q > "$folder/$name.own.json"
  "$lorimer" eval --model "$model" --adapter "$folder/adapter" --data "$rows" --limit 160 --json -q > "$folder/$name.json"
}
lora="--method lora --rank 22 --alpha 22"
causal="--method sparse-gin"
reference="--method sparse-gin --set direction=reference"
case $part in
rates)
  sed -n 81,160p data/sentiment-tweets.train.jsonl > "$folder/held-out.jsonl"
  for lr in 5e-4 1e-3 2e-3 5e-3; do
    run "rate-lora-$lr" tweets 9 20 "$folder/held-out.jsonl" $lora --lr $lr
    run "rate-causal-$lr" tweets 9 20 "$folder/held-out.jsonl" $causal --lr $lr
    run "rate-reference-$lr" tweets 9 20 "$folder/held-out.jsonl" $reference --lr $lr
  done
  ;;
runs)
  for seed in 0 1 2; do
    for task in $tasks; do
      valid=data/sentiment-$task.valid.jsonl
      run lora "$task" $seed 40 "$valid" $lora --lr "${LORA_LR:-2e-3}"
      run causal "$task" $seed 40 "$valid" $causal --lr "${CAUSAL_LR:-1e-3}"
      run reference "$task" $seed 40 "$valid" $reference --lr "${REFERENCE_LR:-1e-3}"
      run causal-normed "$task" $seed 40 "$valid" $causal --set input=normed --lr "${CAUSAL_LR:-1e-3}"
      run causal-dropped "$task" $seed 40 "$valid" $causal --set first_token=drop --lr "${CAUSAL_LR:-1e-3}"
    done
  done
  ;;
esac
