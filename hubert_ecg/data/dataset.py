"""What every data set offers: its entries with labels and folds, without reading a signal."""

from __future__ import annotations

import abc
import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hubert_ecg.config import UserError
from hubert_ecg.data.readers import READERS, read_record
from hubert_ecg.data.record import Record
from hubert_ecg.signal import LEADS

if TYPE_CHECKING:
    import pandas as pd

# What a fingerprint looks at beside recordings: label tables and signal files that headers point to.
_TABLES = {".csv", ".dat"}
# One of these makes a folder a store.
MANIFEST, BUILDING = "store.json", "building.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One recording of a data set, before its signal is read.

    Args:
        record_id: Unique in the data set.
        path: The file; None where the data set makes its signals itself.
        source: The file relative to the data set's folder, as indexes and messages name it.
        patient_id: Records of one patient never end up in different folds.
        fold: Official fold 1 to 10, or None.
        age: Age in years.
        sex: ``"female"`` or ``"male"``.
        labels: The labels of each task; none at all is a negative, a task that is not there says nothing.
        values: The number of each regression task.
        dataset: Which of several data sets it is from, see :class:`hubert_ecg.data.datasets.several.Several`.
    """

    record_id: str
    path: Path | None = None
    source: str = ""
    patient_id: str | None = None
    fold: int | None = None
    age: float | None = None
    sex: str | None = None
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dataset: str = ""


class Dataset(abc.ABC):
    """A folder of recordings whose labels and folds are understood.

    A data set is a subclass in a module of its own and one line in :data:`hubert_ecg.data.datasets.DATASETS`.

    Args:
        data_path: The folder, as published.
        sampling_rate_hz: Rate of files that do not carry one.
        lead_names: Rows of files that do not name their leads.

    Raises:
        UserError: The folder is not there, or is not this data set's.
    """

    name: ClassVar[str]
    tasks: tuple[str, ...] = ()
    problem: str = "multilabel"
    # Labels that a task counts as another one; entries have them as published.
    synonyms: ClassVar[Mapping[str, str]] = {}
    # Suffix of the recordings that it takes from anywhere below its folder; without one, its table says where they are.
    spread: ClassVar[str] = ""
    # Whether its recordings lie beside its table or in other folders next to it.
    gathers: ClassVar[bool] = False

    def __init__(
        self, data_path: Path | None = None, *, sampling_rate_hz: float = 500.0, lead_names: tuple[str, ...] = LEADS
    ):
        if data_path is None:
            raise UserError(f"{self.name}: data_path must be given")
        self.data_path = Path(data_path)
        if not self.data_path.is_dir():
            raise UserError(f"no folder {self.data_path}: give the folder of the data set {self.name} with --data_path")
        self.sampling_rate_hz = sampling_rate_hz
        self.lead_names = lead_names

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether the files in this very folder say that it is this data set, or a part of it."""
        return False

    @property
    def parts(self) -> Mapping[str, Dataset]:
        """The data sets that this one is made of, by the names that tell their records apart."""
        return {self.name: self}

    def own(self, entry: Entry) -> Entry:
        """An entry as the data set has it that it is from."""
        return entry

    @abc.abstractmethod
    def entries(self) -> list[Entry]:
        """All recordings in a fixed order, from tables and headers alone."""

    def problem_of(self, task: str) -> str:
        """``"multilabel"`` or ``"regression"``."""
        return self.problem

    def read(self, entry: Entry) -> Record:
        """The recording of an entry. It may be called in another process.

        Raises:
            ReadError: The file cannot be read; the message says why.
        """
        assert entry.path is not None
        return read_record(entry.path, self.sampling_rate_hz, self.lead_names)

    def label_names(self, task: str) -> tuple[str, ...]:
        """The labels of a task that follow from the data at hand, sorted, see :func:`learnable`."""
        if task not in self.tasks:
            raise UserError(f"{self.name} has no task {task!r}; its tasks: {', '.join(self.tasks) or 'none'}")
        return tuple(sorted(carriers(learnable(self.entries(), self.synonyms)[0], task)))

    def fingerprint(self) -> str:
        """Changes when a file of the data set does: a hash of names, sizes and modification times."""
        digest = hashlib.blake2b(digest_size=16)
        for source, size, modified in sorted(_stats(self.data_path)):
            digest.update(f"{source}\0{size}\0{modified}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.entries())

    def __iter__(self) -> Iterator[Record]:
        """Records with what their entries say, read one at a time."""
        for entry in self.entries():
            yield describe(self.read(entry), entry)


def patient_name(entry: Entry) -> str:
    """Name of an entry's patient; an entry whose patient is not known is a patient of its own."""
    return f"record {entry.record_id}" if entry.patient_id is None else f"patient {entry.patient_id}"


def carriers(entries: Sequence[Entry], task: str) -> dict[str, set[str]]:
    """Each label of a task and the patients who have it."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for entry in entries:
        for label in entry.labels.get(task, ()):
            found[label].add(patient_name(entry))
    return found


def learnable(
    entries: Sequence[Entry], synonyms: Mapping[str, str], keep_lone: bool = False
) -> tuple[list[Entry], dict[str, list[str]]]:
    """The entries with the labels that a model is to learn: synonyms are one label, and labels of one patient alone are
    left out, because no split could both train and test them.

    Where that patient has an official fold, the label is official too, and stays.

    Returns:
        The entries, and the labels left out of each task, sorted.
    """
    merged = with_synonyms(entries, synonyms)
    official = {patient_name(entry) for entry in entries if entry.fold is not None}
    if keep_lone:
        return merged, {}

    def is_lone(patients: set[str]) -> bool:
        return len(patients) == 1 and not patients <= official

    tasks = {task: None for entry in merged for task in entry.labels}
    lone = {task: sorted(x for x, having in carriers(merged, task).items() if is_lone(having)) for task in tasks}
    lone = {task: labels for task, labels in lone.items() if labels}
    if lone:
        merged = [
            _relabelled(entry, lambda task, label: None if label in lone.get(task, ()) else label) for entry in merged
        ]
    return merged, lone


def with_synonyms(entries: Sequence[Entry], synonyms: Mapping[str, str]) -> list[Entry]:
    """The entries with labels that count as another one replaced by it."""
    if not synonyms:
        return list(entries)
    return [_relabelled(entry, lambda task, label: synonyms.get(label, label)) for entry in entries]


def _relabelled(entry: Entry, rename: Callable[[str, str], str | None]) -> Entry:
    labels = {task: {name for label in its if (name := rename(task, label))} for task, its in entry.labels.items()}
    return dataclasses.replace(entry, labels={task: tuple(sorted(names)) for task, names in labels.items()})


def describe(record: Record, entry: Entry) -> Record:
    """A record as its file has it, with what the data set knows; the data set wins."""
    known = {key: getattr(entry, key) for key in ("patient_id", "fold", "age", "sex")}
    return record.replace(
        record_id=entry.record_id,
        source=entry.source,
        labels=dict(entry.labels),
        **{key: value for key, value in known.items() if value is not None},
    )


def walk(folder: Path, suffixes: Container[str]) -> Iterator[Path]:
    """Files below a folder whose suffix (lower case) is wanted, sorted; what is hidden and stores below are left out.

    Links to folders are followed after the folders themselves, and no folder is walked twice.
    """
    seen: set[str] = set()
    waiting = collections.deque([folder])
    while waiting:
        for parent, folders, files in os.walk(waiting.popleft()):
            place = os.path.realpath(parent)
            folders[:] = [] if place in seen else sorted(name for name in folders if not name.startswith("."))
            if place in seen:
                continue
            seen.add(place)
            if parent != os.fspath(folder) and not {MANIFEST, BUILDING}.isdisjoint(files):
                # A store, perhaps of these very recordings.
                folders.clear()
                continue
            waiting.extend(Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name)))
            for name in sorted(files):
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                    yield Path(parent, name)


def files_in(folder: Path, suffix: str, most: int | None = None) -> list[Path]:
    """The first files of a folder itself whose suffix (lower case) is this one, sorted."""
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if os.path.splitext(entry.name)[1].lower() == suffix and not entry.name.startswith(".")
    )
    return [folder / name for name in names[:most]]


def locate(folder: Path, name: str) -> Path | None:
    """A file in the folder or in one just below it: archives often unpack into a folder of their own.

    Raises:
        UserError: There are several below it that differ: which one is meant?
    """
    if (folder / name).is_file():
        return folder / name
    found = sorted(folder.glob(f"*/{name}")) if folder.is_dir() else []
    if len(found) > 1 and len({path.read_bytes() for path in found}) > 1:
        places = ",".join(str(path.parent) for path in found)
        raise UserError(f"several folders below {folder} have a {name}: name one of them, or all: --data_path {places}")
    return found[0] if found else None


def read_table(dataset: str, path: Path, columns: Collection[str]) -> pd.DataFrame:
    """A CSV file as text, blanks as ""; it must have these columns.

    Raises:
        UserError: It cannot be read, or lacks a column.
    """
    import pandas as pd

    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{dataset}: {path} cannot be read: {error}") from error
    missing = sorted(set(columns) - set(rows.columns))
    if missing:
        raise UserError(f"{dataset}: {path} has no column {', '.join(missing)}")
    return rows


def number(value: object) -> float | None:
    """A finite number, or None for a blank, NaN or "Unknown"."""
    try:
        result = float(str(value))
    except ValueError:
        return None
    return result if abs(result) < float("inf") else None


def _stats(folder: Path) -> Iterator[tuple[str, int, int]]:
    suffixes = READERS.keys() | _TABLES
    for path in walk(folder, suffixes):
        try:
            status = path.stat()
        except OSError:
            # A link that leads nowhere: its record is skipped when it is read.
            yield path.relative_to(folder).as_posix(), -1, 0
        else:
            yield path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns
