"""Which records a command works on, which of them train and which validate, and how labels weigh."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hubert_ecg import data
from hubert_ecg.config import Compat, DataConfig, FinetuneConfig, LabelledConfig, PretrainConfig, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hubert_ecg.data import Batch, Loader, Store


def open_records(config: DataConfig | LabelledConfig, downsampling_factor: int, compat: Compat) -> Store:
    """The records that a command was asked to work on, prepared as its model wants them."""
    return data.open_store(
        config.data_path,
        dataset=getattr(config, "dataset", "auto"),
        sampling_rate=config.sampling_rate,
        lead_names=config.lead_names,
        downsampling_factor=downsampling_factor,
        compat=compat,
        splits_from=getattr(config, "splits_from", None),
        cache_dir=config.cache_dir,
        num_workers=config.num_workers,
    )


def random_crops(
    store: Store,
    indices: np.ndarray,
    config: PretrainConfig | FinetuneConfig,
    *,
    shuffle: bool,
    labels: Sequence[str] = (),
    rank: int = 0,
    num_ranks: int = 1,
    device: torch.device | None = None,
) -> Loader:
    """Batches of random crops of these records, or a rank's part of each; they follow from the seed and the epoch.

    With precomputed labels of tokens, crops are where these are: at the beginning of each record.
    """
    return data.Loader(
        store,
        indices,
        config.batch_size,
        crop_s=config.crop_s,
        crop="first" if labels else "random",
        shuffle=shuffle,
        seed=config.seed,
        num_workers=config.num_workers,
        labels=labels,
        rank=rank,
        num_ranks=num_ranks,
        device=device,
    )


def split_for_pretraining(store: Store, validation_share: float, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Training and validation records of a run that needs no labels.

    A data set with tasks keeps its folds, so that its test records stay unseen whatever is fine-tuned later. Recordings
    without labels have no test records to keep: all of them are used, and a share of them, drawn by seed, validates.

    Returns:
        Two ascending ``int64`` arrays of positions, and a line that says what was done.

    Raises:
        UserError: If there are fewer than two records.
    """
    if len(store) < 2:
        raise UserError(f"pretrain: training and validation need at least 2 records, got {len(store)} in {store.path}")
    train, validation = store.split("train"), store.split("validation")
    if store.tasks and len(train) and len(validation):
        return train, validation, f"{len(train)} records in folds 1-8 train, {len(validation)} in fold 9 validate"
    pool = train if store.tasks and len(train) > 1 else store.split("all")
    train, validation = hold_out(store, pool, validation_share, seed)
    return train, validation, f"{len(train)} records train, {len(validation)} drawn by seed {seed} validate"


def hold_out(store: Store, pool: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold a share of the records out, patient by patient where patients are known.

    Args:
        store: Where the records are.
        pool: Positions of at least two records.
        share: Share to hold out; at least one record is, and at least one is left.
        seed: Seed of the draw.

    Returns:
        The records left and those held out, ascending.

    Raises:
        UserError: If all records are of one patient.
    """
    patients = store.column("patient_id")[pool]
    # A record of an unknown patient is a patient of its own.
    names = [f"record {i}" if p is None or p != p else f"patient {p}" for i, p in zip(pool, patients, strict=True)]
    unique, group = np.unique(names, return_inverse=True)
    if len(unique) < 2:
        raise UserError(f"validation needs records of a second patient, got {len(pool)} records of one")
    wanted = min(max(round(share * len(pool)), 1), len(pool) - 1)
    order = np.random.default_rng(seed).permutation(len(unique))
    sizes = np.bincount(group)[order]
    count = min(max(int((np.cumsum(sizes) <= wanted).sum()), 1), len(unique) - 1)
    held_out = np.isin(group, order[:count])
    return np.sort(pool[~held_out]), np.sort(pool[held_out])


def label_subset(targets: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A share of the records that keeps each label's share as far as possible, and no label without a positive.

    Labels are served from the rarest to the commonest: first one positive each, then as many as the share of their
    positives; what is left of the share is filled up at random.

    Args:
        targets: ``[N, C]`` 0 or 1 (other values: records are drawn at random).
        share: Share of the records to keep, in (0, 1].
        seed: Seed of the draw.

    Returns:
        Ascending positions ``int64``, at least one.

    Raises:
        UserError: If the share is out of range.
    """
    if not 0 < share <= 1:
        raise UserError(f"label_share must be above 0 and at most 1, got {share}")
    num_records = len(targets)
    if share == 1:
        return np.arange(num_records)
    wanted = max(round(share * num_records), 1)
    order = np.random.default_rng(seed).permutation(num_records)
    positive = targets[order] == 1
    counts = positive.sum(0)
    kept = np.zeros(num_records, dtype=bool)
    rarest_first = [c for c in np.argsort(counts, kind="stable") if counts[c]]
    for goal in (np.ones_like(counts), np.round(share * counts).astype(int)):
        for c in rarest_first:
            missing = min(goal[c] - (positive[:, c] & kept).sum(), wanted - kept.sum())
            if missing > 0:
                kept[np.flatnonzero(positive[:, c] & ~kept)[:missing]] = True
    kept[np.flatnonzero(~kept)[: wanted - kept.sum()]] = True
    return np.sort(order[kept])


def positive_weights(targets: np.ndarray) -> np.ndarray:
    """Weight of the positives of each label, ``(N - n) / n`` in the order of the columns; 1 where n is 0 or N.

    Args:
        targets: ``[N, C]`` 0 or 1.

    Returns:
        ``[C] float32``.

    >>> positive_weights(np.array([[1, 0], [0, 0], [0, 0]])).tolist()
    [2.0, 1.0]
    """
    positives = (targets == 1).sum(0)
    usable = (positives > 0) & (positives < len(targets))
    return np.where(usable, (len(targets) - positives) / np.maximum(positives, 1), 1.0).astype(np.float32)


def lead_lengths(batch: Batch) -> Tensor:
    """Valid samples of each lead, ``[B, 12] int64``: 0 for a lead that the record does not have."""
    return batch.lengths[:, None] * batch.present


def data_key(store: Store, *splits: np.ndarray) -> str:
    """Changes when the records of a run, their order or their preprocessing do; not when their folder moves."""
    names = store.column("record_id")
    digest = hashlib.sha256(f"{store.dataset} {store.sampling_rate_hz} {store.compat}".encode())
    for split in splits:
        digest.update(b"\0\0")
        for name, samples in zip(names[split], store.num_samples[split], strict=True):
            digest.update(f"{name}\0{samples}\n".encode())
    return digest.hexdigest()
