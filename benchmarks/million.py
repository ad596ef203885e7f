"""A store of a million records, from packing to pretraining, each stage in 4 GB of memory.

``python benchmarks/million.py``, with ``--num_records``, ``--crop_s`` and ``--folder`` (a disk with 30 GB left for a
million records of 5 s). It tiles records of the synthetic cohort: packing and every stage after it see a million, but
what is read and filtered before packing are the few that are tiled. Prints seconds and peak memory of each stage, and
fails above the limit. Not part of ``make bench``: it takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hubert_ecg.testing import tiled_store

LIMIT_GB = 4.0
STEPS = 50


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in GB of a process and those that it starts."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, used.ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_records", type=int, default=1_000_000)
    parser.add_argument("--crop_s", type=float, default=5.0, help="seconds of a record")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--pack", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pack:
        tiled_store(args.pack, args.num_records, args.crop_s)
        return
    # Samples, and 39 features of each of 93 tokens in 5 s.
    needed = args.num_records * args.crop_s * (2 * 12 * 100 + 4 * 39 * 93 / 5) * 1.1
    free = shutil.disk_usage(args.folder).free
    if free < needed:
        raise SystemExit(f"{args.folder} has {free / 1e9:.0f} GB left, {needed / 1e9:.0f} are needed: see --folder")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="million-") as name:
        store, features, kmeans, models = (Path(name) / part for part in ("store", "features", "kmeans.pkl", "models"))
        command = [sys.executable, "-m", "hubert_ecg"]
        data = ["--data_path", store, "--crop_s", args.crop_s]
        limits = ["--max_steps", STEPS, "--validation_share", min(1000 / args.num_records, 0.5)]
        files = ["--kmeans_path", kmeans, "--output_dir", models]
        stages = {
            "pack": [sys.executable, __file__, "--pack", store, "--num_records", args.num_records, *data[2:]],
            "extract": [*command, "extract", *data, "--output_path", features],
            "cluster": [*command, "cluster", "--features_path", features, "--output_path", kmeans, "--max_iter", 5],
            "pretrain": [*command, "pretrain", *data, *files, *limits, "--size", "tiny"],
        }
        peaks = []
        for stage, parts in stages.items():
            seconds, peak = measured([str(part) for part in parts])
            print(f"million: {args.num_records:,} records  {stage:8} {seconds:6.0f} s {peak:6.2f} GB", flush=True)
            peaks.append(peak)
    if max(peaks) > LIMIT_GB:
        raise SystemExit(f"million: a stage took more than {LIMIT_GB:g} GB")


if __name__ == "__main__":
    main()
