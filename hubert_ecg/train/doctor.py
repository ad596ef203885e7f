"""The doctor command: what is in a store, and what somebody should look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hubert_ecg import data, evaluation
from hubert_ecg.config import DoctorConfig
from hubert_ecg.data.store import is_store
from hubert_ecg.train.logs import say
from hubert_ecg.train.records import open_records


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Run the doctor command: ``doctor.html`` and ``doctor.json`` in the output folder.

    Returns:
        The numbers in ``doctor.json``.

    Raises:
        UserError: The recordings cannot be read, or the store was packed by an earlier version.
    """
    # A store is what it is, whatever the flags say of files.
    if is_store(config.data_path):
        store = data.Store(config.data_path)
    else:
        store = open_records(config, config.downsampling_factor, config.compat)
    return examined(store, store.path if config.output_dir is None else Path(config.output_dir))


def examined(store: data.Store, folder: Path) -> dict[str, Any]:
    """Write the report of a store into a folder, and say in a line what it found."""
    found = evaluation.write_doctor(store, folder)
    copies, unreadable = found["duplicates"], found["unreadable"]
    said = [f"{found['num_flagged']} of {found['num_records']} records to look at"]
    if copies["num_groups"]:
        across = f" ({copies['num_across_splits']} across splits)" if copies["num_across_splits"] else ""
        said.append(f"{copies['num_groups']} with duplicates{across}")
    if unreadable["num_files"]:
        said.append(f"{unreadable['num_files']} unreadable")
    say(f"doctor: {', '.join(said)}; see doctor.html in {folder}")
    return found
