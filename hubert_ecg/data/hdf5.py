"""HDF5 files of one recording: a dataset ``[n_leads, n]`` or ``[n, n_leads]`` in mV. Needs the extra ``formats``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data.npy import check_claim, from_array, is_stated, signal_name
from hubert_ecg.data.record import Record

# Values beside a signal that say something of it, a lead each at most.
_FEW = 64


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str]) -> Record:
    """Read an HDF5 file; a rate, leads and units among its attributes and small datasets win.

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
        name = signal_name({name: item.ndim for name, item in arrays.items()}, "hdf5.read")
        item = arrays[name]
        if item.ndim == 3:
            raise ValueError(f"hdf5.read: file must hold one recording, got {item.shape[0]} in {item.name}")
        check_claim(item.nbytes, path.stat().st_size)
        stated = [(name, file[name]) for name in filter(is_stated, file)]
        beside = {name: of[()] for name, of in stated if isinstance(of, h5py.Dataset) and 0 < (of.size or 0) <= _FEW}
        beside |= {name: of[name] for of in (file.attrs, item.attrs) for name in filter(is_stated, of)}
        return from_array(item[()], beside, sampling_rate_hz, lead_names, path)
