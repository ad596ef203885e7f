"""Pretraining: from a folder of recordings to a model that predicts the clusters of masked tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import clustering, data, evaluation
from hubert_ecg.config import PretrainConfig, UserError, to_json
from hubert_ecg.features import token_places
from hubert_ecg.files import write_json
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining, save_file, token_mask
from hubert_ecg.ops import span_mask
from hubert_ecg.train import checkpoint, machine
from hubert_ecg.train.cluster_use import ClusterUse
from hubert_ecg.train.logs import check_wandb, say
from hubert_ecg.train.loop import Loop, Objective
from hubert_ecg.train.pseudo_labels import PseudoLabels, fit_kmeans
from hubert_ecg.train.records import data_key, lead_lengths, open_records, random_crops, split_for_pretraining

NAME = "hubert_ecg"


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run the pretrain command.

    In ``config.output_dir``: ``hubert_ecg.pt`` (the best model, one file) and the folder ``hubert_ecg`` with the same
    for ``from_pretrained``, ``last/``, ``checkpoint.safetensors``, ``kmeans.safetensors``, ``clusters.json``
    and ``clusters.html``, ``metrics.csv``, ``settings.json`` and TensorBoard events.

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
    device = machine.device(config.device)
    dtype = machine.dtype(config.precision, device)
    shape = model_config(config)
    folder = Path(config.output_dir) / NAME

    store = open_records(config, config.downsampling_factor, config.compat)
    train, validation, news = split_for_pretraining(store, config.validation_share, config.seed)
    say(f"pretrain: {news}")

    kmeans_path = folder / "kmeans.safetensors"
    saved = folder / "checkpoint.safetensors"
    if config.resume and saved.is_file():
        kmeans = clustering.KMeans.from_state(checkpoint.load(saved)["objective"]["kmeans"])
    else:
        kmeans, quality = fit_kmeans(store, train, config, shape, device)
        folder.mkdir(parents=True, exist_ok=True)
        kmeans.save(kmeans_path)
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
    shape.vocab_sizes = [len(kmeans.cluster_centers_)]

    torch.manual_seed(config.seed)
    objective = MaskedPrediction(config, shape, kmeans, store, validation, device)
    loader = random_crops(store, train, config, shuffle=True)
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
    objective.warmup_steps = loop.schedule.warmup_steps
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
        self.metrics = ("masked_loss", "unmasked_loss", "accuracy", *ClusterUse.columns(len(shape.vocab_sizes)))
        # Alarms that were raised and still hold; before the warm-up is over, a model predicts few clusters anyway.
        self._alarms: dict[str, str] = {}
        self._step = self.warmup_steps = 0
        self.pseudo_labels = PseudoLabels(kmeans, config.feature_type, config.compat, shape.sampling_rate_hz)
        self.folder = Path(config.output_dir) / NAME
        self.file = Path(config.output_dir) / f"{NAME}.pt"
        # Random crops, but always those of epoch 0: every validation sees the same samples under the same mask.
        self.validation = random_crops(store, validation, config, shuffle=False)
        self._places = token_places(self.validation.num_samples, shape.sampling_rate_hz).to(device)

    def loss(self, batch: data.Batch, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._step = step + 1
        ecg, labels, lengths, mask = self._inputs(batch, 0, step)
        output = self.model(ecg, labels=labels, mask_indices=mask, lengths=lengths, alpha=self.config.alpha)
        metrics = {"masked_loss": output.masked_loss, "accuracy": output.accuracy}
        if output.unmasked_loss is not None:
            metrics["unmasked_loss"] = output.unmasked_loss
        return output.loss, metrics

    def validate(self, poll: Callable[[], None]) -> dict[str, float]:
        sums = torch.zeros(3, device=self.device)
        use = ClusterUse(self.model.config.vocab_sizes, self.device)
        num_records = 0
        for batch in self.validation.batches(0):
            poll()
            ecg, labels, lengths, mask = self._inputs(batch, 1)
            output = self.model(ecg, labels=labels, mask_indices=mask, lengths=lengths, alpha=0.5)
            sums += len(batch.index) * torch.stack([output.masked_loss, output.unmasked_loss, output.accuracy]).float()
            use.add(labels, self.model.likeliest(output.last_hidden_state), output.valid)
            num_records += len(batch.index)
        self._raise_alarms(use)
        masked, unmasked, accuracy = (sums / num_records).tolist()
        alpha = self.config.alpha
        return {
            "loss": masked if alpha == 1 else alpha * masked + (1 - alpha) * unmasked,
            "masked_loss": masked,
            "unmasked_loss": unmasked,
            "accuracy": accuracy,
            **use.metrics(),
        }

    def _raise_alarms(self, use: ClusterUse) -> None:
        """Say what is wrong with clusters, once until it is mended."""
        alarms = use.alarms() if self._step > self.warmup_steps else {}
        for name in sorted(alarms.keys() - self._alarms.keys()):
            say(f"pretrain: warning at step {self._step}: {alarms[name]}")
        self._alarms = alarms

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
            mask_strategy=self.config.mask_strategy,
            places=self._places,
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


def seed_of(*key: int) -> int:
    """A seed that depends on the key alone, so that nothing about it needs to be saved."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(seed)
