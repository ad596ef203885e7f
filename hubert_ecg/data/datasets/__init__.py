"""Data sets by name: one module each, one line here. "auto" takes those that it recognises."""

from __future__ import annotations

import os
from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry
from hubert_ecg.data.datasets.challenge import Challenge, Chapman, Cpsc, CpscExtra, Georgia, Ningbo, Ptb
from hubert_ecg.data.datasets.code15 import Challenge2025, Code15, SamiTrop
from hubert_ecg.data.datasets.cpsc2018 import Cpsc2018
from hubert_ecg.data.datasets.csv_table import CsvTable
from hubert_ecg.data.datasets.folder import Folder
from hubert_ecg.data.datasets.hefei import Hefei
from hubert_ecg.data.datasets.ludb import Ludb
from hubert_ecg.data.datasets.ptbdb import PtbDiagnostic
from hubert_ecg.data.datasets.ptbxl import PtbXl
from hubert_ecg.data.datasets.recognise import find_datasets
from hubert_ecg.data.datasets.several import Several
from hubert_ecg.data.datasets.sph import Sph
from hubert_ecg.data.store import is_store
from hubert_ecg.data.synthetic import Cohort
from hubert_ecg.signal import LEADS

__all__ = ["DATASETS", "Dataset", "Entry", "default_data_path", "open_dataset"]

DATASETS: dict[str, type[Dataset]] = {
    "ptbxl": PtbXl,
    "hefei": Hefei,
    "csv": CsvTable,
    "sph": Sph,
    "code15": Code15,
    "samitrop": SamiTrop,
    "ludb": Ludb,
    "cpsc2018": Cpsc2018,
    "ptbdb": PtbDiagnostic,
    "challenge2025": Challenge2025,
    "chapman": Chapman,
    "ningbo": Ningbo,
    "cpsc": Cpsc,
    "cpsc_extra": CpscExtra,
    "georgia": Georgia,
    "ptb": Ptb,
    "challenge": Challenge,
    "synthetic": Cohort,
    "folder": Folder,
}


def open_dataset(
    name: str,
    data_path: str | Path | None = None,
    *,
    sampling_rate_hz: float = 500.0,
    lead_names: tuple[str, ...] = LEADS,
    seed: int = 0,
) -> Dataset:
    """A data set by name, or several as one; "auto" looks at the folder and takes all that is in it.

    Args:
        name: A name in :data:`DATASETS`, or "auto"; several, with commas between them.
        data_path: The folder; by default where :func:`default_data_path` finds it. Several, with commas between them:
            one for each name, blank for the default. One folder for several names holds all of them, and several
            folders of one name are a data set each.
        sampling_rate_hz: Rate of files that do not carry one.
        lead_names: Rows of files that do not name their leads.
        seed: Seed of a data set that generates its recordings.

    Raises:
        UserError: A name is unknown, or a folder is missing or another data set's; names and folders do not match; or
            data sets share recordings.
    """
    datasets = [
        dataset
        for one, folder in _pairs(name, data_path)
        for dataset in _opened(one, folder, sampling_rate_hz, lead_names, seed)
    ]
    return datasets[0] if len(datasets) == 1 else Several(datasets)


def _pairs(name: str, data_path: str | Path | None) -> list[tuple[str, Path | None]]:
    """Each name with its folder."""
    names = [one.strip() for one in name.split(",")]
    for one in names:
        if one != "auto" and one not in DATASETS:
            raise UserError(f"unknown data set {one!r}; known: {', '.join(DATASETS)}, or auto")
    # A folder's own name may hold commas.
    whole = data_path is None or "," not in str(data_path) or Path(data_path).is_dir()
    folders = [data_path] if whole else [one.strip() for one in str(data_path).split(",")]
    if len(names) > 1 and len(folders) > 1 and len(names) != len(folders):
        raise UserError(
            f"--data_path must name a folder for each of {len(names)} data sets ({name}), or one for all, "
            f"got {len(folders)}: {data_path}"
        )
    count = max(len(names), len(folders))
    if len(names) < count:
        names *= count
    if len(folders) < count:
        folders *= count
    return [(one, Path(folder) if folder else None) for one, folder in zip(names, folders, strict=True)]


def _opened(
    name: str, folder: Path | None, sampling_rate_hz: float, lead_names: tuple[str, ...], seed: int
) -> list[Dataset]:
    if name == "synthetic":
        return [Cohort(seed=seed)]
    if folder is None:
        if name == "auto":
            raise UserError("which recordings? Give their folder with --data_path, or a data set with --dataset")
        folder = default_data_path(name)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder of the recordings with --data_path")
    if is_store(folder):
        raise UserError(f"{folder} is a packed store already")
    found = find_datasets(folder, DATASETS) if name == "auto" else [(name, folder)]
    return [DATASETS[one](place, sampling_rate_hz=sampling_rate_hz, lead_names=lead_names) for one, place in found]


def default_data_path(dataset: str) -> Path:
    """Where a data set lies when nobody says: ``$HUBERT_ECG_DATA/<dataset>``, else ``./data/<dataset>``.

    Raises:
        UserError: It is in neither place; the message says where was looked.
    """
    roots = [Path(os.environ["HUBERT_ECG_DATA"])] if os.environ.get("HUBERT_ECG_DATA") else []
    places = [root / dataset for root in (*roots, Path("data"))]
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place.absolute()) for place in places)
    hint = "" if roots else ", or set HUBERT_ECG_DATA to the folder that holds it"
    raise UserError(f"data set {dataset} not found: looked at {looked}; give its folder with --data_path{hint}")
