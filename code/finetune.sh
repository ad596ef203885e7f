#!/bin/bash
# Fine-tunes on PTB-XL, all statements. Further flags are passed on and win: ./code/finetune.sh --data_path DIR
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
exec "${PYTHON:-python}" training/finetune.py \
    --dataset ptbxl \
    --task all \
    --pretrained_model hubert_ecg_base \
    --batch_size 16 \
    --learning_rate 1e-5 \
    --num_epochs 50 \
    --output_dir ./results/ptbxl_all \
    "$@"
