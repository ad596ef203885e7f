"""What is in a store, as a page and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hubert_ecg.data import doctor
from hubert_ecg.evaluation.plots import BLUE, ecg_paper, style
from hubert_ecg.evaluation.report import pictures, to_text, write_page
from hubert_ecg.files import write_text
from hubert_ecg.signal import LEADS

if TYPE_CHECKING:
    from hubert_ecg.data import Store

NAME = "doctor"
# Recordings that are drawn: of each kind of finding so many, and so many in all, in this order.
_DRAWN = ("electrodes", "limb_columns", "limb_residual", "clipped_leads", "partly_flat_leads", "size", "gap_leads")
_OF_EACH, _IN_ALL = 2, 8
# Rows of the tables; the JSON file has more.
_ROWS = 30
_MAX_BARS = 8


def write_doctor(store: Store, folder: str | Path) -> dict[str, Any]:
    """Examine a store, and write ``doctor.html`` and ``doctor.json``.

    Returns:
        What :func:`hubert_ecg.data.doctor.examine` found, and the store's ``read_share`` where it was just packed.

    Raises:
        UserError: The store was packed by a version that did not look at its recordings.
    """
    found = doctor.examine(store)
    if store.read_share is not None:
        found["read_share"] = store.read_share
    path, picture = Path(folder) / NAME, pictures()
    examples = _examples(store, found)
    write_page(
        path.with_suffix(".html"),
        "doctor.html.j2",
        title="Recordings of " + store.dataset.replace(",", ", "),
        found=found,
        store_name=store.path.name,
        num_rows=_ROWS,
        splits=[name for name in ("train", "validation", "test", "none") if name in found["splits"]],
        recordings_picture=picture(_recordings(found)),
        examples=[{**example, "picture": picture(example["picture"])} for example in examples],
        lead_faults={
            "measured": "Measured",
            "derived": "Derived",
            "absent": "Absent",
            "flat_leads": "Flat",
            "partly_flat_leads": "Partly flat",
            "clipped_leads": "Clipped",
            "gap_leads": "With gaps",
        },
        limits=doctor,
    )
    write_text(path.with_suffix(".json"), to_text(found))
    return found


def _examples(store: Store, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    drawn: dict[int, dict[str, Any]] = {}
    for name in _DRAWN:
        finding = found["findings"][name]
        of_this = 0
        for record in finding["records"]:
            if of_this == _OF_EACH or len(drawn) == _IN_ALL:
                break
            position = record["position"]
            note = f"{finding['title']}: {record['detail']}"
            if position in drawn:
                drawn[position]["notes"].append(note)
                continue
            drawn[position] = {"title": record["record_id"], "source": record["source"], "notes": [note]}
            of_this += 1
    for position, example in drawn.items():
        record = store[position]
        example["picture"] = ecg_paper(record.signal, record.sampling_rate_hz, LEADS, unit="scaled")
    widest = max((example["picture"].get_figwidth() for example in drawn.values()), default=1.0)
    for example in drawn.values():
        example["share"] = f"{example['picture'].get_figwidth() / widest:.3f}"
    return list(drawn.values())


def _recordings(found: Mapping[str, Any]) -> Figure:
    """Rates, durations, and how far limb leads are from agreeing, in numbers of records."""
    with style():
        figure = Figure(figsize=(10.8, 2.7), layout="constrained")
        rates, durations, residuals = figure.subplots(1, 3, width_ratios=[1, 1.5, 1.3])
        _bars(rates, [f"{rate}" for rate in found["rates_hz"]], list(found["rates_hz"].values()))
        rates.set(title="Sampling rate of the file", xlabel="Hz")
        histogram = found["durations_s"]["histogram"]
        durations.stairs(histogram["counts"], histogram["edges"], fill=True, color=BLUE)
        # A few long records are not to be lost beside many of one length.
        durations.set_yscale("symlog", linthresh=1)
        durations.yaxis.set_major_formatter("{x:g}")
        durations.set(title="Duration", xlabel="s", ylim=(0, None))
        histogram = found["limb_residual"]
        edges = histogram["edges"]
        names = [f"{low:g}–{high:g}" for low, high in itertools.pairwise(edges)]
        _bars(residuals, names, histogram["counts"], rotation=40)
        residuals.set(title="Limb leads: residual", xlabel="share that breaks their laws")
        for axes in (rates, residuals):
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(False, axis="x")
        rates.set_ylabel("records")
    return figure


def _bars(axes: Any, names: Sequence[str], counts: Sequence[int], rotation: float = 0) -> None:
    if len(names) > _MAX_BARS:
        names = [*names[: _MAX_BARS - 1], "others"]
        counts = [*counts[: _MAX_BARS - 1], sum(counts[_MAX_BARS - 1 :])]
    at = np.arange(len(names))
    axes.bar(at, counts, width=0.72, color=BLUE, linewidth=0)
    axes.set_xticks(at, names, rotation=rotation, ha="right" if rotation else "center", rotation_mode="anchor")
    axes.set_xlim(-0.8, max(len(names) - 0.2, 1.8))
    for x, count in zip(at, counts, strict=True):
        if count:
            axes.text(x, count, str(count), ha="center", va="bottom", fontsize=7.5)
