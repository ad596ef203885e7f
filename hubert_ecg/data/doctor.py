"""What is in a store, and what of it somebody should look at before training on it.

Everything comes from the index, a column at a time, so that a million records stay within a few hundred megabytes; only
recordings that may be copies of each other are read.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.data.duplicates import duplicates
from hubert_ecg.data.folds import split_name
from hubert_ecg.data.quality import LEAD_FAULTS
from hubert_ecg.data.record import lead_name
from hubert_ecg.data.store import SPLITS, label_column
from hubert_ecg.signal import LEADS

if TYPE_CHECKING:
    import pyarrow as pa

    from hubert_ecg.data.store import Store

FORMAT_VERSION = 1
RESIDUAL_EDGES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1)
# Of each list of records; their number is always whole.
MAX_LISTED = 1000
# Beyond these, the range of a beat speaks of another unit or gain.
SMALLEST_MV, LARGEST_MV = 0.15, 10.0
LARGE_RESIDUAL = 0.3
_NAMED = ("record_id", "source")
_NO_SPLIT = "none"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A kind of oddity: its name, what it means, and which records have it in what way."""

    name: str
    title: str
    meaning: str
    positions: np.ndarray
    details: list[str]


def examine(store: Store) -> dict[str, Any]:
    """Counts, rates, durations, leads, labels, oddities, copies and unreadable files of a store, as JSON takes them.

    Lists name at most 1000 records each. Everything is as the store has it: records with an oddity are in it like all
    others.

    Raises:
        UserError: The store was packed by a version that did not look at its recordings.
    """
    missing = {*LEAD_FAULTS, "signal_hash"} - set(store.columns)
    if missing:
        raise UserError(f"store {store.path} was packed by an earlier version: prepare it again to examine it")
    splits = _splits(store)
    copies = duplicates(store)
    odd = findings(store)
    flagged = np.unique(np.concatenate([finding.positions for finding in odd]))
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dataset": store.dataset,
        "store_hash": store.manifest["hash"],
        "settings": store.manifest["settings"],
        "num_files": len(store) + len(store.skipped),
        "num_records": len(store),
        "hours": float(store.column("duration_s").sum() / 3600),
        **_patients(store, splits),
        "num_flagged": len(flagged),
        "rates_hz": _counts(store.column("source_rate_hz")),
        "durations_s": _durations(store),
        **_leads(store),
        "limb_residual": _histogram(store.column("limb_residual"), np.array(RESIDUAL_EDGES)),
        "splits": {"from": store.splits, **_counts(splits, ("train", "validation", "test", _NO_SPLIT))},
        "tasks": {task: _labels(store, task, splits) for task in store.tasks},
        "dropped_labels": store.manifest.get("dropped_labels", {}),
        "findings": {
            finding.name: {
                "title": finding.title,
                "meaning": finding.meaning,
                "num_records": len(finding.positions),
                "records": [
                    {**named, "detail": detail}
                    for named, detail in zip(
                        _named(store, finding.positions[:MAX_LISTED]), finding.details[:MAX_LISTED], strict=True
                    )
                ],
            }
            for finding in odd
        },
        "duplicates": _groups(store, copies, splits),
        "unreadable": _unreadable(store),
        "datasets": _counts(store.datasets),
    }
    return result | {"remarks": remarks(result)}


def remarks(found: dict[str, Any]) -> list[str]:
    """What somebody who trains on these records should not overlook, in sentences, the gravest first."""
    said = []
    copies, unreadable = found["duplicates"], found["unreadable"]
    splits = "in more than one of training, validation and test"
    if count := copies["num_across_splits"]:
        said.append(f"{_many(count, 'recording')} {_are(count)} {splits}: what is measured on the copies is no test.")
    if count := found["patients_in_several_splits"]:
        said.append(f"{_many(count, 'patient')} {_are(count)} {splits}.")
    if unreadable["num_files"]:
        count, all_files = unreadable["num_files"], found["num_files"]
        said.append(f"{_many(count, 'file')} of {all_files} {_are(count)} unreadable and left out.")
    if count := copies["num_groups"]:
        across = f", {copies['num_across_datasets']} of them across data sets" if copies["num_across_datasets"] else ""
        records = f"{copies['num_records']} records in all"
        said.append(f"{_many(count, 'recording')} {_are(count)} there more than once, {records}{across}.")
    for finding in found["findings"].values():
        if count := finding["num_records"]:
            said.append(f"{finding['title']}: {_many(count, 'record')}.")
    without = {
        task: of["unlabelled"]["num_records"] for task, of in found["tasks"].items() if of["problem"] != "regression"
    }
    if any(without.values()):
        counts = ", ".join(f"{task} {count}" for task, count in without.items() if count)
        said.append(
            f"Records without a label of a task: {counts} of {found['num_records']}. The store keeps them; fine-"
            "tuning and evaluation keep them as negatives, or drop them with --unlabelled drop."
        )
    for task, labels in found["dropped_labels"].items():
        said.append(f"Task {task}: left out, because only one patient has them: {', '.join(labels)}.")
    return said


