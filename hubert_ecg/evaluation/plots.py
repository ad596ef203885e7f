"""Pictures for reports, as matplotlib figures that know nothing of pyplot or of a display.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which stay apart in colour-blind eyes.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hubert_ecg.signal import LEADS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#8c6d1f", "#6b7683")
# svg() turns these two into the page's own colours, so that a figure follows a dark page.
INK, RULE = "#2b3037", "#d9dde2"
PAPER, PAPER_MINOR, PAPER_MAJOR, TRACE = "#fff9f8", "#f8d3d1", "#eba5a2", "#16181d"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "svg.fonttype": "path",
    "svg.hashsalt": "hubert-ecg",
}
# What an ECG recorder prints.
_SPEED_MM_PER_S = 25.0
_GAINS_MM_PER_MV = (10.0, 5.0, 2.5, 1.25)
_GAINS_MM_PER_UNIT = (20.0, 15.0, 10.0, 8.0, 5.0, 4.0, 2.5, 2.0, 1.0)
_PULSE_S = 0.2
_MM_PER_INCH = 25.4
_MAX_SECONDS = 10.0
_ROW_MM, _MARGIN_MM, _FOOT_MM, _PULSE_MM = 27.0, 5.0, 5.0, 10.0
_MIN_WIDTH_MM = 110.0
# Curves named one by one in a legend; beyond it only the best and the worst.
_MAX_NAMED, _NAMED_AT_ENDS = 8, 3


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The one style of all figures, whatever the caller has set in matplotlib; his settings come back afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        # A label in a script that the font lacks shows boxes in the picture; tables have it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def svg(figure: Figure, prefix: str) -> str:
    """A figure as an ``<svg>`` element to stand in an HTML page.

    Args:
        figure: Any figure of this module.
        prefix: Put before the ids inside, so that two figures on one page do not share any.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    # Size comes from the page; the viewBox keeps the shape.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")


