"""MATLAB files: arrays named ``val`` as in the PhysioNet Challenges, the CPSC 2018 structure, or one plain array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.data import hdf5
from hubert_ecg.data.npy import RATE_NAMES, rows_are_leads
from hubert_ecg.data.record import Record, age_of, sex_of

# WFDB's MATLAB files keep ADC units; without their header the gain of all Challenge sources is taken.
_VAL_PER_MV = 1000.0
_RATE_NAMES = ("curr_sample_rate", *RATE_NAMES)


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str]) -> Record:
    """Read a .mat file whose rows are the leads; a rate inside the file wins.

    Raises:
        ValueError: No array of these leads is found.
    """
    import scipy.io

    try:
        content = scipy.io.loadmat(path)
    except NotImplementedError:
        # Version 7.3 is HDF5.
        return hdf5.read(path, sampling_rate_hz, lead_names)
    facts: dict[str, Any] = {"record_id": path.stem, "source": path.name}
    for name in _RATE_NAMES:
        if name in content:
            sampling_rate_hz = float(np.ravel(content[name])[0])
            break
    if "val" in content:
        signal = rows_are_leads(content["val"], lead_names) / np.float32(_VAL_PER_MV)
    elif "ECG" in content and content["ECG"].dtype.names:
        struct = content["ECG"][0, 0]
        signal = rows_are_leads(struct["data"], lead_names)
        if "age" in struct.dtype.names and struct["age"].size:
            facts["age"] = age_of(struct["age"].flat[0])
        if "sex" in struct.dtype.names and struct["sex"].size:
            facts["sex"] = sex_of(struct["sex"].flat[0])
    else:
        arrays = {
            name: value
            for name, value in content.items()
            if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind in "iuf" and min(value.shape) > 1
        }
        if len(arrays) != 1:
            raise ValueError(f"mat.read: file must hold val, ECG.data or one 2-D array, got {sorted(arrays)}")
        signal = rows_are_leads(next(iter(arrays.values())), lead_names)
    return Record(signal, sampling_rate_hz, tuple(lead_names), **facts)
