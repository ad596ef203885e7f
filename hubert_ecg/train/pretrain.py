"""Pretraining: from a folder of recordings to a model that predicts the clusters of masked tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import clustering, data, evaluation
from hubert_ecg.config import PretrainConfig, UserError, to_json
from hubert_ecg.files import write_json
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining, save_file, token_mask
from hubert_ecg.ops import span_mask
from hubert_ecg.train import distributed, machine, parallel, sharded_checkpoint
from hubert_ecg.train.logs import check_wandb, say
from hubert_ecg.train.loop import Loop
from hubert_ecg.train.objective import Objective
from hubert_ecg.train.pseudo_labels import PseudoLabels, fit_kmeans
from hubert_ecg.train.records import data_key, lead_lengths, open_records, random_crops, split_for_pretraining
from hubert_ecg.train.schedule import seed_of

NAME = "hubert_ecg"


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run the pretrain command.

    In ``config.output_dir``: ``hubert_ecg.pt`` (the best model, one file) and the folder ``hubert_ecg`` with the same
    for ``from_pretrained``, ``last/``, ``checkpoint.safetensors``, ``kmeans.safetensors``, ``clusters.json``
    and ``clusters.html``, ``metrics.csv``, ``settings.json`` and TensorBoard events.

    Under torchrun, batches are ``batch_size`` records on each rank, and rank 0 writes the files.

    Returns:
        ``model`` (the .pt file), ``folder``, ``metrics_csv``, ``kmeans``, ``clusters``, ``step``, ``finished``,
        ``best_step`` and ``metrics`` of the best validation.

    Raises:
        UserError: If the data, the settings or the checkpoint to resume from do not allow it.
        RunError: If the loss is not finite.
    """
    check_wandb(config.wandb)
    if config.compat == "published" and config.crop_s != 5:
        raise UserError(f"pretrain: crop_s must be 5 with compat published, got {config.crop_s:g}")
    with distributed.ranks(config.device, config.tensor_ranks) as (device, rank, _):
        parallel.check(config)
        return _pretrain(config, device, rank)


def _pretrain(config: PretrainConfig, device: torch.device, rank: int) -> dict[str, Any]:
    dtype = machine.dtype(config.precision, device)
    shape = model_config(config)
    folder = Path(config.output_dir) / NAME

    with distributed.rank_0_first():
        store = open_records(config, config.downsampling_factor, config.compat)
    train, validation, news = split_for_pretraining(store, config.validation_share, config.seed)
    say(f"pretrain: {news}")

    kmeans_path = folder / "kmeans.safetensors"
    saved = distributed.agreed(sharded_checkpoint.find(folder)) if config.resume else None
    if saved is not None:
        kmeans = clustering.KMeans.from_state(sharded_checkpoint.load(saved, only="objective")["kmeans"])
    else:
        with distributed.rank_0_first():
            if rank == 0:
                kmeans = _fit_kmeans(store, train, config, shape, device, folder)
            else:
                kmeans = clustering.KMeans.load(kmeans_path)
    shape.vocab_sizes = [len(kmeans.cluster_centers_)]

    torch.manual_seed(config.seed)
    objective = MaskedPrediction(config, shape, kmeans, store, validation, device)
    part, num_parts = distributed.data_rank(), distributed.num_data_ranks()
    loader = random_crops(store, train, config, shuffle=True, rank=part, num_ranks=num_parts)
    ids = store.index["record_id"].to_numpy()
    loop = Loop(
        config,
        objective,
        loader,
        folder=folder,
        device=device,
        dtype=dtype,
        record_names=lambda index: ids[index],
        data_key=data_key(store, train, validation),
        betas=(0.9, config.beta2),
        eps=config.adam_eps,
        title="pretrain",
        facts={"records": {"train": len(train), "validation": len(validation)}, "store": str(store.path)},
    )
    progress = loop.run()
    return {
        "model": objective.file,
        "folder": folder,
        "metrics_csv": folder / "metrics.csv",
        "kmeans": kmeans_path,
        "clusters": folder / "clusters.json",
        "step": progress.step,
        "finished": progress.finished,
        "best_step": progress.best_step,
        "metrics": progress.best_metrics,
    }


