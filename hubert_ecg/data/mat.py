"""MATLAB files: arrays named ``val`` as in the PhysioNet Challenges, the CPSC 2018 structure, or one plain array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.data import hdf5
from hubert_ecg.data.npy import from_array
from hubert_ecg.data.record import Record, age_of, sex_of

# WFDB's MATLAB files keep ADC units; without their header the gain of all Challenge sources is taken, 1000 a mV.
_VAL_UNIT = "uV"


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str]) -> Record:
    """Read a .mat file whose rows are the leads; a rate, leads and units inside the file win.

    Raises:
        ValueError: No array of these leads is found.
    """
    import scipy.io

    try:
        content = scipy.io.loadmat(path)
    except NotImplementedError:
        # Version 7.3 is HDF5.
        return hdf5.read(path, sampling_rate_hz, lead_names)
    facts: dict[str, Any] = {}
    content = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
    if "val" in content:
        signal, facts["default_unit"] = content["val"], _VAL_UNIT
    elif "ECG" in content and content["ECG"].dtype.names:
        struct = content["ECG"][0, 0]
        signal = struct["data"]
        if "age" in struct.dtype.names and struct["age"].size:
            facts["age"] = age_of(struct["age"].flat[0])
        if "sex" in struct.dtype.names and struct["sex"].size:
            facts["sex"] = sex_of(struct["sex"].flat[0])
    else:
        # MATLAB's vectors and numbers are matrices, too.
        least = 1 if len(lead_names) == 1 else 2
        arrays = {
            name: value
            for name, value in content.items()
            if value.ndim == 2 and value.dtype.kind in "iuf" and min(value.shape) >= least and value.size > least
        }
        if len(arrays) != 1:
            raise ValueError(f"mat.read: file must hold val, ECG.data or one 2-D array, got {sorted(arrays)}")
        signal = next(iter(arrays.values()))
    return from_array(signal, content, sampling_rate_hz, lead_names, path, **facts)
