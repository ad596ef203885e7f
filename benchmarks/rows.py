"""What benchmarks measured on a device, kept as rows: compared, plotted, and the README's table made from them.

``python benchmarks/rows.py table``         prints the README's table from this device's rows
``python benchmarks/rows.py compare FILE``  prints what ``--benchmark-json FILE`` measured beside this device's rows
``python benchmarks/rows.py keep FILE``     puts what it measured in their place, and plots the curves among them
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
PACKAGES = ("hubert-ecg", "torch", "numpy", "scipy", "scikit-learn", "faiss-cpu", "kaldi-native-fbank", "librosa")

# Row -> what the README calls it, and the peer that it names.
TABLE = {
    "test_mfcc[S64-float32]": ("MFCC, 1,000 records", "torchaudio, one batched call"),
    "test_time_freq[S64-float32]": ("time-frequency features, 1,000 records", "NumPy and SciPy"),
    "test_against_the_separate_steps[mfcc-corrected]": ("labels of 1,000 records, K = 100", "our ops, one by one"),
    "test_against_torchaudio_and_scikit_learn": (
        "labels of 1,000 records, K = 100",
        "torchaudio + scikit-learn",
    ),
    **{
        f"test_lloyd_iteration[{n * 1000}x{d}x{k}]": (
            f"k-means iteration, {size} x {d}, K = {k}",
            "the better of scikit-learn and faiss",
        )
        for size, n, d, k in (("1M", 1000, 39, 100), ("200k", 200, 13, 100), ("100k", 100, 768, 500))
    },
    "test_command_against_one_call_per_frame": (
        "`hubert-ecg extract`, 1,000 packed records",
        "one Kaldi call per frame",
    ),
    "test_loader": (
        "random crops of 5 s, 8,192 packed records",
        "DataLoader, a record at a time, 2 processes",
    ),
    **{
        f"test_prepare[{compat}-500-1000]": (f"preparing 1,000 records, {compat} form", "the published chain in SciPy")
        for compat in ("published", "corrected")
    },
    **{
        f"test_pretrain_step[K{clusters}]": (
            f"a step of pretraining, base model, 16 records, {clusters:,} clusters",
            "transformers, float32",
        )
        for clusters in (100, 500, 1000)
    },
    "test_codebook_loss[K1000]": ("loss over 1,000 clusters, 8 records", "broadcast cosine of all tokens"),
    "test_attention[all_keys-dropout-float32]": ("attention with dropout, 16 records", "torch SDPA"),
    "test_front_end": ("convolutions, 16 records", "eager PyTorch"),
    "test_positional_conv[16]": ("positional convolution, 16 records", "eager PyTorch"),
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


def measured(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of ``--benchmark-json``."""
    where = {
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }
    benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return [
        {"name": row["name"], **{key: row["stats"][key] for key in ("median", "iqr", "rounds")}, **row["extra_info"]}
        | where
        for row in benchmarks
    ]


def load(path: Path) -> list[dict[str, Any]]:
    """Rows of a device, none where it has no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def keep(path: Path, new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Puts rows into the file of a device; a row that was measured before is replaced."""
    rows = {row["name"]: row for row in [*load(path), *new]}
    path.parent.mkdir(exist_ok=True)
    kept = [rows[name] for name in sorted(rows)]
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return kept


def compare(now: Sequence[Mapping[str, Any]], then: Sequence[Mapping[str, Any]]) -> str:
    """Each row beside the one of the same name before it; of its peers, the README's or else the fastest.

    What else a machine does slows ours and the peers alike, so the ratios say more than the times.
    """
    before = {row["name"]: row for row in then}
    width = max((len(row["name"]) for row in now), default=0)
    lines = [f"{'':{width}} {'now':>9} {'before':>9}   times as fast as a peer, now (before)"]
    for row in now:
        old = before.get(row["name"])
        line = f"{row['name']:{width}} {_milliseconds(_seconds(row)):>9}"
        line += f" {_milliseconds(_seconds(old)) if old else '-':>9}"
        if ratios := row.get("ratio"):
            peer = TABLE.get(row["name"], ("", ""))[1]
            peer = peer if peer in ratios else min(ratios, key=ratios.__getitem__)
            was = old.get("ratio", {}).get(peer) if old else None
            line += f"   {_ratio(ratios[peer])} ({_ratio(was) if was else '-'}) {peer}"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves of speed: one panel for each ``curve`` among the rows, with a line for ours and for each peer."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row.get("x", 0)):
        if "curve" in row:
            curves.setdefault(row["curve"], []).append(row)
    if not curves:
        return
    # The same rows give the same file.
    with pyplot.rc_context({"svg.hashsalt": "rows", "font.size": 9}):
        figure, panels = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False)
        for panel, (title, points) in zip(panels[0], sorted(curves.items()), strict=True):
            for who in dict.fromkeys(name for row in points for name in row["median_s"]):
                timed = [(row["x"], row["count"] / row["median_s"][who]) for row in points if who in row["median_s"]]
                panel.plot(*zip(*timed, strict=True), marker="o", label=who, linewidth=2.5 if who == "ours" else 1.2)
            what, _, axis = title.partition(" against ")
            panel.set(title=what, xlabel=axis, ylabel=f"{points[0]['unit']} / s", xscale="log", yscale="log")
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The README's table, in Markdown."""
    named = {row["name"]: row for row in rows}
    lines = ["| | ours | peer | | ratio |", "|---|---|---|---|---|"]
    for name, (what, peer) in TABLE.items():
        row = named.get(name, {})
        if peer in row.get("ratio", {}):
            ours, theirs = (f"{_milliseconds(row['median_s'][who])}" for who in ("ours", peer))
            lines.append(f"| {what} | {ours} | {peer} | {theirs} | {_ratio(row['ratio'][peer])} |")
    return "\n".join(lines)


def _seconds(row: Mapping[str, Any]) -> float:
    return row.get("median_s", {}).get("ours", row["median"])


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f} x" if ratio >= 10 else f"{ratio:.1f} x"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main(command: str, *files: str) -> None:
    if len(files) != {"table": 0, "compare": 1, "keep": 1}.get(command, -1):
        raise SystemExit(f"usage:\n{__doc__}")
    path = RESULTS / f"{device()}.json"
    if command == "table":
        print(table(load(path)))
    elif command == "compare":
        if not path.is_file():
            print(f"no rows of this device, {path.stem}: nothing to compare with")
        print(compare(measured(Path(*files)), load(path)))
    else:
        plot(keep(path, measured(Path(*files))), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
