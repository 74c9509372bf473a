#!/bin/sh
# FlyLoRA's and SMoRA's small reproductions. FlyLoRA: adapters of two tasks trained apart, then averaged; does the loss rise less than LoRA's?
# SMoRA: one adapter on two unlike tasks mixed; are ranks as experts of their own (partition 1) no worse than whole LoRAs as experts (partition 8)?
# Controls: LoRA of the same rank, and a router that stays as it began.
# usage: bench/routed.sh LORIMER MODEL FOLDER [SEED …]      then bench/routed.py FOLDER      PARTS=smora: only that half
set -e
lorimer=$1 model=$2 folder=$3
shift 3
mkdir -p "$folder"
for task in sentiment-movies wordnet-define; do
  head -n 480 data/$task.train.jsonl > "$folder/$task.jsonl"
done
cat "$folder/sentiment-movies.jsonl" "$folder/wordnet-define.jsonl" > "$folder/mixed.jsonl"
train() {
  name=$1
  shift
  [ -f "$folder/$name.json" ] && return
  "$lorimer" train --model "$model" --seed "$seed" --warmup-steps 3 --overwrite --json -q --output "$folder/$name" "$@" > "$folder/$name.new"
  mv "$folder/$name.new" "$folder/$name.json"
}
measure() {
  name=$1 task=$2
  shift 2
  out="$folder/$name-on-$task"
  [ -f "$out.json" ] && return
  "$lorimer" eval --model "$model" --data data/$task.valid.jsonl --limit 60 --rows "$out.jsonl" --json -q "$@" > "$out.new"
  mv "$out.new" "$out.json"
}
fly="--method flylora --rank 32 --alpha 64 --set top_k=8 --lr 2e-3"
lora="--rank 32 --alpha 64 --lr 5e-4"
smora="--method smora --rank 64 --alpha 16 --set activate_r=8 --lr 1e-3"
parts=${PARTS:-fly smora}
seeds=${*:-0 1 2}
case $parts in *fly*) half=$seeds ;; *) half= ;; esac
for seed in $half; do
  for task in sentiment-movies wordnet-define; do
    train fly-$task-$seed --data "$folder/$task.jsonl" --max-steps 30 $fly
    train lora-$task-$seed --data "$folder/$task.jsonl" --max-steps 30 $lora
    for method in fly lora; do
      measure $method-$seed $task --adapter "$folder/$method-$task-$seed"
    done
  done
  for task in sentiment-movies wordnet-define; do
    for method in fly lora; do
      measure $method-average-$seed $task --adapter "$folder/$method-sentiment-movies-$seed=0.5" --adapter "$folder/$method-wordnet-define-$seed=0.5"
    done
  done
done
case $parts in *smora*) half=$seeds ;; *) half= ;; esac
for seed in $half; do
  train smora-1-$seed --data "$folder/mixed.jsonl" --max-steps 60 $smora
  train smora-8-$seed --data "$folder/mixed.jsonl" --max-steps 60 $smora --set rank_partition=8
  train smora-fixed-$seed --data "$folder/mixed.jsonl" --max-steps 60 $smora --set train_router=false
  train lora-mixed-$seed --data "$folder/mixed.jsonl" --max-steps 60 --rank 64 --alpha 128 --lr 5e-4
  for method in smora-1 smora-8 smora-fixed lora-mixed; do
    for task in sentiment-movies wordnet-define; do
      measure $method-$seed $task --adapter "$folder/$method-$seed"
    done
  done
done
