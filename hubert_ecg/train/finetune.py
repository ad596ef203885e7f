"""Fine-tuning: from a pretrained model and a labelled data set to a classifier that knows its labels."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hubert_ecg import data, evaluation
from hubert_ecg.config import FinetuneConfig, UserError, to_json
from hubert_ecg.models import HubertECGConfig, HubertECGForClassification, save_file
from hubert_ecg.models.pretrained import config_of, locate, read_weights
from hubert_ecg.train import distributed, machine, parallel
from hubert_ecg.train.augment import Augment, augmentations
from hubert_ecg.train.logs import check_wandb, say
from hubert_ecg.train.loop import Loop
from hubert_ecg.train.objective import Objective
from hubert_ecg.train.predict import even_loader, scan
from hubert_ecg.train.records import (
    data_key,
    hold_out,
    label_subset,
    lead_lengths,
    open_records,
    positive_weights,
    random_crops,
)

# Held out of the training records where the data set has no validation records.
_VALIDATION_SHARE = 0.1
_RANDOM = "random:"


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Run the finetune command.

    In ``config.output_dir``: ``<dataset>_<task>.pt`` (the best model, one file, with label names, thresholds and
    preprocessing settings) and the folder ``<dataset>_<task>`` with the same for ``from_pretrained``, ``last/``,
    ``checkpoint.safetensors``, ``metrics.csv``, ``settings.json`` and TensorBoard events.

    Under torchrun, batches are ``batch_size`` records on each rank, and rank 0 writes the files.

    Returns:
        ``model`` (the .pt file), ``folder``, ``metrics_csv``, ``step``, ``finished``, ``best_step`` and ``metrics`` of
        the best validation.

    Raises:
        UserError: If the data, the settings, the weights or the checkpoint to resume from do not allow it.
        RunError: If the loss is not finite.
    """
    check_wandb(config.wandb)
    augmentations(config.augment)
    data.check_task(config.dataset, config.data_path, config.task)
    same_bits = machine.same_bits(config.deterministic)
    with same_bits, distributed.ranks(config.device, config.tensor_ranks) as (device, _, _):
        parallel.check(config)
        return _finetune(config, device)


def _finetune(config: FinetuneConfig, device: torch.device) -> dict[str, Any]:
    dtype = machine.dtype(config.precision, device)
    name = f"{config.dataset}_{config.task}"
    pretrained = input_settings(config)

    with distributed.rank_0_first():
        store = open_records(config, **pretrained)
    records = TaskRecords(store, config)
    for line in records.news:
        say(f"finetune: {line}")

    torch.manual_seed(config.seed)
    model = build_model(config, records, pretrained).to(device)
    objective = Classification(config, model, records, device)
    part, num_parts = distributed.data_rank(), distributed.num_data_ranks()
    loader = random_crops(store, records.train, config, shuffle=True, rank=part, num_ranks=num_parts, device=device)
    loop = Loop(
        config,
        objective,
        loader,
        folder=Path(config.output_dir) / name,
        device=device,
        dtype=dtype,
        record_names=lambda index: store.column("record_id")[index],
        data_key=data_key(store, records.train, records.validation),
        betas=(0.9, 0.98),
        title=f"finetune {name}",
        facts={
            "records": {"train": len(records.train), "validation": len(records.validation)},
            "store": str(store.path),
            "label_names": list(records.label_names),
            "problem": records.problem,
            "preprocessing": pretrained,
        },
    )
    progress = loop.run()
    return {
        "model": objective.file,
        "folder": loop.folder,
        "metrics_csv": loop.folder / "metrics.csv",
        "step": progress.step,
        "finished": progress.finished,
        "best_step": progress.best_step,
        "metrics": progress.best_metrics,
    }


