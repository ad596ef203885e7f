"""``hubert-ecg prepare`` in shards of two records, a script for ranks: ``python pack.py <flags>``."""

from __future__ import annotations

import functools
import os
import signal
import sys

from hubert_ecg import cli
from hubert_ecg.data import build, packing

SHARD_RECORDS = 2


def main(argv: list[str]) -> int:
    build.build = functools.partial(build.build, shard_records=SHARD_RECORDS)
    if os.environ.get("PACK_KILLED") == os.environ.get("RANK"):
        packing._quantise = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    return cli.main(["prepare", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
