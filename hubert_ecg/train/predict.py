"""Scores of a fine-tuned model, averaged over crops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hubert_ecg.data import Loader
from hubert_ecg.train import distributed, machine
from hubert_ecg.train.records import lead_lengths

if TYPE_CHECKING:
    from hubert_ecg.data import Store
    from hubert_ecg.models import HubertECGForClassification


@torch.no_grad()
def predict(
    model: HubertECGForClassification,
    store: Store,
    indices: np.ndarray,
    *,
    batch_size: int = 64,
    num_crops: int = 3,
    crop_s: float = 5.0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    num_workers: int = 2,
) -> np.ndarray:
    """Score records: each is cut into evenly spaced crops, whose scores are averaged.

    In a process group each rank scores a share of the batches, and all of them get the scores of all records.

    Args:
        model: The model; it is moved to the device and put into evaluation mode.
        store: Where the records are, prepared as the model's training records were.
        indices: ``[N] int64`` positions in the store, in any order.
        batch_size: Records in a batch.
        num_crops: Crops of each record.
        crop_s: Seconds of a crop.
        device: Where to compute: auto, cpu, cuda, ...
        precision: auto, float32, bfloat16 or float16.
        num_workers: Threads that read ahead.

    Returns:
        ``[N, C] float32`` in the order of the indices: probabilities, or values of a regression.

    Raises:
        UserError: If the device or precision is not to be had.
        ValueError: If the store is at another sampling rate than the model.
    """
    if store.sampling_rate_hz != model.config.sampling_rate_hz:
        raise ValueError(
            f"predict: store must be at the model's {model.config.sampling_rate_hz:g} Hz, "
            f"got {store.sampling_rate_hz:g} Hz; prepare it with that downsampling_factor"
        )
    device = machine.device(str(device))
    dtype = machine.dtype(precision, device)
    share = distributed.Share(np.asarray(indices), batch_size)
    loader = even_loader(store, share.indices, batch_size, num_crops, crop_s, num_workers)
    with machine.autocast(device, dtype):
        scores, _ = scan(model.to(device).eval(), loader, device, share)
    return scores


def even_loader(
    store: Store, indices: np.ndarray, batch_size: int, num_crops: int, crop_s: float, num_workers: int
) -> Loader:
    """Evenly spaced crops of records in their order."""
    return Loader(store, indices, batch_size, crop_s=crop_s, crop="even", num_crops=num_crops, num_workers=num_workers)


def scan(
    model: HubertECGForClassification,
    loader: Loader,
    device: torch.device,
    share: distributed.Share,
    *,
    targets: Tensor | None = None,
    weight: Tensor | None = None,
    poll: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, float]:
    """Scores ``[N, C]`` averaged over the crops of each record, and the mean loss over all crops: of all ranks.

    Args:
        model: In evaluation mode, on the device.
        loader: Gives the crops of a record in consecutive rows of one batch.
        device: Where to compute.
        share: The records of this rank, which the loader reads.
        targets: ``[len(store), C]`` on the device; without them the loss is NaN.
        weight: ``pos_weight`` of the loss.
        poll: Called between batches.
    """
    scores, losses, num_rows = [], torch.zeros((), device=device), 0
    for batch in share.polled(loader.batches(0), poll):
        wanted = None if targets is None else targets[batch.index.to(device, non_blocking=True)]
        output = model(
            batch.ecg.to(device, non_blocking=True), targets=wanted, lengths=lead_lengths(batch), pos_weight=weight
        )
        scores.append(model.scores(output.logits).unflatten(0, (-1, loader.num_crops)).mean(1).cpu())
        if output.loss is not None:
            losses += output.loss.float() * len(batch.index)
        num_rows += len(batch.index)
    mine = torch.cat(scores).numpy() if scores else np.zeros((0, len(model.label_names)), dtype=np.float32)
    found = distributed.gather_parts((mine, float(losses), num_rows))
    num_rows = sum(rows for _, _, rows in found)
    loss = sum(loss for _, loss, _ in found) / num_rows if targets is not None and num_rows else float("nan")
    return np.concatenate([scores for scores, _, _ in found]), loss
