"""Features of the tokens of many records: in memory, in a file, or in a folder that is read piece by piece."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hubert_ecg.clustering import forget_pages
from hubert_ecg.config import UserError
from hubert_ecg.data import Loader, plain_pickle
from hubert_ecg.data.progress import Progress
from hubert_ecg.files import new_array, replacing, write_json
from hubert_ecg.models import HubertECGConfig, token_mask
from hubert_ecg.models.shape import num_tokens
from hubert_ecg.signal import LEADS
from hubert_ecg.train.records import lead_lengths

if TYPE_CHECKING:
    from hubert_ecg.data import Batch, Store
    from hubert_ecg.train.pseudo_labels import Featuriser

_ARRAYS = ("features", "valid")
# Written last: a folder without it is unfinished.
_FACTS = "records.json"
# Records whose tokens are picked at a time, wherever in a folder they lie: each brings pages of its file with it.
_PICKED_RECORDS = 64
# Records whose features are computed at a time; those of a model take more memory.
_BATCH, _LATENT_BATCH = 256, 64


@dataclasses.dataclass(frozen=True)
class TokenFeatures:
    """Features of the tokens of many records, as the extract command writes them.

    A path that ends in .pkl or .npz is one file, held in memory whole; any other is a folder of ``features.npy``,
    ``valid.npy`` and ``records.json``, which is mapped and may be larger than memory.

    Args:
        features: ``[N, tokens, D] float32``, latent ones float16: clusters of either are the same but for tokens that
            lie between two of them.
        valid: ``[N, tokens] bool``: False where a token sees padding.
        record_ids: N names.
        settings: How they were made.
    """

    features: np.ndarray
    valid: np.ndarray
    record_ids: list[str]
    settings: dict[str, Any]

    @staticmethod
    def allocate(path: Path | None, shape: tuple[int, int, int], dtype: Any = np.float32) -> tuple[Any, Any]:
        """Arrays of features and valid tokens to fill and then to save at ``path``: in its folder, or in memory."""
        if path is None or path.suffix in (".pkl", ".npz") or 0 in shape:
            return np.empty(shape, dtype), np.empty(shape[:2], bool)
        path.mkdir(parents=True, exist_ok=True)
        (path / _FACTS).unlink(missing_ok=True)
        return new_array(path / "features.npy", dtype, shape), new_array(path / "valid.npy", np.bool_, shape[:2])

    @staticmethod
    def allocated(path: Path) -> tuple[Any, Any]:
        """The arrays that another process has allocated in a folder, to fill too."""
        features, valid = (np.lib.format.open_memmap(path / f"{name}.npy", "r+") for name in _ARRAYS)
        return features, valid

    def save(self, path: Path) -> None:
        """Writes a .pkl of plain containers and arrays, an .npz, or a folder; it appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pkl":
            plain_pickle.dump(vars(self), path)
        elif path.suffix == ".npz":
            ids, settings = np.array(self.record_ids), np.array(json.dumps(self.settings))
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, features=self.features, valid=self.valid, record_ids=ids, settings=settings)
        else:
            for name in _ARRAYS:
                array, place = getattr(self, name), path / f"{name}.npy"
                if isinstance(array, np.memmap) and Path(str(array.filename)) == place.resolve():
                    array.flush()
                    continue
                with replacing(place) as temporary, temporary.open("wb") as file:
                    np.save(file, array)
            write_json(path / _FACTS, {"settings": self.settings, "record_ids": self.record_ids})

    @classmethod
    def load(cls, path: Path) -> TokenFeatures:
        """Reads what :meth:`save` wrote, without running anything that the file may hold.

        Raises:
            UserError: no such file or folder, or not one of features.
        """
        if not path.exists():
            raise UserError(f"no features at {path}; make them with hubert-ecg extract")
        check_path(path)
        if path.is_dir() and not (path / _FACTS).is_file():
            raise UserError(f"features {path} are unfinished or none: no {_FACTS} in it; run hubert-ecg extract again")
        try:
            if path.is_dir():
                facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
                features, valid = (np.load(path / f"{name}.npy", "r", allow_pickle=False) for name in _ARRAYS)
                loaded = cls(features, valid, facts["record_ids"], facts["settings"])
            elif path.suffix == ".pkl":
                loaded = cls(**plain_pickle.load(path))
            else:
                with np.load(path, allow_pickle=False) as file:
                    settings = json.loads(str(file["settings"]))
                    loaded = cls(file["features"], file["valid"], file["record_ids"].tolist(), settings)
            shape, kinds = loaded.features.shape, (loaded.features.dtype.kind, loaded.valid.dtype)
            if len(shape) != 3 or loaded.valid.shape != shape[:2] or kinds != ("f", np.bool_):
                raise ValueError(f"features {loaded.features.dtype}{list(shape)}, valid {list(loaded.valid.shape)}")
            return loaded
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path} does not hold features of hubert-ecg extract ({error})") from error


