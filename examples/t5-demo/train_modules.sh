#!/bin/sh
# Train modules for both stacks of the demo: sh train_modules.sh MODEL DATA OUTPUT
set -eu
model=$1 data=$2 output=$3

variator-export train modules --backbone "$model" --task text2text-generation --data "$data/train.jsonl" \
    --label-column label --granularity 2 --granularity 4 --decoder-granularity 2 --steps 1000 \
    --learning-rate 2e-3 --held-out 0.005 --max-target-tokens 24 \
    --terms 'novels: public domain; dates and sums of money: made by make_data.py' --output "$output"
