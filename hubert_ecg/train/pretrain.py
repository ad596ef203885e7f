"""Training in an iteration of pretraining: a model that predicts the clusters of masked tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import clustering, data
from hubert_ecg.config import PretrainConfig, to_json
from hubert_ecg.features import token_places
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining, num_tokens, save_file, token_mask
from hubert_ecg.ops import span_mask
from hubert_ecg.train import distributed, machine, sharded_checkpoint
from hubert_ecg.train.cluster_use import ClusterUse
from hubert_ecg.train.logs import say
from hubert_ecg.train.loop import Loop
from hubert_ecg.train.objective import Objective
from hubert_ecg.train.pseudo_labels import PseudoLabels, StoredLabels
from hubert_ecg.train.records import data_key, lead_lengths, random_crops
from hubert_ecg.train.run import NAME, Run, files_of
from hubert_ecg.train.schedule import seed_of
from hubert_ecg.train.teacher import load_start


def train(run: Run, kmeans: Sequence[clustering.KMeans], stage: str = "") -> dict[str, Any]:
    """Train the model of an iteration on the clusters of these k-means models, or on the labels of ``config.labels``.

    Returns:
        ``model`` (the .pt file), ``folder``, ``metrics_csv``, ``kmeans``, ``clusters``, ``step``, ``finished``,
        ``best_step`` and ``metrics`` of the best validation.
    """
    config, store, title = run.config, run.store, f"{run.title}{stage}"
    labels: PseudoLabels | StoredLabels
    if config.labels:
        labels = StoredLabels(store, config.labels.split(","), run.device)
        run.shape.vocab_sizes = labels.vocab_sizes
    else:
        labels = PseudoLabels(run.featuriser, kmeans)
        run.shape.vocab_sizes = [len(one.cluster_centers_) for one in kmeans]
    torch.manual_seed(config.seed)
    objective = MaskedPrediction(config, run.shape, labels, store, run.validation, run.device, title)
    resumed = config.resume and distributed.agreed(sharded_checkpoint.find(run.folder) is not None)
    if run.start is not None and not resumed:
        load_start(objective.model, run.start, str(config.start_from))
    loader = random_crops(
        store,
        run.train,
        config,
        shuffle=True,
        labels=labels.names,
        rank=distributed.data_rank(),
        num_ranks=distributed.num_data_ranks(),
        device=run.device,
    )
    loop = Loop(
        config,
        objective,
        loader,
        folder=run.folder,
        device=run.device,
        dtype=machine.dtype(config.precision, run.device),
        record_names=lambda index: store.column("record_id")[index],
        data_key=data_key(store, run.train, run.validation),
        betas=(0.9, config.beta2),
        eps=config.adam_eps,
        title=title,
        facts={"records": {"train": len(run.train), "validation": len(run.validation)}, "store": str(store.path)},
    )
    objective.warmup_steps = loop.schedule.warmup_steps
    progress = loop.run()
    return {
        **files_of(run, len(kmeans)),
        "step": progress.step,
        "finished": progress.finished,
        "best_step": progress.best_step,
        "metrics": progress.best_metrics,
    }


class MaskedPrediction(Objective):
    """Predict the clusters of masked tokens.

    Args:
        config: Settings of the run.
        shape: Shape of the model.
        labels: Gives the clusters.
        store: Where the validation records are.
        validation: Their positions.
        device: Where the model runs.
        title: What lines begin with.
    """

    model: HubertECGForPretraining
    monitor = "loss"

    def __init__(
        self,
        config: PretrainConfig,
        shape: HubertECGConfig,
        labels: PseudoLabels | StoredLabels,
        store: data.Store,
        validation: np.ndarray,
        device: torch.device,
        title: str = "pretrain",
    ) -> None:
        self.config, self.device, self.labels, self.title = config, device, labels, title
        self.model = HubertECGForPretraining(shape).to(device)
        self.metrics = ("masked_loss", "unmasked_loss", "accuracy", *ClusterUse.columns(len(shape.vocab_sizes)))
        # Alarms that were raised and still hold; before the warm-up is over, a model predicts few clusters anyway.
        self._alarms: set[str] = set()
        self._step = self.warmup_steps = 0
        # Inputs of micro-batches that were counted and not yet used.
        self._prepared: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.folder = Path(config.output_dir) / NAME
        self.file = Path(config.output_dir) / f"{NAME}.pt"
        # Random crops, but always those of epoch 0: every validation sees the same samples under the same mask.
        self.share = distributed.Share(validation, config.batch_size)
        self.validation = random_crops(
            store, self.share.indices, config, shuffle=False, labels=labels.names, device=device
        )
        self._places = token_places(self.validation.num_samples, shape.sampling_rate_hz).to(device)

    def counts(self, batch: data.Batch, step: int, micro: int) -> Sequence[float] | Tensor:
        ecg, _, lengths, mask = self._prepared[micro] = self._inputs(batch, 0, step)
        return self._num_tokens(ecg, lengths, mask)[: 1 if self.config.alpha == 1 else 2]

    def loss(self, batch: data.Batch, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._step = step + 1
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
        # Masked and accuracy are means over masked tokens, unmasked over the others: then the batches do not matter.
        sums, counts = torch.zeros(3, device=self.device), torch.zeros(3, device=self.device)
        use = ClusterUse(self.model.config.vocab_sizes, self.device)
        for batch in self.share.polled(self.validation.batches(0), poll):
            ecg, labels, lengths, mask = self._inputs(batch, 1)
            output = self.model(ecg, labels=labels, mask_indices=mask, lengths=lengths, alpha=0.5)
            masked, unmasked = self._num_tokens(ecg, lengths, mask)
            counted = torch.stack([masked, unmasked, masked])
            counts += counted
            sums += counted * torch.stack([output.masked_loss, output.unmasked_loss, output.accuracy]).float()
            use.add(labels, self.model.likeliest(output.last_hidden_state), output.valid)
        for of_both in use.counts:
            distributed.add_up(of_both)
        # NaN where no token is of a kind.
        means = distributed.add_up(sums) / distributed.add_up(counts)
        self._raise_alarms(use)
        masked_loss, unmasked_loss, accuracy = means.tolist()
        alpha = self.config.alpha
        of_others = (1 - alpha) * unmasked_loss if alpha < 1 and counts[1] else 0
        return {
            "loss": alpha * masked_loss + of_others,
            "masked_loss": masked_loss,
            "unmasked_loss": unmasked_loss,
            "accuracy": accuracy,
            **use.metrics(),
        }

    def _num_tokens(self, ecg: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """``[2]``: how many masked tokens and how many others are no padding; asked of no device."""
        num_samples = ecg.shape[-1]
        if bool((lengths >= num_samples).all()):
            total = len(ecg) * num_tokens(self.model.config, ecg.shape[1] * num_samples)
            return torch.tensor([mask.numel(), total - mask.numel()]).to(mask.device, non_blocking=True)
        valid = token_mask(self.model.config, lengths, num_samples).to(mask.device, non_blocking=True)
        masked = valid.gather(1, mask).sum()
        return torch.stack([masked, valid.sum() - masked])

    def _raise_alarms(self, use: ClusterUse) -> None:
        """Say what is wrong with clusters, once until it is mended."""
        alarms = use.alarms() if self._step > self.warmup_steps else {}
        for name in sorted(alarms.keys() - self._alarms):
            if distributed.rank() == 0:
                say(f"{self.title}: warning at step {self._step}: {alarms[name]}")
        self._alarms = set(alarms)

    def save_best(self) -> None:
        save_file(self.model, self.file, extra=self._extra())
        self.model.save_pretrained(self.folder)

    def save_last(self) -> None:
        self.model.save_pretrained(self.folder / "last")

    def state(self) -> dict[str, Any]:
        return {**self.labels.state(), "alarms": sorted(self._alarms), "step": self._step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.labels.check_same(state)
        self._alarms, self._step = set(state["alarms"]), state["step"]

    def _inputs(self, batch: data.Batch, *key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Crops, their clusters, valid samples of each lead, and the mask drawn for each record under this key."""
        ecg = batch.ecg.to(self.device, non_blocking=True)
        lengths = lead_lengths(batch)
        labels = self.labels(batch)
        num_samples = ecg.shape[-1]
        # Without padding the mask is drawn without a look at validity: no copy to the device, and a shorter sort.
        padded = bool((lengths < num_samples).any())
        valid = token_mask(self.model.config, lengths, num_samples) if padded else None
        mask = span_mask(
            len(ecg),
            labels.shape[-1],
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