def input_settings(config: FinetuneConfig) -> dict[str, Any]:
    """How the pretrained model wants its input: ``downsampling_factor`` and ``compat``.

    Raises:
        UserError: If there is no such model.
    """
    if config.pretrained_model.startswith(_RANDOM):
        return {"downsampling_factor": 5, "compat": "corrected"}
    fields, _ = read_weights(locate(config.pretrained_model))
    rate = config_of(fields, source=config.pretrained_model).sampling_rate_hz
    # Weights that do not say how they were made are published ones.
    return {"downsampling_factor": round(500 / rate), "compat": fields.get("compat", "published")}


class TaskRecords:
    """Training and validation records of a task, with their targets.

    Attributes:
        store: Where they are.
        problem: multilabel, multiclass or regression.
        label_names: Names of the outputs.
        targets: ``[len(store), C] float32``.
        train: Positions of the training records, ascending.
        validation: Positions of the validation records, ascending.
        news: What the user should know about them.

    Raises:
        UserError: If the task, its problem and the records do not fit together.
    """

    def __init__(self, store: data.Store, config: FinetuneConfig) -> None:
        self.store = store
        self.news: list[str] = []
        self.label_names = store.label_names(config.task)
        own_problem = store.problem_of(config.task)
        self.problem = own_problem if config.problem == "auto" else config.problem
        if "regression" in (self.problem, own_problem) and self.problem != own_problem:
            raise UserError(f"finetune: problem of {config.dataset} {config.task} is {own_problem}, got {self.problem}")
        if not self.label_names:
            raise UserError(f"finetune: no record of {config.dataset} has a label of the task {config.task}")
        self.targets = store.targets(config.task)
        self.train = self._usable(store.split("train"), config)
        self.validation = self._usable(store.split("validation"), config)
        if len(self.train) + len(self.validation) == 0:
            raise UserError(f"finetune: {config.dataset} has no training record with a label of {config.task}")
        if len(self.validation) == 0:
            if len(self.train) < 2:
                raise UserError(f"finetune: {config.dataset} has 1 training record and none to validate on")
            self.train, self.validation = hold_out(store, self.train, _VALIDATION_SHARE, config.seed)
            self.news.append(
                f"no validation records: {len(self.validation)} of the training records, drawn by seed, validate"
            )
        if len(self.train) == 0:
            raise UserError(f"finetune: {config.dataset} has no training record for {config.task}")
        if config.label_share != 1:
            self.train = self.train[label_subset(self.targets[self.train], config.label_share, config.seed)]
        self.news.append(
            f"{len(self.train)} records train, {len(self.validation)} validate, "
            f"{len(self.label_names)} {'label' if len(self.label_names) == 1 else 'labels'} ({self.problem})"
        )
        self._tell_unlabelled(config)
        if self.problem != "regression":
            without = (self.targets[self.train] == 1).sum(0) == 0
            if without.any():
                names = ", ".join(name for name, missing in zip(self.label_names, without, strict=True) if missing)
                self.news.append(f"no positive training record for {names}")

    def _tell_unlabelled(self, config: FinetuneConfig) -> None:
        used = np.concatenate((self.store.split("train"), self.store.split("validation")))
        if count := int(np.isnan(self.targets[used]).any(1).sum()):
            self.news.append(f"{count} records of which {config.task} is not known are left out")
        self._tell_unknown_labels(self.store.datasets[used], self.targets[used] == 1)
        if self.problem == "multilabel" and (count := int((self.targets[used].sum(1) == 0).sum())):
            what = "kept as negatives" if config.unlabelled == "keep" else "left out"
            self.news.append(f"{count} records without a label of the task are {what} (--unlabelled)")

    def _tell_unknown_labels(self, datasets: np.ndarray, positive: np.ndarray) -> None:
        """Data sets name findings differently: what one never states may be there all the same."""
        has = {name: positive[datasets == name].any(0) for name in np.unique(datasets)}
        for name, found in has.items():
            if found.any() and not found.all() and len(has) > 1:
                self.news.append(
                    f"{name} has no record with {len(found) - found.sum()} of the labels: all are negatives"
                )

    def _usable(self, records: np.ndarray, config: FinetuneConfig) -> np.ndarray:
        """Those whose target is known: a data set without the task says nothing of its records."""
        records = records[np.isfinite(self.targets[records]).all(1)]
        targets = self.targets[records]
        if self.problem == "regression":
            return records
        num_labels = targets.sum(1)
        if self.problem == "multiclass":
            several = int((num_labels > 1).sum())
            if several:
                raise UserError(
                    f"finetune: multiclass needs one label for each record, got {several} records of {config.dataset} "
                    f"{config.task} with several; use --problem multilabel"
                )
            return records[num_labels == 1]
        return records[num_labels > 0] if config.unlabelled == "drop" else records

    @property
    def has_auroc(self) -> bool:
        """Whether any label has both positive and negative validation records."""
        targets = self.targets[self.validation] == 1
        return bool((targets.any(0) & ~targets.all(0)).any())