def ecg_paper(
    signal: np.ndarray,
    rate: float,
    lead_names: Sequence[str] = LEADS,
    title: str | None = None,
    unit: str = "mV",
) -> Figure:
    """An ECG as a recorder prints it: 25 mm/s and 10 mm/mV on paper with lines every 1 and 5 mm.

    Twelve leads of 10 s stand in three rows and four columns of 2.5 s, each column the next piece of time, above a
    rhythm strip of lead II. Shorter records of twelve leads stand in six rows and two columns. Other sets of leads
    stand one below the other. A wave too large for its row halves the gain, as the recorder does. The figure is in true
    size: printed at 100 %, a large square is 5 mm.

    Args:
        signal: [L, T] float; NaN leaves a gap. Of records over 10 s the first 10 s are drawn.
        rate: Sampling rate in Hz.
        lead_names: L names.
        title: Written above the paper.
        unit: "mV"; anything else stands for scaled units, whose gain is fitted to the rows and written on the paper.
    """
    signal = np.asarray(signal, dtype=np.float64)
    if signal.ndim != 2 or 0 in signal.shape:
        raise ValueError(
            f"ecg_paper: signal must be [L, T] with at least one lead and sample, got {list(signal.shape)}"
        )
    if len(lead_names) != len(signal):
        raise ValueError(f"ecg_paper: lead_names must be {len(signal)} names, one for each lead, got {len(lead_names)}")
    if not rate > 0:
        raise ValueError(f"ecg_paper: rate must be above 0 Hz, got {rate}")
    signal = signal[:, : max(1, round(_MAX_SECONDS * rate))]
    seconds = signal.shape[1] / rate
    # An electrocardiograph has no DC: each lead is drawn around its own median.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        signal = signal - np.nanmedian(np.where(np.isfinite(signal), signal, np.nan), axis=1, keepdims=True)
    rows = _paper_rows(list(lead_names), seconds)
    gain = _gain(signal, unit)

    trace_mm = _SPEED_MM_PER_S * seconds
    width = max(_MIN_WIDTH_MM, _PULSE_MM + trace_mm + 2 * _MARGIN_MM)
    # Whole large squares, so that the paper ends on a line.
    width = 5 * np.ceil(width / 5)
    height = 5 * np.ceil((_ROW_MM * len(rows) + _MARGIN_MM + _FOOT_MM) / 5)
    title_mm = 9.0 if title else 0.0
    with style():
        figure = Figure(figsize=(width / _MM_PER_INCH, (height + title_mm) / _MM_PER_INCH))
        axes = figure.add_axes((0, 0, 1, height / (height + title_mm)), label="paper")
        axes.set(xlim=(0, width), ylim=(0, height), aspect="equal", facecolor=PAPER)
        axes.grid(False)
        axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=PAPER_MAJOR, linewidth=1.2)
        for step, colour, line in ((1, PAPER_MINOR, 0.35), (5, PAPER_MAJOR, 0.6)):
            x, y = np.arange(0, width + 0.5, step), np.arange(0, height + 0.5, step)
            lines = [[(at, 0), (at, height)] for at in x] + [[(0, at), (width, at)] for at in y]
            axes.add_collection(LineCollection(lines, colors=colour, linewidths=line, zorder=0, label=f"{step} mm"))

        start = _MARGIN_MM + _PULSE_MM
        for row, pieces in enumerate(rows):
            middle = height - _MARGIN_MM - _ROW_MM * (row + 0.6)
            rise, fall = 1.5, 1.5 + _PULSE_S * _SPEED_MM_PER_S
            pulse_x = _MARGIN_MM + np.array([0, rise, rise, fall, fall, fall + 2])
            pulse_y = middle + gain * np.array([0.0, 0, 1, 1, 0, 0])
            axes.plot(pulse_x, pulse_y, color=TRACE, linewidth=0.8, solid_joinstyle="miter", label="calibration pulse")
            for lead, begin, end in pieces:
                samples = slice(round(begin * rate), round(end * rate))
                t = np.arange(samples.start, min(samples.stop, signal.shape[1])) / rate
                index = list(lead_names).index(lead)
                x = start + _SPEED_MM_PER_S * t
                axes.plot(x, middle + gain * signal[index, samples], color=TRACE, linewidth=0.8, label=f" {lead}")
                left = start + _SPEED_MM_PER_S * begin
                if begin > 0:
                    axes.plot([left] * 2, [middle - 3, middle + 3], color=TRACE, linewidth=0.8, label="lead change")
                _words(axes, left + 1.2, middle + 9.5, lead, fontsize=9, fontweight="bold")
        if unit == "mV":
            scale = f"{_SPEED_MM_PER_S:g} mm/s   {gain:g} mm/mV"
        else:
            scale = f"{_SPEED_MM_PER_S:g} mm/s   {gain:g} mm/unit ({unit}, not mV)"
        _words(axes, _MARGIN_MM, 2.2, f"{scale}   {rate:g} Hz", fontsize=7.5)
        if title:
            figure.text(
                _MARGIN_MM / width, 1 - 5.5 / (height + title_mm), title, fontsize=10, fontweight="bold", va="center"
            )
    return figure


