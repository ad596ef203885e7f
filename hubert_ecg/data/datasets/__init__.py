"""Data sets by name: one module each, one line here. "auto" takes the first whose folder it recognises."""

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
from hubert_ecg.data.datasets.sph import Sph
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
    """A data set by name; "auto" looks at the folder.

    Args:
        name: A name in :data:`DATASETS`, or "auto".
        data_path: The folder; by default where :func:`default_data_path` finds it.
        sampling_rate_hz: Rate of files that do not carry one.
        lead_names: Rows of files that do not name their leads.
        seed: Seed of a data set that generates its recordings.

    Raises:
        UserError: The name is unknown, or the folder is missing or another data set's.
    """
    if name != "auto" and name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}, or auto")
    if name == "synthetic":
        return Cohort(seed=seed)
    if data_path is None:
        data_path = default_data_path(name)
    folder = Path(data_path)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder of the recordings with --data_path")
    if name == "auto":
        name = next((known for known, dataset in DATASETS.items() if dataset.recognises(folder)), "folder")
    return DATASETS[name](folder, sampling_rate_hz=sampling_rate_hz, lead_names=lead_names)


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