def findings(store: Store) -> list[Finding]:
    """The oddities of a store's records, from its index."""
    found = []
    for name, title, meaning in (
        ("flat_leads", "Flat leads", "the lead holds one value throughout"),
        ("partly_flat_leads", "Partly flat leads", "the lead holds one value for 1 s and longer"),
        ("clipped_leads", "Clipped leads", "the lead comes to an extreme steeply, stays there, and leaves it steeply"),
        ("gap_leads", "Missing samples", "the file marks samples of the lead as missing; they were bridged by lines"),
    ):
        positions, details = _leads_named(store, name)
        found.append(Finding(name, title, meaning, positions, details))
    size = store.column("size_mv")
    odd = np.flatnonzero((size > 0) & ((size < SMALLEST_MV) | (size > LARGEST_MV)))
    found.append(
        Finding(
            "size",
            "Unusual size",
            f"a beat of less than {SMALLEST_MV:g} or more than {LARGEST_MV:g} mV: another unit or gain, or artefacts",
            odd,
            [f"{mv:.3g} mV" for mv in size[odd]],
        )
    )
    residual, mend, swap = (store.column(name) for name in ("limb_residual", "limb_mend", "suspected_swap"))
    mended = np.flatnonzero([value is not None for value in mend])
    found.append(
        Finding(
            "limb_columns",
            "Limb leads named or signed wrongly",
            "they break the laws of Einthoven and Goldberger, and one exchange or sign brings them back",
            mended,
            [f"{mend[i]} (residual {residual[i]:.2f})" for i in mended],
        )
    )
    large = np.setdiff1d(np.flatnonzero(np.nan_to_num(residual) > LARGE_RESIDUAL), mended)
    large = large[np.argsort(-residual[large], kind="stable")]
    found.append(
        Finding(
            "limb_residual",
            "Limb leads that disagree",
            f"over {LARGE_RESIDUAL:g} of their size breaks the laws of Einthoven and Goldberger, with any exchange",
            large,
            [f"residual {residual[i]:.2f}" for i in large],
        )
    )
    swapped = np.flatnonzero([value is not None for value in swap])
    found.append(
        Finding(
            "electrodes",
            "Electrodes exchanged (suspected)",
            "the chest leads fit limb leads with two electrodes exchanged better than those recorded",
            swapped,
            [str(swap[i]) for i in swapped],
        )
    )
    return found


def _splits(store: Store) -> np.ndarray:
    """Name of the split of each record."""
    names = np.array([split_name(fold) or _NO_SPLIT for fold in range(11)], dtype=object)
    return names[store.folds]


def _counts(values: np.ndarray, order: tuple[str, ...] = ()) -> dict[str, int]:
    """How often each value occurs, the commonest first where no order is given; nothing of what does not occur."""
    counter: collections.Counter[Any] = collections.Counter(values.tolist())
    names = [name for name in order if name in counter] if order else [name for name, _ in counter.most_common()]
    return {f"{name:g}" if isinstance(name, float) else str(name): counter[name] for name in names}


def _histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    known = values[np.isfinite(values.astype(np.float64))].astype(np.float64)
    counts = np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0]
    return {"num_records": len(known), "edges": edges.tolist(), "counts": counts.tolist()}


def _durations(store: Store) -> dict[str, Any]:
    values = store.column("duration_s")
    quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).round(3).tolist()
    low, high = np.floor(values.min()), np.ceil(values.max())
    edges = np.linspace(low, max(high, low + 1), 31)
    named = dict(zip(("min", "lower_quartile", "median", "upper_quartile", "max"), quantiles, strict=True))
    return named | {"histogram": _histogram(values, edges)}


def _patients(store: Store, splits: np.ndarray) -> dict[str, Any]:
    import pandas as pd

    patients, sex = store.column("patient_id"), store.column("sex")
    known = pd.notna(patients)
    pairs = pd.DataFrame({"patient": patients[known], "split": splits[known]}).drop_duplicates()
    pairs = pairs[pairs["split"] != _NO_SPLIT]
    age = store.column("age").astype(np.float64)
    age = age[np.isfinite(age)]
    return {
        "num_patients": len(pd.unique(patients[known])) if known.any() else None,
        "num_without_patient": int((~known).sum()),
        "patients_in_several_splits": int(pairs["patient"].duplicated().sum()),
        "ages": {
            "num_records": len(age),
            "median": float(np.median(age)) if len(age) else None,
            "min": float(age.min()) if len(age) else None,
            "max": float(age.max()) if len(age) else None,
        },
        "sex": _counts(np.where(pd.notna(sex), sex, "unknown"), ("female", "male", "unknown")),
    }


