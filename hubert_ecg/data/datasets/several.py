"""Several data sets as one."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, with_synonyms
from hubert_ecg.data.readers import ReadError
from hubert_ecg.data.record import Record
from hubert_ecg.data.store import stream_hash


class Several(Dataset):
    """The records of several data sets, one data set after another.

    A record's id, patient and source begin with the name of its data set, because two data sets may give the same
    number to different people: ``ptbxl/1``. Where several are of one kind, the names of their folders join it:
    ``csv-clinic_a/1``. Tasks are those of all; a record says nothing of a task that its data set does not have.

    Args:
        datasets: At least two.

    Raises:
        UserError: One is there twice, or a task is of numbers here and of labels there.
    """

    def __init__(self, datasets: Sequence[Dataset]):
        self.name = ",".join(dataset.name for dataset in datasets)  # type: ignore[misc]
        self._parts = dict(zip(_names(datasets), datasets, strict=True))
        self.tasks = tuple({task: None for dataset in datasets for task in dataset.tasks})
        for task in self.tasks:
            kinds: dict[str, list[str]] = collections.defaultdict(list)
            for name, dataset in self._parts.items():
                if task in dataset.tasks:
                    kinds[dataset.problem_of(task)].append(name)
            if len(kinds) > 1:
                said = ", ".join(f"{problem} in {' and '.join(names)}" for problem, names in kinds.items())
                raise UserError(f"task {task} must be of one kind in all data sets, got {said}: rename its column")

    @property
    def parts(self) -> Mapping[str, Dataset]:
        return self._parts

    def problem_of(self, task: str) -> str:
        return next(part.problem_of(task) for part in self._parts.values() if task in part.tasks)

    def entries(self) -> list[Entry]:
        entries: list[Entry] = []
        owner: dict[str, str] = {}
        real = functools.cache(os.path.realpath)
        for name, part in self._parts.items():
            its = part.entries()
            if not its:
                raise UserError(f"{name}: no records in {part.data_path}; leave it out")
            for path in {entry.path for entry in its if entry.path is not None}:
                place = os.path.join(real(path.parent), path.name)
                if owner.setdefault(place, name) != name:
                    raise UserError(f"{path} is in {owner[place]} and in {name}: name each recording once")
            entries += (_prefixed(name, entry) for entry in with_synonyms(its, part.synonyms))
        return entries

    def own(self, entry: Entry) -> Entry:
        start = len(entry.dataset) + 1
        return dataclasses.replace(
            entry,
            record_id=entry.record_id[start:],
            source=entry.source[start:],
            patient_id=entry.patient_id and entry.patient_id[start:],
            dataset="",
        )

    def read(self, entry: Entry) -> Record:
        part, own = self._parts[entry.dataset], self.own(entry)
        try:
            return part.read(own)
        except ReadError as error:
            # In the words of a data set alone, where the folder and the name of the record are known.
            reason = str(error).replace(f"{getattr(part, 'data_path', '')}{os.sep}", "")
            raise ReadError(reason.removeprefix(f"{own.source}: ")) from error

    def fingerprint(self) -> str:
        return stream_hash([f"{name} {part.fingerprint()}\n".encode() for name, part in self._parts.items()])


def _prefixed(name: str, entry: Entry) -> Entry:
    return dataclasses.replace(
        entry,
        record_id=f"{name}/{entry.record_id}",
        source=f"{name}/{entry.source}",
        patient_id=None if entry.patient_id is None else f"{name}/{entry.patient_id}",
        dataset=name,
    )


def _names(datasets: Sequence[Dataset]) -> list[str]:
    """A name for each: of its data set, with that of its folder where there are several, and a number if need be."""
    kinds = collections.Counter(dataset.name for dataset in datasets)
    folders = [getattr(dataset, "data_path", None) for dataset in datasets]
    places = [(dataset.name, os.path.realpath(folder or "")) for dataset, folder in zip(datasets, folders, strict=True)]
    names: list[str] = []
    for dataset, folder, place in zip(datasets, folders, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"data set {dataset.name}{f' in {folder}' if folder else ''} is named twice")
        name = dataset.name if kinds[dataset.name] == 1 else f"{dataset.name}-{Path(place[1]).name}"
        number = 2
        unique = name
        while unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names
