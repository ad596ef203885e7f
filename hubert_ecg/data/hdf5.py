"""HDF5 files of one recording: a dataset ``[n_leads, n]`` or ``[n, n_leads]`` in mV. Needs the extra ``formats``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.data.npy import RATE_NAMES, check_claim, rows_are_leads, signal_name
from hubert_ecg.data.record import Record


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str]) -> Record:
    """Read an HDF5 file; a rate among its attributes wins.

    Raises:
        ValueError: No dataset of these leads is found, or there are several.
        UserError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError("reading HDF5 needs h5py: pip install 'hubert-ecg[formats]'") from error

    with h5py.File(path) as file:
        arrays = {
            name: item for name, item in file.items() if isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf"
        }
        item = arrays[signal_name({name: item.ndim for name, item in arrays.items()}, "hdf5.read")]
        if item.ndim == 3:
            raise ValueError(f"hdf5.read: file must hold one recording, got {item.shape[0]} in {item.name}")
        for attributes in (file.attrs, item.attrs):
            for name in RATE_NAMES:
                if name in attributes:
                    sampling_rate_hz = float(np.ravel(attributes[name])[0])
        check_claim(item.nbytes, path.stat().st_size)
        signal = rows_are_leads(item[()], lead_names)
    return Record(signal, sampling_rate_hz, tuple(lead_names), record_id=path.stem, source=path.name)
