"""Pictures of clusters of tokens: how their samples look and where they stand, in the style of the other pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hubert_ecg.evaluation.plots import BLUE, INK, VERMILION, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Clusters in one picture.
CLUSTERS_IN_PICTURE = 6
_ROW_IN, _HEAD_IN, _FOOT_IN = 1.32, 0.36, 0.5
# Decades below its strongest part where a spectrum ends.
_RANGE_DB = 45.0


def cluster_rows(clusters: Sequence[dict[str, Any]], axes: dict[str, Any], unit: str) -> Figure:
    """One row for each cluster: samples of its tokens, their spectrum, their place in the beat, their leads.

    Args:
        clusters: Clusters of :meth:`hubert_ecg.evaluation.audit.ClusterAudit.result`.
        axes: Its axes.
        unit: What the samples are in.
    """
    height = _ROW_IN * len(clusters) + _HEAD_IN + _FOOT_IN
    with style():
        figure = Figure(figsize=(10.8, height))
        grid = figure.subplots(
            len(clusters),
            4,
            squeeze=False,
            gridspec_kw={
                "width_ratios": [1.35, 1, 1, 1.25],
                "left": 0.125,
                "right": 0.995,
                "top": 1 - _HEAD_IN / height,
                "bottom": _FOOT_IN / height,
                "wspace": 0.26,
                "hspace": 0.28,
            },
        )
        for place, (row, cluster) in enumerate(zip(grid, clusters, strict=True), 1):
            _samples(row[0], cluster, axes)
            _spectrum(row[1], cluster, axes)
            _shares(row[2], axes["phase"], cluster["phase_counts"], axes["phase_counts"])
            _shares(row[3], np.arange(len(axes["leads"])), cluster["lead_counts"], axes["lead_counts"])
            row[2].set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
            row[3].set(xlim=(-0.6, len(axes["leads"]) - 0.4), xticks=range(len(axes["leads"])))
            for panel in row:
                panel.tick_params(labelsize=7.5, labelbottom=place == len(clusters), length=2.5)
            lines = [f"cluster {cluster['cluster']}", f"{100 * cluster['share']:.2f} % of tokens"]
            lines += [f"{100 * cluster['share_of_records']:.0f} % of records"]
            for line, text in enumerate(lines):
                how = {"fontweight": "bold", "fontsize": 9.0} if line == 0 else {"fontsize": 8.0}
                row[0].text(-0.175, 0.80 - 0.19 * line, text, transform=row[0].transAxes, ha="right", **how)
        for panel, below, title, label in zip(
            grid[0],
            grid[-1],
            ("Samples of its tokens", "Power", "Position in the beat", "Lead"),
            (f"time in the token (s); {unit}", "frequency (Hz); dB", "R to R; % of tokens", "% of tokens"),
            strict=True,
        ):
            panel.set_title(title, fontsize=9.5)
            below.set_xlabel(label, fontsize=8)
        grid[-1][2].set_xticklabels(["R", "¼", "½", "¾", "R"])
        grid[-1][3].set_xticklabels(axes["leads"], fontsize=7, rotation=45)
    return figure


def _samples(axes: Axes, cluster: dict[str, Any], of: dict[str, Any]) -> None:
    t, mean, sd = of["time_s"], cluster["mean"], cluster["sd"]
    for example in cluster["examples"]:
        axes.plot(t, example, color="#8a94a0", linewidth=0.6, alpha=0.75, label="example")
    axes.fill_between(t, mean - sd, mean + sd, color=BLUE, alpha=0.18, linewidth=0, label="mean ± SD")
    axes.plot(t, mean, color=BLUE, linewidth=1.6, label="mean")
    axes.set_xlim(t[0], t[-1])
    axes.yaxis.set_major_locator(MaxNLocator(3))
    # Not so near that a cluster of flat tokens shows the last bits of its numbers.
    low, high = axes.get_ylim()
    room = max(0.0, 0.02 - (high - low)) / 2
    axes.set_ylim(low - room, high + room)


def _spectrum(axes: Axes, cluster: dict[str, Any], of: dict[str, Any]) -> None:
    frequency, power = of["frequency_hz"][1:], np.asarray(cluster["power_density"])[1:]
    strongest = power.max()
    if strongest > 0:
        level = 10 * np.log10(np.maximum(power / strongest, 1e-12))
        axes.plot(frequency, level, color=BLUE, linewidth=1.4)
    axes.set(xlim=(0, frequency[-1]), ylim=(-_RANGE_DB, 3), yticks=[-40, -20, 0])


def _shares(axes: Axes, x: np.ndarray, counts: np.ndarray, of_all: np.ndarray) -> None:
    """Bars of a cluster's shares, and a step of those of all tokens."""
    width = x[1] - x[0]
    share = 100 * np.asarray(counts) / max(counts.sum(), 1)
    axes.bar(x, share, width=0.86 * width, color=BLUE, linewidth=0, label="cluster")
    all_tokens = 100 * np.asarray(of_all) / max(of_all.sum(), 1)
    edges = np.concatenate([x - width / 2, x[-1:] + width / 2])
    axes.stairs(all_tokens, edges, color=VERMILION, linewidth=1.2, label="all tokens")
    axes.set_ylim(0, 1.12 * max(share.max(), all_tokens.max(), 1e-9))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.grid(False, axis="x")


def information_bars(rows: Sequence[tuple[str, Any]]) -> Figure:
    """What the cluster of one token tells of lead, beat and each task, in percent of its entropy, beside chance.

    Args:
        rows: Name and :class:`hubert_ecg.evaluation.audit.Information`.
    """
    with style():
        figure = Figure(figsize=(7.2, 0.62 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(rows))[::-1]
        shares = [100 * info.share for _, info in rows]
        axes.barh(y, shares, height=0.62, color=BLUE, linewidth=0, label="told")
        for at, (_, info) in zip(y, rows, strict=True):
            axes.plot([100 * info.chance] * 2, [at - 0.36, at + 0.36], color=VERMILION, linewidth=1.6, label="chance")
            axes.text(100 * info.share, at, f" {100 * info.share:.2g} %", va="center", ha="left", fontsize=8, color=INK)
        axes.set_yticks(y, [name for name, _ in rows])
        axes.set(xlim=(0, 1.15 * max([*shares, 1e-3])), ylim=(-0.6, len(rows) - 0.4))
        axes.set_xlabel("share of the entropy that the cluster of one token tells (%); line: by chance")
        axes.grid(False, axis="y")
    return figure
