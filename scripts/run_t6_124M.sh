#!/usr/bin/env bash
# The paper's 124M model with its recipe: 49B tokens of FineWeb-Edu in 100,000 steps of 480 sequences of 1024 tokens.
# Flags given here are passed to the trainer: scripts/run_t6_124M.sh --attn mha -o out/mha
# Run again, it resumes from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
make -s train_t6cu
exec ./train_t6cu --model 124M --batch-size 24 --tokens-per-step 491520 --seq-len 1024 \
    --train-data 'data/fineweb_edu_100B/*_train_*.bin' --val-data 'data/fineweb_edu_100B/*_val_*.bin' \
    --save-every 1000 --keep 2 --val-every 250 --sample-every 1000 --out out/t6_124M --resume "$@"