def build_model(
    config: FinetuneConfig, records: TaskRecords, preprocessing: dict[str, Any]
) -> HubertECGForClassification:
    """The classifier of a run: the pretrained encoder under a fresh head."""
    fields: dict[str, Any] = {
        "layerdrop": config.layerdrop,
        "hidden_dropout": config.encoder_dropout,
        "attention_dropout": config.encoder_dropout,
        "activation_dropout": config.encoder_dropout,
        "compat": preprocessing["compat"],
        "thresholds": None,
    }
    head: dict[str, Any] = {
        "label_names": records.label_names,
        "problem": records.problem,
        "head": config.head,
        "dropout": config.dropout,
    }
    if config.pretrained_model.startswith(_RANDOM):
        size = config.pretrained_model.removeprefix(_RANDOM)
        try:
            shape = HubertECGConfig.preset(size, **fields)
        except ValueError as error:
            raise UserError(f"finetune: pretrained_model random:SIZE: {error}") from error
        model = HubertECGForClassification(shape, **head)
    else:
        model = HubertECGForClassification.from_pretrained(config.pretrained_model, **fields, **head)
    model.config.extra |= {
        "dataset": config.dataset,
        "task": config.task,
        "crop_s": config.crop_s,
        "num_crops": config.num_crops,
    }
    return model


