"""The training guide's name for ``hubert-ecg cluster``."""

import sys

from hubert_ecg.cli import main

if __name__ == "__main__":
    sys.exit(main(["cluster", *sys.argv[1:]]))
