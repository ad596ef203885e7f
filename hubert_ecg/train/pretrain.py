"""One iteration of pretraining: from a folder of recordings to a model that predicts the clusters of masked tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import clustering, data, evaluation
from hubert_ecg.clustering.ranks import Ranks
from hubert_ecg.config import PretrainConfig, UserError, to_json
from hubert_ecg.features import Latent, token_places
from hubert_ecg.files import write_json
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining, save_file, token_mask
from hubert_ecg.ops import span_mask
from hubert_ecg.train import checkpoint, distributed, machine
from hubert_ecg.train.cluster_use import ClusterUse
from hubert_ecg.train.clusters import IN_MEMORY_BYTES, find_clusters, load_kmeans
from hubert_ecg.train.logs import say
from hubert_ecg.train.loop import Loop
from hubert_ecg.train.objective import Objective
from hubert_ecg.train.pseudo_labels import Featuriser, PseudoLabels, StoredLabels
from hubert_ecg.train.records import data_key, lead_lengths, open_records, random_crops, split_for_pretraining
from hubert_ecg.train.schedule import seed_of
from hubert_ecg.train.teacher import load_start, load_teacher, weights_hash
from hubert_ecg.train.token_features import FeatureWork, TokenFeatures, ValidTokens

NAME = "hubert_ecg"


@dataclasses.dataclass(frozen=True)
class Run:
    """What an iteration works with; the same on all ranks.

    Attributes:
        config: Settings.
        title: What the lines that it prints begin with.
        device: Where this rank computes.
        store: The records.
        train: Positions of those that train.
        validation: Positions of those that validate.
        shape: Shape of the model; its number of clusters is not known yet where k-means comes from a file.
        teacher: Whose hidden states are clustered; None where features are of the signal.
    """

    config: PretrainConfig
    title: str
    device: torch.device
    store: data.Store
    train: np.ndarray
    validation: np.ndarray
    shape: HubertECGConfig
    teacher: Latent | None

    @property
    def folder(self) -> Path:
        """Where the model and the logs go."""
        return Path(self.config.output_dir) / NAME

    @functools.cached_property
    def featuriser(self) -> Featuriser:
        config = self.config
        return Featuriser(
            config.feature_type, config.compat, self.shape.sampling_rate_hz, self.device, teacher=self.teacher
        )

    @functools.cached_property
    def clustered(self) -> np.ndarray:
        """Positions of the training records that clusters are found on, ascending."""
        random = np.random.default_rng(self.config.seed)
        return np.sort(random.permutation(self.train)[: self.config.kmeans_records])

    def tell(self, line: str, stage: str = "") -> None:
        """Print a line, once for all ranks."""
        if distributed.rank() == 0:
            say(f"{self.title}{stage}: {line}")


def open_run(config: PretrainConfig, title: str, device: torch.device) -> Run:
    """Open the records and the teacher of an iteration.

    Raises:
        UserError: If the data or the settings do not allow it.
    """
    machine.dtype(config.precision, device)
    shape = model_config(config)
    with distributed.rank_0_first():
        store = open_records(config, config.downsampling_factor, config.compat)
    train, validation, news = split_for_pretraining(store, config.validation_share, config.seed)
    teacher = None if config.labels else load_teacher(config, shape, device)
    run = Run(config, title, device, store, train, validation, shape, teacher)
    run.tell(news)
    return run


def find_targets(run: Run, stage: str = "") -> list[clustering.KMeans]:
    """The k-means models of a run: those of ``config.kmeans_path``, else one fitted on at most ``kmeans_records``.

    Each goes into ``kmeans.safetensors`` in the run's folder, and how good its clusters are into ``clusters.json`` and
    ``clusters.html``; those of an ensemble have a number before the dot. Features of more than a GiB are kept in a
    folder while they are clustered. Ranks share the records.

    Raises:
        UserError: If there are fewer tokens than clusters, or a given model is for other features.
    """
    config = run.config
    work = FeatureWork(run.store, run.clustered, run.featuriser, run.shape, config.crop_s, config.num_workers)
    given = config.kmeans_path is not None
    if given:
        models = load_kmeans(str(config.kmeans_path), work.shape[2], config.feature_type)
    else:
        models = [clustering.KMeans(config.num_clusters, normalize=True, max_iter=100, random_state=config.seed)]
        check_num_clusters(run, config.num_clusters, math.prod(work.shape[:2]))

    rank, num_ranks = distributed.rank(), distributed.num_ranks()
    share = work.share(rank, num_ranks)
    place = run.folder / (f"features_{rank}" if rank else "features")
    in_folder = config.keep_features or work.num_bytes > num_ranks * IN_MEMORY_BYTES
    try:
        count = share.stop - share.start
        values, valid = TokenFeatures.allocate(place if in_folder else None, (count, *work.shape[1:]), work.dtype)
        work.fill(values, valid, share)
        made = TokenFeatures(values, valid, work.record_ids(share), to_json(config))
        if config.keep_features:
            made.save(place)
        tokens = ValidTokens(made, 0, count, run.device)
        total = torch.tensor([tokens.shape[0]])
        Ranks("pretrain", num_ranks > 1).sum(total)
        num_tokens = int(total)
        if not given:
            check_num_clusters(run, config.num_clusters, num_tokens)
        try:
            found = find_clusters(tokens, models, config.seed, num_ranks)
        except ValueError as error:
            raise UserError(f"{run.title}: the {config.feature_type} features cannot be clustered ({error})") from error
    finally:
        if in_folder and not config.keep_features:
            shutil.rmtree(place, ignore_errors=True)

    if rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(found):
        quality = {
            "feature_type": config.feature_type,
            "num_clusters": len(one.counts),
            "num_records": len(work.records),
            "num_tokens": num_tokens,
            "scores": {name: value if math.isfinite(value) else None for name, value in one.scores.items()},
            "counts": one.counts.tolist(),
        }
        if rank == 0:
            one.kmeans.save(kmeans_file(run.folder, number, len(found)))
            end = ensemble_name(number, len(found))
            write_json(run.folder / f"clusters{end}.json", quality)
            evaluation.write_report(
                run.folder / f"clusters{end}.html",
                title="Clusters of pretraining",
                cluster_counts=one.counts,
                cluster_scores=quality["scores"],
                facts={name: quality[name] for name in ("feature_type", "num_clusters", "num_records", "num_tokens")},
            )
        scores = "  ".join(f"{name} {value:.4g}" for name, value in quality["scores"].items() if value is not None)
        run.tell(f"{len(one.counts)} clusters of {num_tokens} tokens  {scores}", stage)
    distributed.gather(None)
    return models


def check_num_clusters(run: Run, num_clusters: int, num_tokens: int) -> None:
    """Raises UserError where there are more clusters than tokens."""
    if num_tokens < num_clusters:
        raise UserError(
            f"{run.title}: num_clusters must be at most the number of tokens, got {num_clusters} for {num_tokens} "
            f"tokens of {len(run.clustered)} records; use fewer clusters or more records"
        )


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
    resumed = config.resume and distributed.agreed((run.folder / "checkpoint.safetensors").is_file())
    if config.start_from is not None and not resumed:
        load_start(objective.model, config.start_from, run.shape)
    ids = store.index["record_id"].to_numpy()
    loop = Loop(
        config,
        objective,
        random_crops(store, run.train, config, shuffle=True, labels=labels.names),
        folder=run.folder,
        device=run.device,
        dtype=machine.dtype(config.precision, run.device),
        record_names=lambda index: ids[index],
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


def files_of(run: Run, num_models: int) -> dict[str, Any]:
    """Where the files of an iteration are; those of the first model of an ensemble."""
    end = ensemble_name(0, num_models)
    return {
        "model": Path(run.config.output_dir) / f"{NAME}.pt",
        "folder": run.folder,
        "metrics_csv": run.folder / "metrics.csv",
        "kmeans": run.folder / f"kmeans{end}.safetensors",
        "clusters": run.folder / f"clusters{end}.json",
    }


def ensemble_name(number: int, num_models: int) -> str:
    """What the names of the files of one of several models end in.

    >>> ensemble_name(0, 1), ensemble_name(0, 2), ensemble_name(1, 2)
    ('', '_1', '_2')
    """
    return "" if num_models <= 1 else f"_{number + 1}"


def kmeans_file(folder: Path, number: int, num_models: int) -> Path:
    return folder / f"kmeans{ensemble_name(number, num_models)}.safetensors"


def saved_kmeans(run: Run) -> list[clustering.KMeans]:
    """The k-means models of the checkpoint that a run continues from.

    Raises:
        UserError: If the teacher has other weights than then.
    """
    path = run.folder / "checkpoint.safetensors"
    state = checkpoint.load(path)["objective"]
    teacher = None if run.teacher is None else weights_hash(run.teacher.model.state_dict())
    if state["teacher"] != teacher:
        raise UserError(f"resume: --teacher {run.config.teacher} has other weights than in the run of {path}")
    return [clustering.KMeans.from_state(one) for one in state["kmeans"]]


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
        self._alarms: dict[str, str] = {}
        self._step = self.warmup_steps = 0
        # Inputs of micro-batches that were counted and not yet used.
        self._prepared: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.folder = Path(config.output_dir) / NAME
        self.file = Path(config.output_dir) / f"{NAME}.pt"
        # Random crops, but always those of epoch 0: every validation sees the same samples under the same mask.
        self.share = distributed.Share(validation, config.batch_size)
        self.validation = random_crops(store, self.share.indices, config, shuffle=False, labels=labels.names)
        self._places = token_places(self.validation.num_samples, shape.sampling_rate_hz).to(device)

    def counts(self, batch: data.Batch, step: int, micro: int) -> Sequence[float] | Tensor:
        inputs = self._prepared[micro] = self._inputs(batch, 0, step)
        _, labels, lengths, mask = inputs
        num_samples = batch.ecg.shape[-1]
        if bool((lengths < num_samples).any()):
            valid = token_mask(self.model.config, lengths, num_samples).to(mask.device, non_blocking=True)
            masked = valid.gather(1, mask).sum()
            return torch.stack([masked, valid.sum() - masked])[: 1 if self.config.alpha == 1 else 2]
        return (mask.numel(),) if self.config.alpha == 1 else (mask.numel(), labels[0].numel() - mask.numel())

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
        sums = torch.zeros(4, device=self.device)
        use = ClusterUse(self.model.config.vocab_sizes, self.device)
        for batch in self.share.polled(self.validation.batches(0), poll):
            ecg, labels, lengths, mask = self._inputs(batch, 1)
            output = self.model(ecg, labels=labels, mask_indices=mask, lengths=lengths, alpha=0.5)
            means = output.masked_loss, output.unmasked_loss, output.accuracy, torch.ones_like(output.accuracy)
            sums += len(batch.index) * torch.stack(means).float()
            use.add(labels, self.model.likeliest(output.last_hidden_state), output.valid)
        for counts in use.counts:
            distributed.add_up(counts)
        sums = distributed.add_up(sums)
        self._raise_alarms(use)
        masked, unmasked, accuracy = (sums[:3] / sums[3]).tolist()
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
            if distributed.rank() == 0:
                say(f"{self.title}: warning at step {self._step}: {alarms[name]}")
        self._alarms = alarms

    def save_best(self) -> None:
        save_file(self.model, self.file, extra=self._extra())
        self.model.save_pretrained(self.folder)

    def save_last(self) -> None:
        self.model.save_pretrained(self.folder / "last")

    def state(self) -> dict[str, Any]:
        return self.labels.state()

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
