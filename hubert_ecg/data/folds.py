"""Splits: folds 1 to 8 train, 9 validates and 10 tests.

Official folds hold where a data set publishes them. Elsewhere they are dealt: all records of a patient into one fold,
each label spread evenly (iterative stratification: Sechidis et al., On the stratification of multi-label data, ECML
2011, by the library iterative-stratification), the same on every machine. A label of one patient is dropped, of two
goes to train and test, of three or more to each of the three splits. A table of the user's may say otherwise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, learnable, number, patient_name
from hubert_ecg.data.readers import READERS
from hubert_ecg.data.tables import read_table

NUM_FOLDS = 10
VALIDATION_FOLD, TEST_FOLD = 9, 10
# Of a record that a given table of splits leaves out: it is in no split.
NO_FOLD = 0
# Not a run's seed: a model trained under one seed must not meet its training records in a test under another.
FOLD_SEED = 0
# A small set fills train, validation and test first.
_FIRST_BLOCK = (1, 9, 10, 2, 3, 4, 5, 6, 7, 8)
# Shares of fewer patients than a few a fold mean nothing: they are dealt.
_FEW = 3 * NUM_FOLDS
_SPLITS = {"train": 1, "training": 1, "test": TEST_FOLD}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), VALIDATION_FOLD)
FOLD_COLUMNS = ("fold", "strat_fold", "split")
_ID_COLUMNS = ("record_id", "filename", "file_name", "ecg_id", "record")


def split_name(fold: int) -> str:
    """ "train", "validation" or "test"; "" for a record of no split."""
    if fold == NO_FOLD:
        return ""
    return {VALIDATION_FOLD: "validation", TEST_FOLD: "test"}.get(fold, "train")


def split_entries(
    dataset: Dataset,
    splits: Mapping[str, int] | None = None,
    path: str | Path = "",
    readable: Callable[[Entry], bool] | None = None,
) -> tuple[list[Entry], dict[str, Any]]:
    """The entries of a data set as they are packed: with folds, and with the labels that a model is to learn.

    In a store of several data sets, each record is in the fold that it has in a store of its data set alone: a model
    that is pretrained on all of them and fine-tuned on one has not seen its test records.

    Args:
        dataset: The data set.
        splits: A table of splits that holds instead of its own.
        path: The file of the table, for messages.
        readable: Says of an entry whether it can be read; None where all can. The others need no fold, and a label
            that only they have is none.

    Returns:
        The entries, and what the manifest says: where the ``folds`` come from, and ``dropped_labels`` of each task.

    Raises:
        UserError: The table knows none of the records.
    """
    given = [entry for entry in dataset.entries() if readable is None or readable(entry)]
    entries, dropped = learnable(given, dataset.synonyms, keep_lone=splits is not None)
    if splits is not None:
        folds = given_folds(splits, [entry.record_id for entry in given], [entry.source for entry in given], path)
        said = "given"
    else:
        origin: dict[str, list[str]] = {}
        folds = []
        for name, part in dataset.parts.items():
            own = [dataset.own(entry) for entry in given if part is dataset or entry.dataset == name]
            if not own:
                continue
            own, _ = learnable(own, part.synonyms)
            official = all(entry.fold is not None for entry in own)
            where = "official" if official else f"by patient, labels spread evenly, seed {FOLD_SEED}"
            origin.setdefault(where, []).append(name)
            task = next((task for task in part.tasks if part.problem_of(task) != "regression"), None)
            folds += assign_folds(own, task)
        said = "; ".join(f"{where} ({', '.join(its)})" if len(origin) > 1 else where for where, its in origin.items())
    entries = [dataclasses.replace(entry, fold=fold) for entry, fold in zip(entries, folds, strict=True)]
    return entries, {"folds": said, "dropped_labels": dropped}


def check_given(folds: Sequence[int], patients: Iterable[str | None], path: str | Path) -> list[str]:
    """What a user should know about the folds that a given table makes: records left out, and patients parted.

    Args:
        folds: The fold of each record.
        patients: The patient of each record, None where it is not known.
        path: The file of the table.
    """
    news = []
    if left_out := list(folds).count(NO_FOLD):
        news.append(f"{path} leaves out {left_out} of {len(folds)} records")
    seen: dict[str, set[str]] = {}
    for fold, patient in zip(folds, patients, strict=True):
        if patient is not None and patient == patient and fold != NO_FOLD:
            seen.setdefault(patient, set()).add(split_name(fold))
    parted = sorted(patient for patient, splits in seen.items() if len(splits) > 1)
    if parted:
        example = f"patient {parted[0]} is in {' and '.join(sorted(seen[parted[0]]))}"
        news.append(f"{path} parts {len(parted)} of {len(seen)} patients: {example}; their tests are no tests")
    return news


def assign_folds(entries: Sequence[Entry], task: str | None = None, seed: int = FOLD_SEED) -> list[int]:
    """The fold of each entry: its official one, else one dealt to its patient.

    Args:
        entries: The entries; those without patient_id are patients of their own.
        task: The task whose labels are spread; None deals at random.
        seed: Seed of the deal. Neither the order of the entries nor anything else matters.
    """
    folds: dict[str, int] = {}
    labels: dict[str, frozenset[str]] = {}
    none: frozenset[str] = frozenset()
    for entry in entries:
        patient = patient_name(entry)
        if entry.fold is not None:
            folds.setdefault(patient, entry.fold)
        known, found = labels.get(patient, none), entry.labels.get(task, ()) if task else ()
        labels[patient] = known.union(found) if found else known
    # Shuffled, and the same whatever the order of the entries.
    shuffled = {patient: labels[patient] for patient in sorted(labels, key=lambda patient: _hash(seed, patient))}
    _deal_rare(shuffled, folds, seed)
    free = {patient: its for patient, its in shuffled.items() if patient not in folds}
    spread = len(free) >= _FEW and any(free.values())
    folds.update(_stratify(free, seed) if spread else _deal(free, set(folds.values()), seed))
    return [entry.fold or folds[patient_name(entry)] for entry in entries]


def _hash(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode(errors="surrogateescape")).digest()


def _deal_rare(labels: Mapping[str, frozenset[str]], folds: dict[str, int], seed: int) -> None:
    """Of each label with fewer than ten patients, deals one to train, test and validation, in this order.

    Ten folds alike in labels cannot do that: a test fold goes short of most labels that so few patients have.
    """
    patients: dict[str, list[str]] = {}
    for patient, its in labels.items():
        for label in its:
            patients.setdefault(label, []).append(patient)
    rare = [label for label, having in patients.items() if 1 < len(having) < NUM_FOLDS]
    for label in sorted(rare, key=lambda label: (len(patients[label]), label)):
        having = patients[label]
        seen = {split_name(folds[patient]) for patient in having if patient in folds}
        wanted = [split for split in ("train", "test", "validation")[: len(having)] if split not in seen]
        for patient in having:
            if wanted and patient not in folds:
                split = wanted.pop(0)
                train = 1 + _hash(seed, f"fold of {patient}")[0] % (VALIDATION_FOLD - 1)
                folds[patient] = train if split == "train" else _SPLITS[split]


def _deal(labels: Mapping[str, frozenset[str]], taken: Collection[int], seed: int) -> dict[str, int]:
    """In the order of their labels, in blocks of ten; the first fills what is empty, train, validation, test first."""
    order = sorted(labels, key=lambda patient: sorted(labels[patient]))
    rng = np.random.Generator(np.random.Philox(key=seed))
    block = [fold for fold in _FIRST_BLOCK if fold not in taken]
    folds: list[int] = []
    while len(folds) < len(order):
        folds += block
        block = (rng.permutation(NUM_FOLDS) + 1).tolist()
    return dict(zip(order, folds, strict=False))


def _stratify(labels: Mapping[str, frozenset[str]], seed: int) -> dict[str, int]:
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    patients = list(labels)
    names = sorted(frozenset().union(*labels.values()))
    column = {name: position for position, name in enumerate(names)}
    # Every patient is one, which evens out the folds' sizes; nobody has the last, and two values make it a label table.
    table = np.zeros((len(patients), len(names) + 2), dtype=bool)
    table[:, -2] = True
    for row, patient in enumerate(patients):
        table[row, [column[name] for name in labels[patient]]] = True
    folds = MultilabelStratifiedKFold(n_splits=NUM_FOLDS, shuffle=True, random_state=seed).split(table, table)
    return {patients[row]: fold for fold, (_, rows) in enumerate(folds, start=1) for row in rows}


def read_splits(path: str | Path) -> dict[str, int]:
    """A table of splits: a file with the columns ``record_id`` or ``filename``, and ``fold`` (1 to 10) or ``split``
    (train, validation, test); see :func:`hubert_ecg.data.tables.read_table`.

    Returns:
        The fold of each name.

    Raises:
        UserError: The file cannot be read, or says something else; the message names the line.
    """
    table = read_table("--splits_from", path)
    name_column, fold_column = table.column(_ID_COLUMNS), table.column(FOLD_COLUMNS)
    if name_column is None or fold_column is None:
        raise UserError(
            f"--splits_from: {path} must have a column record_id or filename, and a column fold or split, "
            f"got {', '.join(table.columns)}"
        )
    folds: dict[str, int] = {}
    for line, row in table.rows.items():
        name, value = row[name_column], row[fold_column]
        fold = fold_of(value)
        if not name:
            raise UserError(f"--splits_from: {table.where(line)}: {name_column} must name a record, got a blank")
        if fold is None:
            raise UserError(
                f"--splits_from: {table.where(line)}: must be a fold from 1 to {NUM_FOLDS}, or train, validation or "
                f"test, got {value!r}"
            )
        if folds.setdefault(name, fold) != fold:
            raise UserError(f"--splits_from: {table.where(line)}: {name} has two folds")
    return folds


def fold_of(value: object) -> int | None:
    """The fold that a table's cell means; None for anything else. Training is fold 1 where all are one.

    >>> fold_of("val"), fold_of("10"), fold_of(3.0), fold_of("11")
    (9, 10, 3, None)
    """
    named = _SPLITS.get(str(value).strip().lower())
    if named is not None:
        return named
    fold = number(value)
    return int(fold) if fold is not None and fold in range(1, NUM_FOLDS + 1) else None


def given_folds(
    splits: Mapping[str, int], record_ids: Iterable[str], sources: Iterable[str], path: str | Path
) -> list[int]:
    """The fold of each record in a table of splits; ``NO_FOLD`` for one that the table leaves out.

    A record goes by its id, its file, or the name of its file without folder and suffix.

    Raises:
        UserError: The table knows none of the records.
    """
    plain: dict[str, int | None] = {}
    for name, fold in splits.items():
        # Files of one name in several folders: without its folder, a name says nothing.
        plain[plain_name(name)] = None if plain.get(plain_name(name), fold) != fold else fold
    folds = []
    for record_id, source in zip(record_ids, sources, strict=True):
        named = splits.get(record_id) or splits.get(source) or plain.get(plain_name(source))
        folds.append(named or NO_FOLD)
    if not any(folds):
        raise UserError(f"--splits_from: {path} has none of the records; it names {', '.join(list(splits)[:3])}, ...")
    return folds


def plain_name(name: str) -> str:
    """A file's name without its folder and its formats.

    >>> plain_name("folder/A0001.hea.npy"), plain_name("visit.2.dat")
    ('A0001', 'visit.2')
    """
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    while (parts := os.path.splitext(name))[1].lower() in {*READERS, ".dat"}:
        name = parts[0]
    return name