def _leads(store: Store) -> dict[str, Any]:
    """For each lead, how many records measured it, derived it or lack it, and what is odd about it."""
    recorded: collections.Counter[tuple[str, ...]] = collections.Counter()
    for batch in store.batches("leads"):
        recorded.update(collections.Counter(map(tuple, batch.column(0).to_pylist())))
    measured, num_leads = dict.fromkeys(LEADS, 0), collections.Counter[str]()
    for names, count in recorded.items():
        standard = set(LEADS) & {lead_name(name) for name in names}
        num_leads[str(len(standard))] += count
        for lead in standard:
            measured[lead] += count
    present = store.present(np.arange(len(store))).sum(0)
    odd = {name: _lead_counts(store, name) for name in LEAD_FAULTS}
    return {
        "num_leads": dict(sorted(num_leads.items(), key=lambda item: -int(item[0]))),
        "leads": {
            lead: {
                "measured": measured[lead],
                "derived": max(int(present[place]) - measured[lead], 0),
                "absent": len(store) - int(present[place]),
                **{name: of.get(lead, 0) for name, of in odd.items()},
            }
            for place, lead in enumerate(LEADS)
        },
    }


def _lead_counts(store: Store, name: str) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    for batch in store.batches(name):
        counts.update(batch.column(0).flatten().to_pylist())
    return counts


def _leads_named(store: Store, name: str) -> tuple[np.ndarray, list[str]]:
    """Records for which a column of leads names some, and which."""
    positions: list[np.ndarray] = []
    details: list[str] = []
    start = 0
    for batch in store.batches(name):
        column = batch.column(0)
        here = np.flatnonzero(_lengths(column))
        positions.append(here + start)
        details += [", ".join(leads) for leads in column.take(here).to_pylist()]
        start += len(column)
    return np.concatenate(positions) if positions else np.empty(0, np.int64), details


def _lengths(column: pa.ListArray) -> np.ndarray:
    lengths = column.value_lengths().fill_null(0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False))


def _labels(store: Store, task: str, splits: np.ndarray) -> dict[str, Any]:
    """Records of each label in each split, and which have none."""
    order = [name for name in (*SPLITS[:3], _NO_SPLIT) if (splits == name).any()]
    if store.problem_of(task) == "regression":
        without = np.flatnonzero(~np.isfinite(store.targets(task)[:, 0]))
        table: dict[str, dict[str, int]] = {}
    else:
        names = store.label_names(task)
        counts = np.zeros((len(names), len(order)), np.int64)
        place = {name: number for number, name in enumerate(order)}
        code = np.array([place[name] for name in splits])
        number = {name: row for row, name in enumerate(names)}
        lacking, start = [], 0
        for batch in store.batches(label_column(task)):
            column = batch.column(0)
            lengths = _lengths(column)
            labels = np.array([number[label] for label in column.flatten().to_pylist()], np.int64)
            here = code[start : start + len(column)]
            np.add.at(counts, (labels, np.repeat(here, lengths)), 1)
            # Of a data set without the task there is nothing to say.
            known = column.is_valid().to_numpy(zero_copy_only=False)
            lacking.append(np.flatnonzero(known & (lengths == 0)) + start)
            start += len(column)
        without = np.concatenate(lacking)
        table = {
            name: {"all": int(row.sum()), **dict(zip(order, row.tolist(), strict=True))}
            for name, row in zip(names, counts, strict=True)
        }
    return {
        "problem": store.problem_of(task),
        "labels": dict(sorted(table.items(), key=lambda item: -item[1]["all"])),
        "unlabelled": {
            "num_records": len(without),
            "splits": _counts(splits[without], tuple(order)),
            "records": _named(store, without[:MAX_LISTED]),
        },
    }


def _named(store: Store, positions: np.ndarray) -> list[dict[str, Any]]:
    rows = store.rows(positions, *_NAMED)
    return [{"position": int(position), **row} for position, row in zip(positions, rows, strict=True)]


def _groups(store: Store, groups: list[np.ndarray], splits: np.ndarray) -> dict[str, Any]:
    members = np.concatenate(groups) if groups else np.empty(0, np.int64)
    rows = iter(store.rows(members, *_NAMED, "dataset", "duration_s"))
    listed = []
    for group in groups:
        records = [{"position": int(position), **next(rows), "split": splits[position]} for position in group]
        listed.append(
            {
                "across_splits": len({row["split"] for row in records} - {_NO_SPLIT}) > 1,
                "across_datasets": len({row["dataset"] for row in records}) > 1,
                "records": records,
            }
        )
    # Those that spoil a test first.
    listed.sort(key=lambda group: (not group["across_splits"], not group["across_datasets"]))
    return {
        "num_groups": len(groups),
        "num_records": len(members),
        "num_across_splits": sum(group["across_splits"] for group in listed),
        "num_across_datasets": sum(group["across_datasets"] for group in listed),
        "groups": listed[:MAX_LISTED],
    }


def _unreadable(store: Store) -> dict[str, Any]:
    reasons: dict[str, list[tuple[str, str]]] = {}
    for source, reason in store.skipped:
        # The same reason with other numbers.
        reasons.setdefault(re.sub(r"\d+(\.\d+)?", "N", reason), []).append((source, reason))
    grouped = sorted(reasons.values(), key=len, reverse=True)
    return {
        "num_files": len(store.skipped),
        "reasons": [{"reason": group[0][1], "num_files": len(group)} for group in grouped],
        "files": [{"source": source, "reason": reason} for group in grouped for source, reason in group][:MAX_LISTED],
    }


def _many(count: int, what: str) -> str:
    """
    >>> _many(1, "file"), _many(2, "file")
    ('1 file', '2 files')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
