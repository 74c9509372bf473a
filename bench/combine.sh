#!/bin/sh
# Adapters of four domains combined into one without their base, each combination evaluated on each domain; also LoRA-LEGO's small reproduction.
# Parents: LoRA of rank 8 on each sentiment set, 40 steps. Those of one seed share their A at the start; the control `other-…` takes each domain
# from another seed. Controls: the base, each parent alone, the sum, the mean (cat with weights of 1/4).
# usage: bench/combine.sh LORIMER MODEL FOLDER [SEED …]      then bench/combine.py FOLDER      LIMIT=60 rows of each domain; goes on where it stopped
set -e
lorimer=$1 model=$2 folder=$3
shift 3
limit=${LIMIT:-60}
domains="movies tweets products news"
mkdir -p "$folder"
train() { # seed, domain
  [ -f "$folder/$2-$1.json" ] && return
  "$lorimer" train --model "$model" --data "data/sentiment-$2.train.jsonl" --rank 8 --lr 5e-4 --max-steps 40 --batch-size 8 --warmup-steps 4 \
    --seed "$1" --overwrite --json -q --output "$folder/$2-$1" > "$folder/new"
  mv "$folder/new" "$folder/$2-$1.json"
}
measure() { # name, flags of eval
  name=$1
  shift
  for domain in $domains; do
    [ -f "$folder/$name-on-$domain.json" ] && continue
    "$lorimer" eval --model "$model" --data "data/sentiment-$domain.valid.jsonl" --limit "$limit" --json -q "$@" > "$folder/new"
    mv "$folder/new" "$folder/$name-on-$domain.json"
  done
}
combine() { # name, parents, flags of merge
  name=$1 parents=$2
  shift 2
  if [ ! -f "$folder/$name.json" ]; then
    # shellcheck disable=SC2086
    "$lorimer" merge $parents "$@" --overwrite --output "$folder/$name" --json -q > "$folder/new"
    mv "$folder/new" "$folder/$name.json"
  fi
  measure "$name" --adapter "$folder/$name"
}
of() { # the four parents: seed, and how far the seed moves from domain to domain
  i=0
  for domain in $domains; do
    echo "$folder/$domain-$((($1 + i * $2) % 4))"
    i=$((i + 1))
  done
}
mean=0.25,0.25,0.25,0.25
some() { # name of the set, parents, seed: what is measured of every set
  combine "$1mean-$3" "$2" --method cat --weights $mean
  combine "$1linear-$3" "$2" --method linear --weights $mean
  combine "$1lego-$3" "$2" --method lego --rank 8
  combine "$1ties-$3" "$2" --method ties --density 0.5
  combine "$1knots-$3" "$2" --method knots --density 0.5
}
measure base
for seed in ${@:-0 1 2}; do
  for domain in $domains; do
    train "$seed" $domain
  done
  parents=$(of "$seed" 0)
  some "" "$parents" "$seed"
  combine "sum-$seed" "$parents" --method cat
  combine "svd-$seed" "$parents" --method svd --weights $mean
  combine "magnitude_prune-$seed" "$parents" --method magnitude_prune --density 0.5 --weights $mean
  combine "dare_linear-$seed" "$parents" --method dare_linear --density 0.5 --weights $mean
  combine "dare_ties-$seed" "$parents" --method dare_ties --density 0.5
  combine "magnitude_prune_svd-$seed" "$parents" --method magnitude_prune_svd --density 0.5 --weights $mean
  combine "ties_svd-$seed" "$parents" --method ties_svd --density 0.5
  combine "dare_linear_svd-$seed" "$parents" --method dare_linear_svd --density 0.5 --weights $mean
  combine "dare_ties_svd-$seed" "$parents" --method dare_ties_svd --density 0.5
  combine "tensors-$seed" "$parents" --method tensors
  for domain in $domains; do
    measure "$domain-$seed" --adapter "$folder/$domain-$seed"
  done
done
# The control: each domain from another seed, among four.
for seed in 0 1 2 3; do
  for domain in $domains; do
    train $seed $domain
  done
done
for seed in ${@:-0 1 2}; do
  some other- "$(of "$seed" 1)" "$seed"
done
