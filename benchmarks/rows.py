"""What benchmarks measured on a device, kept as rows, and the README's table made from them.

``python benchmarks/rows.py`` prints the table of this device's rows.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("hubert-ecg", "torch", "numpy", "scipy", "scikit-learn", "faiss-cpu", "kaldi-native-fbank")

# Row -> what the README calls it, and the peer that it names.
TABLE = {
    "test_mfcc[S64-float32]": ("MFCC, 1,000 records", "torchaudio, one batched call"),
    "test_time_freq[S64-float32]": ("time-frequency features, 1,000 records", "torch, reference"),
    "test_lloyd_iteration[1000000x39x100]": ("k-means iteration, 1M x 39, K = 100", "scikit-learn"),
    "test_lloyd_iteration[1000000x13x100]": ("k-means iteration, 1M x 13, K = 100", "scikit-learn"),
    "test_lloyd_iteration[20000x768x500]": ("k-means iteration, 20k x 768, K = 500", "scikit-learn"),
    "test_command_against_one_call_per_frame": (
        "`hubert-ecg extract`, 1,000 packed records",
        "one Kaldi call per frame",
    ),
    "test_preprocess": ("preparing 64 records, published form", "the published chain in SciPy"),
}


def device() -> str:
    """The processor, its cores and the widest vectors that it has, as a file name."""
    model, flags = platform.machine(), set()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"model name\s*:\s*(.*)", text)
        model = found[1] if found else model
        found = re.search(r"^flags\s*:\s*(.*)", text, re.MULTILINE)
        flags = set(found[1].split()) if found else flags
    vectors = next((name for name in ("avx512f", "avx2") if name in flags), "")
    words = f"{model} {os.cpu_count()} cores {vectors}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def save(benchmarks: Sequence[Mapping[str, Any]]) -> Path:
    """Puts rows into the file of this device; a row that was measured before is replaced."""
    path = RESULTS / f"{device()}.json"
    rows = {row["name"]: row for row in load(path)}
    where = {
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }
    for row in benchmarks:
        stats = {key: row["stats"][key] for key in ("median", "iqr", "rounds")}
        rows[row["name"]] = {"name": row["name"], **stats, **row["extra_info"], **where}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps([rows[name] for name in sorted(rows)], indent=1) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> list[dict[str, Any]]:
    """Rows of a device, none where it has no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The README's table, in Markdown."""
    named = {row["name"]: row for row in rows}
    lines = ["| | ours | peer | | ratio |", "|---|---|---|---|---|"]
    for name, (what, peer) in TABLE.items():
        if name in named:
            row = named[name]
            ours, theirs = (f"{_milliseconds(row['median_s'][who])}" for who in ("ours", peer))
            lines.append(f"| {what} | {ours} | {peer} | {theirs} | {_ratio(row['ratio'][peer])} |")
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f} x" if ratio >= 10 else f"{ratio:.1f} x"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.stdout.write(table(load(RESULTS / f"{device()}.json")) + "\n")