def _fit_kmeans(
    store: data.Store,
    train: np.ndarray,
    config: PretrainConfig,
    shape: HubertECGConfig,
    device: torch.device,
    folder: Path,
) -> clustering.KMeans:
    kmeans, quality = fit_kmeans(store, train, config, shape, device)
    folder.mkdir(parents=True, exist_ok=True)
    kmeans.save(folder / "kmeans.safetensors")
    write_json(folder / "clusters.json", quality)
    evaluation.write_report(
        folder / "clusters.html",
        title="Clusters of pretraining",
        cluster_counts=np.array(quality["counts"]),
        cluster_scores=quality["scores"],
        facts={name: quality[name] for name in ("feature_type", "num_clusters", "num_records", "num_tokens")},
    )
    scores = "  ".join(f"{name} {value:.4g}" for name, value in quality["scores"].items() if value is not None)
    say(f"pretrain: {quality['num_clusters']} clusters of {quality['num_tokens']} tokens  {scores}")
    return kmeans


def model_config(config: PretrainConfig) -> HubertECGConfig:
    """Shape of the model of a run; the number of clusters is not known yet where k-means comes from a file.

    Raises:
        UserError: If there is no model for the sampling rate.
    """
    overrides: dict[str, Any] = {
        "vocab_sizes": [config.num_clusters],
        "mask_time_prob": config.mask_prob,
        "mask_time_length": config.mask_length,
        "compat": config.compat,
    }
    if config.layerdrop is not None:
        overrides["layerdrop"] = config.layerdrop
    if config.dropout is not None:
        overrides |= dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout"), config.dropout)
    rate = 500 / config.downsampling_factor
    try:
        return HubertECGConfig.preset(config.size, sampling_rate_hz=rate, **overrides)
    except ValueError as error:
        raise UserError(
            f"pretrain: there is no {config.size} model for downsampling_factor {config.downsampling_factor} "
            f"(500 Hz divided by it): {error}"
        ) from error


