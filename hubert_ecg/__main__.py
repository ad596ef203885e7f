"""``python -m hubert_ecg <command>``: the command of this very Python, also for torchrun."""

import sys

from hubert_ecg.cli import main

if __name__ == "__main__":
    sys.exit(main())
