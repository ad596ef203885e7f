"""Which data sets lie below a folder: what "auto" takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, walk
from hubert_ecg.data.datasets.folder import is_recording
from hubert_ecg.data.readers import READERS
from hubert_ecg.data.store import is_store

# Data sets are known by files of these kinds.
_SIGNS = {".hea", ".csv", ".tsv", ".txt"}
_ANY = "folder"


def find_datasets(folder: Path, known: Mapping[str, type[Dataset]]) -> list[tuple[str, Path]]:
    """The data sets below a folder, by name and each with its own folder, so that every recording is in one of them.

    A folder belongs to the first data set that recognises its files; readable files that none does are a ``folder``.
    Neighbours of one data set are put together where it takes its recordings from anywhere below.

    Raises:
        UserError: A data set without a table of its own holds another one.
    """
    found = _find(folder, known, set()) or [(_ANY, folder)]
    if len(found) == 1 and found[0][1].parent == folder:
        # Archives often unpack into a folder of their own.
        return [(found[0][0], folder)]
    return found


def _find(folder: Path, known: Mapping[str, type[Dataset]], seen: set[str]) -> list[tuple[str, Path]]:
    place = os.path.realpath(folder)
    if place in seen or is_store(folder):
        return []
    seen.add(place)
    inside = sorted((item for item in os.scandir(folder) if not item.name.startswith(".")), key=lambda item: item.name)
    files = [Path(item) for item in inside if not item.is_dir()]
    name = None
    if any(path.suffix.lower() in _SIGNS for path in files):
        name = next((name for name, dataset in known.items() if dataset.recognises(folder)), None)
    if name is None and any(is_recording(path) for path in files if path.suffix.lower() in READERS):
        name = _ANY
    own = [] if name is None else [(name, folder)]
    if name is not None and name != _ANY and not known[name].spread:
        return own
    found = own + [pair for item in inside if item.is_dir() for pair in _find(Path(item), known, seen)]
    for gathering, table in [pair for pair in found if known[pair[0]].gathers]:
        if table == folder or _lacks_some(known[gathering](table)):
            suffix = known[gathering].spread
            kept = [(name, path) for name, path in found if name != _ANY or not _all_are(path, suffix)]
            found = [(name, folder if path == table else path) for name, path in kept]
    names = {name for name, _ in found}
    if len(names) == 1 and (known[found[0][0]].spread or names == {_ANY}):
        return [(found[0][0], folder)]
    if own and len(found) > 1 and not known[own[0][0]].gathers:
        below = ", ".join(f"{name} in {path.relative_to(folder)}" for name, path in found[1:4])
        raise UserError(
            f"{folder} holds recordings beside other data sets ({below}): move them into a folder of their own, "
            "or say with --dataset what all of it is"
        )
    return found


def _all_are(folder: Path, suffix: str) -> bool:
    return all(path.suffix.lower() == suffix for path in walk(folder, READERS.keys()) if is_recording(path))


def _lacks_some(dataset: Dataset) -> bool:
    """Whether its table lists recordings that are elsewhere."""
    return any(entry.path is not None and not entry.path.is_file() for entry in dataset.entries())
