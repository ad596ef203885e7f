"""Precomputed labels of the tokens of a store's records: a column beside the shards, mapped like them.

Of a label set there are two files in the store's folder ``labels``: ``NAME.npy``, ``[E, N, tokens]`` integers of E
k-means models, and ``NAME.json``, which says what they are and is written last. Neither is part of the store's hash.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.files import forget_pages, new_array, write_json

if TYPE_CHECKING:
    from hubert_ecg.data.store import Store

LABELS = "labels"
# What no label is: the record has none yet.
_NONE = -1
# Records that are looked at together.
_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """Labels of every token of every record.

    Args:
        values: ``[E, N, tokens]`` int16 or int32, mapped for reading.
        facts: What they are: num_clusters, crop ("first"), crop_s, sampling_rate_hz, and what their maker added, such
            as the feature type and the hash of the k-means model.
    """

    values: np.ndarray
    facts: dict[str, Any]


class LabelWriter:
    """Writes a label set block by block, in any order and from any number of processes at a time.

    The set appears when one process calls :meth:`finish`, after all have written. Labels of the same facts that were
    begun before, by another process or by a run that was stopped, are gone on with; those of other facts are dropped.

    Args:
        store: Whose records they are labels of.
        name: Name of the set.
        num_models: k-means models E that label each token.
        num_tokens: Tokens of a record.
        num_clusters: Clusters of the largest model.
        crop_s: Seconds from the beginning of each record that the tokens lie in.
        facts: What else to say of them, as JSON values.

    Raises:
        UserError: The name is none for a file.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        num_models: int,
        num_tokens: int,
        num_clusters: int,
        crop_s: float,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        from filelock import FileLock

        self._file, self._facts_file = files_of(store, name)
        self._begun, begun_facts = (path.with_name(f".{path.name}.begun") for path in (self._file, self._facts_file))
        dtype = np.int16 if num_clusters <= np.iinfo(np.int16).max + 1 else np.int32
        shape = (num_models, len(store), num_tokens)
        self.facts = {
            **(facts or {}),
            "num_clusters": num_clusters,
            "crop": "first",
            "crop_s": crop_s,
            "sampling_rate_hz": store.sampling_rate_hz,
            "store": store.manifest["hash"],
        }
        self._file.parent.mkdir(exist_ok=True)
        with FileLock(self._file.with_name(f".{name}.lock")):
            if not (self._begun.is_file() and _says(begun_facts, self.facts)):
                begun_facts.unlink(missing_ok=True)
                values = new_array(self._begun, dtype, shape)
                for first in range(0, shape[1], _BLOCK):
                    values[:, first : first + _BLOCK] = _NONE
                    forget_pages(values)
                write_json(begun_facts, self.facts)
        self._begun_facts = begun_facts
        self._values = np.lib.format.open_memmap(self._begun, "r+")
        if self._values.shape != shape:
            raise UserError(f"labels {name} were begun as {list(self._values.shape)}, not {list(shape)}: delete them")

    def write(self, first: int, labels: np.ndarray) -> None:
        """Labels ``[E, n, tokens]`` of the n records from ``first`` on.

        Raises:
            ValueError: Another shape, or a label that no cluster has.
        """
        models, num_records, tokens = self._values.shape
        count = num_records - first if first >= 0 else 0
        if labels.ndim != 3 or labels.shape[::2] != (models, tokens) or labels.shape[1] > count:
            want = f"[{models}, at most {count}, {tokens}]"
            raise ValueError(f"labels: block must be {want} at record {first}, got {list(labels.shape)}")
        if labels.size and not 0 <= labels.min() <= labels.max() < self.facts["num_clusters"]:
            want = f"0 to {self.facts['num_clusters'] - 1}"
            raise ValueError(f"labels: labels must be {want}, got {labels.min()} to {labels.max()}")
        self._values[:, first : first + labels.shape[1]] = labels
        forget_pages(self._values)

    def missing(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Records from ``first`` to before ``last`` that have no labels yet, ascending ``int64``."""
        last = self._values.shape[1] if last is None else last
        found = [np.zeros(0, dtype=np.int64)]
        for start in range(first, last, _BLOCK):
            block = self._values[:, start : min(start + _BLOCK, last)]
            found.append(start + np.flatnonzero((block == _NONE).any((0, 2))))
            forget_pages(self._values)
        return np.concatenate(found)

    def finish(self) -> None:
        """Let the set appear in the store, in place of one of the same name.

        Raises:
            RuntimeError: Some records have no labels.
        """
        missing = self.missing()
        if len(missing):
            raise RuntimeError(f"labels: {len(missing)} records have none, the first is {missing[0]}")
        self._values.flush()
        self._facts_file.unlink(missing_ok=True)
        os.replace(self._begun, self._file)
        write_json(self._facts_file, self.facts)
        self._begun_facts.unlink()


def read_labels(store: Store, name: str) -> LabelSet:
    """A finished label set.

    Raises:
        UserError: There is none of this name, or it is damaged or of other records.
    """
    file, facts_file = files_of(store, name)
    if not facts_file.is_file():
        known = ", ".join(names_of(store)) or "none"
        raise UserError(f"store {store.path} has no finished labels {name!r}; its labels: {known}")
    try:
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        values = np.load(file, "r", allow_pickle=False)
        if values.ndim != 3 or values.dtype.kind != "i" or values.shape[1] != len(store):
            raise ValueError(f"{values.dtype}{list(values.shape)} for {len(store)} records")
        of_this_store = facts["store"] == store.manifest["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"labels {file} are damaged ({error}): write them again") from error
    if not of_this_store:
        raise UserError(f"labels {file} are of other records than the store holds now: write them again")
    return LabelSet(values, facts)


def names_of(store: Store) -> tuple[str, ...]:
    """Names of the finished label sets of a store, sorted."""
    folder = store.path / LABELS
    return tuple(sorted(path.stem for path in folder.glob("*.json") if not path.name.startswith(".")))


def files_of(store: Store, name: str) -> tuple[Path, Path]:
    """Where a label set lies, and where what it is."""
    if not re.fullmatch(r"\w[\w-]*", name):
        raise UserError(f"name of labels must be letters, digits, _ and -, got {name!r}")
    return store.path / LABELS / f"{name}.npy", store.path / LABELS / f"{name}.json"


def _says(path: Path, facts: Mapping[str, Any]) -> bool:
    # Compared as JSON, in which a tuple is a list.
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(facts))
