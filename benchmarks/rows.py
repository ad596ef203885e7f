"""What benchmarks measured on a device, kept as rows: compared, plotted, and the README's table made from them.

``python benchmarks/rows.py table [FILE]``  prints a table of the rows in FILE: this device's processor unless given
``python benchmarks/rows.py floors [FILE]`` prints how much of each row's time is its floor on the device
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
PACKAGES = (
    "hubert-ecg",
    "torch",
    "triton",
    "numpy",
    "scipy",
    "scikit-learn",
    "transformers",
    "faiss-cpu",
    "flash-kmeans",
)
PACKAGES += ("kaldi-native-fbank", "librosa")

# Row -> what the table calls it, and the peer that it names: the first one that is there.
TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "test_mfcc[S64-float32]": ("MFCC", ("torchaudio, one batched call",)),
    "test_time_freq[S64-float32]": ("time-frequency features", ("NumPy and SciPy", "torch, reference")),
    "test_against_the_separate_steps[mfcc-corrected]": ("labels, K = 100", ("our ops, one by one",)),
    "test_against_torchaudio_and_scikit_learn": (
        "labels, K = 100",
        ("torchaudio + scikit-learn", "torchaudio + torch"),
    ),
    "test_command": ("`hubert-ecg label` of a store, K = 100", ("extract, then predict",)),
    **{
        f"test_lloyd_iteration[{n}x{d}x{k}]": (
            f"k-means iteration, {d} features, K = {k}",
            ("the better of scikit-learn and faiss", "flash-kmeans", "torch"),
        )
        for n, d, k in (
            (1_000_000, 39, 100),
            (200_000, 13, 100),
            (100_000, 768, 500),
            (10_000_000, 39, 100),
            (20_000_000, 13, 100),
            (2_000_000, 768, 1000),
        )
    },
    "test_command_against_one_call_per_frame": ("`hubert-ecg extract` of a store", ("one Kaldi call per frame",)),
    "test_loader": ("random crops of 5 s of a store", ("DataLoader, a record at a time, 2 processes",)),
    **{
        f"test_prepare[{compat}-500-1000]": (f"preparing, {compat} form", ("the published chain in SciPy",))
        for compat in ("published", "corrected")
    },
    **{
        f"test_pretrain_step[{name}]": (
            f"a step of pretraining, {what} clusters",
            ("transformers, float32", "transformers, float16"),
        )
        for name, what in (
            ("K100", "base model, 100"),
            ("K500", "base model, 500"),
            ("K1000", "base model, 1,000"),
            ("small-K100", "small model, 100"),
            ("large-K100", "large model, 100"),
        )
    },
    "test_finetune_step": (
        "a step of fine-tuning, base model, 71 labels",
        ("transformers, float32", "transformers, float16"),
    ),
    **{
        f"test_inference[{batch}]": ("scores of a base model", ("transformers", "transformers, float32"))
        for batch in (1, 16, 448)
    },
    "test_codebook_loss[K1000]": (
        "loss over 1,000 clusters",
        ("broadcast cosine of all tokens", "one product of all tokens"),
    ),
    "test_attention[all_keys-dropout-float32-both]": ("attention with dropout, float32", ("torch SDPA",)),
    "test_attention[spans-dropout-bfloat16-both]": (
        "attention with dropout and key spans, bfloat16",
        ("torch SDPA",),
    ),
    "test_front_end": ("convolutions", ("eager PyTorch",)),
    "test_add_norm[dropout]": ("dropout, residual and norm", ("eager PyTorch",)),
    "test_bias_gelu[dropout]": ("bias, GELU and dropout", ("eager PyTorch",)),
    **{f"test_positional_conv[{batch}]": ("positional convolution", ("eager PyTorch",)) for batch in (16, 448)},
}


def device(gpu: str | None = None) -> str:
    """A GPU, or else the processor, its cores and the widest vectors that it has, as a file name."""
    if gpu:
        return _slug(gpu)
    model, flags = platform.machine(), set()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"model name\s*:\s*(.*)", text)
        model = found[1] if found else model
        found = re.search(r"^flags\s*:\s*(.*)", text, re.MULTILINE)
        flags = set(found[1].split()) if found else flags
    vectors = next((name for name in ("avx512_vnni", "avx2") if name in flags), "")
    return _slug(f"{model} {os.cpu_count()} cores {vectors}")


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def measured(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The device of a file of ``--benchmark-json``, and its rows."""
    where = {
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }
    run = json.loads(path.read_text(encoding="utf-8"))
    return device(run.get("machine_info", {}).get("gpu")), [
        {"name": row["name"], **{key: row["stats"][key] for key in ("median", "iqr", "rounds")}, **row["extra_info"]}
        | where
        for row in run["benchmarks"]
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
            peer = _peer(row) or min(ratios, key=ratios.__getitem__)
            was = old.get("ratio", {}).get(peer) if old else None
            line += f"   {_ratio(ratios[peer])} ({_ratio(was) if was else '-'}) {peer}"
        if share := row.get("share_of_floor"):
            line += f", {100 * share:.0f} % of its time is its floor"
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
    """A table in Markdown."""
    named = {row["name"]: row for row in rows}
    lines = ["| | of | ours | peer | | ratio |", "|---|---|---|---|---|---|"]
    for name, (what, _) in TABLE.items():
        row = named.get(name, {})
        if peer := _peer(row):
            ours, theirs = (f"{_milliseconds(row['median_s'][who])}" for who in ("ours", peer))
            lines.append(f"| {what} | {_count(row)} | {ours} | {peer} | {theirs} | {_ratio(row['ratio'][peer])} |")
    return "\n".join(lines)


def floors(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the device's own ceilings leave of each row's time, in Markdown."""
    named = {row["name"]: row for row in rows}
    lines = ["| | of | floor |", "|---|---|---|"]
    for name, (what, _) in TABLE.items():
        if share := named.get(name, {}).get("share_of_floor"):
            lines.append(f"| {what} | {_count(named[name])} | {100 * share:.0f} % |")
    return "\n".join(lines)


def _count(row: Mapping[str, Any]) -> str:
    return f"{row['count']:,} {row['unit'] if row['count'] > 1 else row['unit'].removesuffix('s')}"


def _peer(row: Mapping[str, Any]) -> str | None:
    return next((peer for peer in TABLE.get(row.get("name", ""), ("", ()))[1] if peer in row.get("ratio", {})), None)


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
    if len(files) not in {"table": (0, 1), "floors": (0, 1), "compare": (1,), "keep": (1,)}.get(command, ()):
        raise SystemExit(f"usage:\n{__doc__}")
    if command in ("table", "floors"):
        rows = load(Path(*files) if files else RESULTS / f"{device()}.json")
        print(table(rows) if command == "table" else floors(rows))
        return
    name, rows = measured(Path(*files))
    path = RESULTS / f"{name}.json"
    if command == "compare":
        if not path.is_file():
            print(f"no rows of this device, {path.stem}: nothing to compare with")
        print(compare(rows, load(path)))
    else:
        plot(keep(path, rows), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
