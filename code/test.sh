#!/bin/bash
# Evaluates what code/finetune.sh wrote. Further flags are passed on and win: ./code/test.sh --data_path DIR
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
exec "${PYTHON:-python}" tools/test.py \
    --model_path ./results/ptbxl_all/ptbxl_all.pt \
    --dataset ptbxl \
    --task all \
    --test_split test \
    "$@"