class Classification(Objective):
    """Fit a head, and as much of the encoder as is not frozen, to the targets of a task.

    Args:
        config: Settings of the run.
        model: The model, on its device.
        records: The records of the task.
        device: Where the model runs.
    """

    model: HubertECGForClassification

    def __init__(
        self, config: FinetuneConfig, model: HubertECGForClassification, records: TaskRecords, device: torch.device
    ) -> None:
        self.config, self.model, self.records, self.device = config, model, records, device
        self.file = Path(config.output_dir) / f"{config.dataset}_{config.task}.pt"
        self.folder = Path(config.output_dir) / f"{config.dataset}_{config.task}"
        self.frozen: list[nn.Module] = []
        if config.freeze_encoder:
            self.frozen = [model.hubert_ecg]
        elif config.freeze_extractor and not config.pretrained_model.startswith(_RANDOM):
            # Random filters are worth no freezing.
            self.frozen = [model.hubert_ecg.feature_extractor]
        for module in self.frozen:
            module.requires_grad_(False)
        # Takes part in masked prediction alone: without a gradient it would still decay.
        model.hubert_ecg.masked_spec_embed.requires_grad_(False)

        targets = records.targets
        train = targets[records.train]
        self.mean, self.scale = np.zeros(targets.shape[1]), np.ones(targets.shape[1])
        self.weight: Tensor | None = None
        if records.problem == "regression":
            # The head learns standardised values; files hold a head that gives the values themselves.
            self.mean, spread = train.mean(0), train.std(0)
            self.scale = np.where(spread > 0, spread, 1.0)
            self.metrics, self.monitor, self.higher_is_better = ("rmse", "r2"), "rmse", False
        else:
            if config.class_weights:
                weight = positive_weights(train)
                self.weight = torch.from_numpy(weight).to(device)
                # A mean over classes of different weight is one over the weights.
                self.record_weight = weight[targets.argmax(1)].astype(np.float64)
            self.metrics = ("auroc", "auprc")
            self.monitor, self.higher_is_better = ("auroc", True) if records.has_auroc else ("loss", False)
        standardised = np.nan_to_num((targets - self.mean) / self.scale).astype(np.float32)
        self.targets = torch.from_numpy(standardised).to(device)
        self.share = distributed.Share(records.validation, config.batch_size)
        self.validation = even_loader(
            records.store, self.share.indices, config.batch_size, config.num_crops, config.crop_s, config.num_workers
        )
        rate_hz = records.store.sampling_rate_hz
        self.augment = None if config.augment is None else Augment(config.augment, config.seed, rate_hz)
        self._last_scores = np.empty((0, 0))

    def train_mode(self) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()

    def counts(self, batch: data.Batch, step: int, micro: int) -> Sequence[float]:
        if self.records.problem != "multiclass" or self.weight is None:
            return (len(batch.index),)
        return (float(self.record_weight[batch.index].sum()),)

    def loss(self, batch: data.Batch, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        targets = self.targets[batch.index.to(self.device, non_blocking=True)]
        batch = dataclasses.replace(batch, ecg=batch.ecg.to(self.device, non_blocking=True))
        if self.augment is not None:
            batch = self.augment(batch, step)
        output = self.model(
            batch.ecg,
            targets=targets,
            lengths=lead_lengths(batch),
            pos_weight=self.weight,
        )
        return output.loss, {}

    def validate(self, poll: Callable[[], None]) -> dict[str, float]:
        scores, loss = scan(
            self.model, self.validation, self.device, self.share, targets=self.targets, weight=self.weight, poll=poll
        )
        scores = scores * self.scale + self.mean
        self._last_scores = scores
        records = self.records
        found = evaluation.evaluate(
            records.targets[records.validation], scores, records.label_names, records.problem, num_bootstrap=0
        )
        values = {name: found.macro[name].value for name in self.metrics}
        return {"loss": loss, **{name: float("nan") if value is None else value for name, value in values.items()}}

    def save_best(self) -> None:
        self._choose_thresholds()
        with self._in_units():
            save_file(self.model, self.file, extra=self._extra())
            self.model.save_pretrained(self.folder)

    def save_last(self) -> None:
        self._choose_thresholds()
        with self._in_units():
            self.model.save_pretrained(self.folder / "last")

    def _choose_thresholds(self) -> None:
        """On the scores of the last validation, which are those of the model as it is now."""
        records = self.records
        if records.problem == "multilabel":
            targets = records.targets[records.validation]
            self.model.config.thresholds = evaluation.choose_thresholds(targets, self._last_scores).tolist()

    @contextlib.contextmanager
    def _in_units(self) -> Iterator[None]:
        """The head gives values in their unit instead of standardised ones."""
        if self.records.problem != "regression":
            yield
            return
        head = self.model.classifier
        last = head[-1] if isinstance(head, nn.Sequential) else head
        assert isinstance(last, nn.Linear)
        before = {name: value.clone() for name, value in last.state_dict().items()}
        device = last.weight.device
        scale, mean = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (self.scale, self.mean))
        with torch.no_grad():
            last.weight *= scale[:, None]
            last.bias.mul_(scale).add_(mean)
        try:
            yield
        finally:
            last.load_state_dict(before)

    def _extra(self) -> dict[str, Any]:
        config, records = self.config, self.records
        return {
            "dataset": config.dataset,
            "task": config.task,
            "problem": records.problem,
            "label_names": list(records.label_names),
            "thresholds": self.model.config.thresholds,
            "crop_s": config.crop_s,
            "num_crops": config.num_crops,
            "preprocessing": {
                "downsampling_factor": round(500 / self.model.config.sampling_rate_hz),
                "compat": self.model.config.compat,
            },
            "settings": to_json(config),
        }
