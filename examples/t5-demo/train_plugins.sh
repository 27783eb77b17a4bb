#!/bin/sh
# Train the plugins of the demo: sh train_plugins.sh MODEL DATA OUTPUT
set -eu
model=$1 data=$2 output=$3
terms='novels: public domain; dates and sums of money: made by make_data.py'

# First the encoder's states alone, from the paper's initialisation; then the decoder's too, along the answers.
variator-export train pretrain --backbone "$model" --task text2text-generation --text "$data/train.jsonl" \
    --ratio 2 --ratio 4 --ratio 8 --loss hidden=1 --steps 300 --min-tokens 16 --max-tokens 128 \
    --terms "$terms" --output "$output-first"
variator-export train adapt --backbone "$model" --data "$data/train.jsonl" --label-column label \
    --plugin "$output-first/ratio-2" --plugin "$output-first/ratio-4" --plugin "$output-first/ratio-8" \
    --loss hidden=1 --loss decoder=1 --loss logits=1 --steps 900 --learning-rate 1e-3 --held-out 0.01 \
    --terms "$terms" --output "$output"