def training_curves(history: pd.DataFrame, title: str | None = None) -> Figure:
    """One panel for each logged number over the optimiser steps, one line for each split.

    Args:
        history: Columns ``step`` and ``split``, and one column for each number; empty cells are skipped.
        title: Written above the panels.
    """
    missing = {"step", "split"} - set(history.columns)
    if missing:
        raise ValueError(f"training_curves: history must have the columns step and split, got {list(history.columns)}")
    numbers = history.drop(columns=["step", "split", "epoch"], errors="ignore").select_dtypes("number")
    shown = [name for name in numbers.columns if numbers[name].notna().any()]
    if not shown:
        raise ValueError("training_curves: history must have a column of numbers beside step and split, got none")
    splits = list(dict.fromkeys(history["split"].astype(str)))
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = -(-len(shown) // columns)
    with style():
        figure = Figure(figsize=(3.5 * columns, 2.5 * rows + (0.3 if title else 0)), layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, name in zip(grid.flat, shown, strict=False):
            for split, colour in zip(splits, _cycle(len(splits)), strict=True):
                part = history[(history["split"].astype(str) == split) & history[name].notna()].sort_values("step")
                if len(part):
                    marker = "o" if len(part) <= 30 else None
                    axes.plot(part["step"], part[name], color=colour, label=split, marker=marker, markersize=3)
            axes.set_title(name.replace("_", " "))
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.margins(x=0.02)
            axes.legend(*_legend(axes))
        for axes in grid.flat[len(shown) :]:
            axes.remove()
    return figure


def cluster_use(counts: np.ndarray) -> Figure:
    """How many tokens each cluster holds, largest first, and how many clusters that is worth.

    The perplexity exp(-sum_k p_k ln p_k) is K where all clusters are used alike, and 1 where one holds everything.

    Args:
        counts: [K] number of tokens of each cluster.
    """
    counts = np.sort(np.asarray(counts, dtype=np.float64))[::-1]
    if counts.ndim != 1 or not counts.sum() > 0 or (counts < 0).any():
        raise ValueError(
            f"cluster_use: counts must be [K] with at least one token, got {counts.shape} and sum {counts.sum()}"
        )
    K, share = len(counts), counts / counts.sum()
    unused = int((counts == 0).sum())
    with style():
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.subplots()
        axes.bar(np.arange(K), 100 * share, width=0.86 if K <= 200 else 1.0, color=BLUE, linewidth=0)
        axes.axhline(100 / K, color=VERMILION, linewidth=1.2, linestyle=(0, (4, 3)), label="used alike")
        axes.set_title(
            f"Perplexity {perplexity(counts):.1f} of {K} clusters" + (f", {unused} unused" if unused else "")
        )
        axes.set(xlabel="cluster, largest first", ylabel="share of tokens (%)", xlim=(-0.6, K - 0.4))
        axes.grid(False, axis="x")
        axes.legend(loc="upper right")
    return figure


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of the cluster sizes, in clusters.

    >>> round(perplexity([5, 5, 0]), 6)
    2.0
    """
    share = np.asarray(counts, dtype=np.float64)
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def roc_curves(targets: np.ndarray, scores: np.ndarray, label_names: Sequence[str]) -> Figure:
    """ROC curve of each defined label, and their mean at equal false positive rate.

    Args:
        targets: [N, C] 0 or 1.
        scores: [N, C] float.
        label_names: C names.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    at = np.linspace(0, 1, 501)
    curves = []
    for name, y, s in _defined("roc_curves", targets, scores, label_names):
        x, y_values, _ = roc_curve(y, s)
        mean = np.interp(at, x, y_values)
        curves.append((float(roc_auc_score(y, s)), name, x, y_values, mean))
    with style():
        figure, axes = _square("False positive rate", "True positive rate", "ROC")
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1.2, zorder=1, label="chance")
        _curves(axes, curves, at, "AUROC")
    return figure


def pr_curves(targets: np.ndarray, scores: np.ndarray, label_names: Sequence[str]) -> Figure:
    """Precision-recall curve of each defined label, and their mean at equal recall.

    Args:
        targets: [N, C] 0 or 1.
        scores: [N, C] float.
        label_names: C names.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    at = np.linspace(0, 1, 501)
    curves = []
    for name, y, s in _defined("pr_curves", targets, scores, label_names):
        precision, recall, _ = precision_recall_curve(y, s)
        # Of each recall above 0 the highest threshold that reaches it: the steps that average precision sums.
        recall, first = np.unique(recall[::-1], return_index=True)
        recall, precision = recall[1:], precision[::-1][first[1:]]
        mean = precision[np.searchsorted(recall, at)]
        curves.append(
            (float(average_precision_score(y, s)), name, np.r_[0, recall], np.r_[precision[0], precision], mean)
        )
    with style():
        figure, axes = _square("Recall", "Precision", "Precision-recall")
        _curves(axes, curves, at, "AUPRC", drawstyle="steps-pre")
    return figure


def _paper_rows(leads: list[str], seconds: float) -> list[list[tuple[str, float, float]]]:
    """Rows from top to bottom; each is (lead, from, to) in seconds, from left to right."""
    if sorted(leads) != sorted(LEADS):
        return [[(lead, 0.0, seconds)] for lead in leads]
    columns = 4 if seconds > 8 else 2
    per_column, piece = 12 // columns, seconds / columns
    order = list(LEADS)
    rows = [
        [(order[column * per_column + row], column * piece, (column + 1) * piece) for column in range(columns)]
        for row in range(per_column)
    ]
    return [*rows, [("II", 0.0, seconds)]]


def _gain(signal: np.ndarray, unit: str) -> float:
    """The largest usual gain at which nearly all of nearly every lead stays within its row."""
    gains = _GAINS_MM_PER_MV if unit == "mV" else _GAINS_MM_PER_UNIT
    finite = [lead[np.isfinite(lead)] for lead in signal]
    ranges = [np.ptp(np.quantile(lead, [0.002, 0.998])) for lead in finite if lead.size]
    span = float(np.quantile(ranges, 0.9)) if ranges else 0.0
    # A recorder lets waves of 3 mV cross into the next row before it halves the gain; scaled units have no such habit.
    room = 1.35 * _ROW_MM if unit == "mV" else 0.9 * _ROW_MM
    return next((gain for gain in gains if gain * span <= room), gains[-1])


def _words(axes: Axes, x: float, y: float, text: str, **how: Any) -> None:
    """Text on paper that lightens the lines behind it and lets traces pass over it."""
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8, "alpha": 0.75}
    axes.text(x, y, text, color=TRACE, zorder=1, bbox=box, **how)


def _defined(
    function: str, targets: np.ndarray, scores: np.ndarray, label_names: Sequence[str]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    from hubert_ecg.evaluation.metrics import check_scores

    targets, scores = check_scores(function, targets, scores, "multilabel")
    if len(label_names) != scores.shape[1]:
        raise ValueError(f"{function}: label_names must be {scores.shape[1]} names, got {len(label_names)}")
    columns = np.flatnonzero(targets.any(0) & ~targets.all(0)).tolist()
    if not columns:
        raise ValueError(f"{function}: targets must have a label with positives and negatives, got none")
    return [(str(label_names[c]), targets[:, c], scores[:, c]) for c in columns]


def _square(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 4.1), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", anchor="W", title=title)
    return figure, axes


def _curves(axes: Axes, curves: list[tuple[Any, ...]], at: np.ndarray, metric: str, **how: Any) -> None:
    """Thin lines for labels, a bold one for their mean, and a legend that stays readable for any number of labels."""
    curves = sorted(curves, key=lambda curve: -curve[0])
    many = len(curves) > _MAX_NAMED
    ends = (
        {*range(_NAMED_AT_ENDS), *range(len(curves) - _NAMED_AT_ENDS, len(curves))} if many else set(range(len(curves)))
    )
    colours = iter(_cycle(len(ends)))
    handles, names = [], []
    for rank, (value, name, x, y, _) in enumerate(curves):
        named = rank in ends
        (line,) = axes.plot(
            x,
            y,
            color=next(colours) if named else "#8a94a0",
            linewidth=1.1 if named else 0.6,
            alpha=0.95 if named else 0.35,
            zorder=3 if named else 2,
            label=f" {name}",
            **how,
        )
        if many and rank == len(curves) - _NAMED_AT_ENDS:
            handles.append(_words_only(axes))
            names.append(f"... {len(curves) - 2 * _NAMED_AT_ENDS} more ...")
        if named:
            handles.append(line)
            names.append(f"{value:.3f}  {_short(name)}")
    if len(curves) > 1:
        (line,) = axes.plot(
            at, np.mean([c[4] for c in curves], axis=0), color=INK, linewidth=2.6, zorder=4, label="macro"
        )
        handles.insert(0, line)
        names.insert(0, f"{np.mean([c[0] for c in curves]):.3f}  macro ({len(curves)})")
    legend = axes.legend(handles, names, title=metric, loc="center left", bbox_to_anchor=(1.02, 0.5), alignment="left")
    legend.get_title().set_fontweight("bold")


def _words_only(axes: Axes) -> Any:
    """An invisible handle, for a legend entry that is only words."""
    return axes.plot([], [], linestyle="none", label="_nothing")[0]


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    lines = axes.get_lines()
    return lines, [f"{line.get_label()}" for line in lines]


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _short(name: str, length: int = 26) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