class MaskedPrediction(Objective):
    """Predict the k-means clusters of masked tokens.

    Args:
        config: Settings of the run.
        shape: Shape of the model.
        kmeans: Gives the clusters.
        store: Where the validation records are.
        validation: Their positions.
        device: Where the model runs.
    """

    model: HubertECGForPretraining
    metrics = ("masked_loss", "unmasked_loss", "accuracy", "predicted_clusters")
    monitor = "loss"

    def __init__(
        self,
        config: PretrainConfig,
        shape: HubertECGConfig,
        kmeans: Any,
        store: data.Store,
        validation: np.ndarray,
        device: torch.device,
    ) -> None:
        self.config, self.device, self.kmeans = config, device, kmeans
        self.model = HubertECGForPretraining(shape).to(device)
        self.pseudo_labels = PseudoLabels(kmeans, config.feature_type, config.compat, shape.sampling_rate_hz)
        # Inputs of micro-batches that were counted and not yet used.
        self._prepared: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.folder = Path(config.output_dir) / NAME
        self.file = Path(config.output_dir) / f"{NAME}.pt"
        # Random crops, but always those of epoch 0: every validation sees the same samples under the same mask.
        self.share = distributed.Share(validation, config.batch_size)
        self.validation = random_crops(store, self.share.indices, config, shuffle=False)

    def counts(self, batch: data.Batch, step: int, micro: int) -> Sequence[float] | Tensor:
        inputs = self._prepared[micro] = self._inputs(batch, 0, step)
        _, labels, lengths, mask = inputs
        num_samples = batch.ecg.shape[-1]
        if bool((lengths < num_samples).any()):
            valid = token_mask(self.model.config, lengths, num_samples).to(mask.device, non_blocking=True)
            masked = valid.gather(1, mask).sum()
            return torch.stack([masked, valid.sum() - masked])[: 1 if self.config.alpha == 1 else 2]
        return (mask.numel(),) if self.config.alpha == 1 else (mask.numel(), labels.numel() - mask.numel())

    def loss(self, batch: data.Batch, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self._prepared.pop(micro, None)
        ecg, labels, lengths, mask = self._inputs(batch, 0, step) if inputs is None else inputs
        output = self.model(ecg, labels=labels, mask_indices=mask, lengths=lengths, alpha=self.config.alpha)
        metrics = {"masked_loss": output.masked_loss, "accuracy": output.accuracy}
        if output.unmasked_loss is None:
            return output.loss, metrics
        metrics["unmasked_loss"] = output.unmasked_loss
        alpha = self.config.alpha
        return torch.stack([alpha * output.masked_loss, (1 - alpha) * output.unmasked_loss]), metrics

    def validate(self, poll: Callable[[], None]) -> dict[str, float]:
        sums = torch.zeros(4, device=self.device)
        predicted = torch.zeros(self.model.config.vocab_sizes[0], dtype=torch.int64, device=self.device)
        for batch in self.share.polled(self.validation.batches(0), poll):
            ecg, labels, lengths, mask = self._inputs(batch, 1)
            output = self.model(ecg, labels=labels, mask_indices=mask, lengths=lengths, alpha=0.5, output_logits=True)
            means = output.masked_loss, output.unmasked_loss, output.accuracy, torch.ones_like(output.accuracy)
            sums += len(batch.index) * torch.stack(means).float()
            guesses = output.logits[0].argmax(-1)
            heard = guesses.flatten() if output.valid is None else guesses[output.valid]
            predicted += torch.bincount(heard, minlength=len(predicted))
        distributed.add_up(predicted)
        sums = distributed.add_up(sums)
        masked, unmasked, accuracy = (sums[:3] / sums[3]).tolist()
        alpha = self.config.alpha
        return {
            "loss": masked if alpha == 1 else alpha * masked + (1 - alpha) * unmasked,
            "masked_loss": masked,
            "unmasked_loss": unmasked,
            "accuracy": accuracy,
            "predicted_clusters": effective_number(predicted.cpu().numpy()),
        }

    def save_best(self) -> None:
        save_file(self.model, self.file, extra=self._extra())
        self.model.save_pretrained(self.folder)

    def save_last(self) -> None:
        self.model.save_pretrained(self.folder / "last")

    def state(self) -> dict[str, Any]:
        return {"kmeans": self.kmeans.state()}

    def _inputs(self, batch: data.Batch, *key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Crops, their clusters, valid samples of each lead, and the mask drawn for each record under this key."""
        ecg = batch.ecg.to(self.device, non_blocking=True)
        lengths = lead_lengths(batch)
        labels = self.pseudo_labels(batch.leads.to(self.device, non_blocking=True))
        num_samples = ecg.shape[-1]
        # Without padding the mask is drawn without a look at validity: no copy to the device, and a shorter sort.
        padded = bool((lengths < num_samples).any())
        valid = token_mask(self.model.config, lengths, num_samples) if padded else None
        mask = span_mask(
            len(ecg),
            labels.shape[1],
            self.config.mask_prob,
            self.config.mask_length,
            valid,
            seed_of(self.config.seed, *key),
            batch.index,
            device=self.device,
        )
        return ecg, labels, lengths, mask

    def _extra(self) -> dict[str, Any]:
        config = self.config
        return {
            "preprocessing": {"downsampling_factor": config.downsampling_factor, "compat": config.compat},
            "feature_type": config.feature_type,
            "settings": to_json(config),
        }


def effective_number(counts: np.ndarray) -> float:
    """How many clusters are in use: the exponential of the entropy of their counts.

    >>> effective_number(np.array([5, 5, 0]))
    2.0
    """
    share = counts[counts > 0] / max(counts.sum(), 1)
    return round(math.exp(-(share * np.log(share)).sum()), 6)
