"""The training guide's name for ``hubert-ecg finetune``."""

import sys

from hubert_ecg.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