class ValidTokens:
    """The valid tokens of some records in order, as points to cluster: see ``hubert_ecg.clustering.BlockSource``.

    Args:
        given: Where the records are.
        first: First record.
        last: The one after the last.
        device: Where to cluster.
    """

    def __init__(self, given: TokenFeatures, first: int, last: int, device: torch.device) -> None:
        self._features, self._valid = given.features[first:last], given.valid[first:last]
        # Tokens before each record.
        self._ends = np.concatenate([[0], np.cumsum(self._valid.sum(1, dtype=np.int64))])
        self.shape = (int(self._ends[-1]), given.features.shape[2])
        # Sums are float64, which Apple's GPUs have not.
        self.dtype, self.device = given.features.dtype, torch.device("cpu") if device.type == "mps" else device

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All tokens ``[N, D]`` at once; without a copy where they are in memory and none is left out."""
        if self._valid.all() and not isinstance(self._features, np.memmap):
            return self._features.reshape(self.shape)
        rows = np.empty(self.shape, self.dtype)
        first = 0
        for block in self.blocks(1 << 16):
            rows[first : first + len(block)] = block
            first += len(block)
        return rows

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """All tokens, about ``rows`` at a time."""
        step = max(1, rows // max(self._features.shape[1], 1))
        for first in range(0, len(self._features), step):
            records = slice(first, first + step)
            yield self._features[records][self._valid[records]]
            forget_pages(self._features)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The tokens at ascending places."""
        parts = [np.empty((0, self.shape[1]), self.dtype)]
        records = np.searchsorted(self._ends, indices, side="right") - 1
        for first in range(0, len(indices), _PICKED_RECORDS):
            some = slice(first, first + _PICKED_RECORDS)
            record, nth = records[some], indices[some] - self._ends[records[some]]
            token = (np.cumsum(self._valid[record], 1, dtype=np.int64) > nth[:, None]).argmax(1)
            parts.append(self._features[record, token])
            forget_pages(self._features)
        return np.concatenate(parts)


class FeatureWork:
    """The features of the first crop of some records: how large they are, and how they are computed.

    Args:
        store: Where the records are.
        records: Their positions.
        featuriser: Computes the features of a batch.
        shape: A model that reads them, which knows its tokens and those that see padding.
        crop_s: Seconds of each record.
        num_workers: Threads that read ahead.
    """

    def __init__(
        self,
        store: Store,
        records: np.ndarray,
        featuriser: Featuriser,
        shape: HubertECGConfig,
        crop_s: float,
        num_workers: int,
    ) -> None:
        self.store, self.records, self.featuriser, self.model = store, records, featuriser, shape
        self.crop_s, self.num_workers = crop_s, num_workers
        tokens = num_tokens(shape, len(LEADS) * round(crop_s * store.sampling_rate_hz))
        self.shape = (len(records), tokens, featuriser.width)
        self.dtype = np.dtype(np.float16 if featuriser.feature_type == "latent" else np.float32)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def share(self, rank: int, num_ranks: int) -> slice:
        """The records of one of the processes that work together."""
        return slice(rank * len(self.records) // num_ranks, (rank + 1) * len(self.records) // num_ranks)

    def fill(self, values: np.ndarray, valid: np.ndarray, share: slice, title: str | None = None) -> None:
        """Computes the features of the records of a share into its rows of both arrays.

        Args:
            values: ``[n, tokens, D]``, n the records of the share.
            valid: ``[n, tokens] bool``.
            share: Which records.
            title: What a progress bar says; None shows none.
        """
        first = 0
        for batch in self.batches(self.records[share], title):
            x = self.featuriser(batch)
            rows = slice(first, first + len(x))
            values[rows] = x.cpu().numpy()
            valid[rows] = token_mask(self.model, lead_lengths(batch), batch.ecg.shape[-1]).numpy()
            forget_pages(values)
            first += len(x)

    def batches(self, records: np.ndarray, title: str | None = None) -> Iterator[Batch]:
        """First crops of these records, in their order, with a progress bar of that title."""
        loader = Loader(
            self.store,
            records,
            _BATCH if self.featuriser.teacher is None else _LATENT_BATCH,
            crop_s=self.crop_s,
            crop="first",
            num_workers=self.num_workers,
        )
        with Progress(title or "", len(records), shown=title is not None) as bar:
            for batch in loader.batches(0):
                yield batch
                bar.advance(len(batch))

    def record_ids(self, share: slice) -> list[str]:
        return self.store.column("record_id")[self.records[share]].tolist()


def check_path(path: Path) -> None:
    """Raises UserError where no features can be kept."""
    if path.suffix not in ("", ".pkl", ".npz") and not path.is_dir():
        raise UserError(f"{path} must end in .pkl or .npz, or be a folder: a name without a dot")
