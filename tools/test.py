"""The training guide's name for ``hubert-ecg evaluate``."""

import sys

from hubert_ecg.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
