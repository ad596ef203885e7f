"""The training guide's name for ``hubert-ecg pretrain``."""

import sys

from hubert_ecg.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
