"""The training guide's name for ``hubert-ecg extract``."""

import sys

from hubert_ecg.cli import main

if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
