"""What an iteration of pretraining works with: its records, its model's shape, the models it begins with, its files."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import data
from hubert_ecg.config import PretrainConfig, UserError
from hubert_ecg.features import Latent
from hubert_ecg.models import HubertECGConfig
from hubert_ecg.train import distributed, machine
from hubert_ecg.train.logs import say
from hubert_ecg.train.pseudo_labels import Featuriser
from hubert_ecg.train.records import open_records, split_for_pretraining
from hubert_ecg.train.teacher import load_teacher, read_start

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
        start: Weights to start from; None draws them.
    """

    config: PretrainConfig
    title: str
    device: torch.device
    store: data.Store
    train: np.ndarray
    validation: np.ndarray
    shape: HubertECGConfig
    teacher: Latent | None
    start: dict[str, Tensor] | None

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
    """Open the records of an iteration, and the models it begins with.

    Raises:
        UserError: If the data or the settings do not allow it.
    """
    machine.dtype(config.precision, device)
    shape = model_config(config)
    with distributed.rank_0_first():
        store = open_records(config, config.downsampling_factor, config.compat)
    train, validation, news = split_for_pretraining(store, config.validation_share, config.seed)
    teacher = None if config.labels else load_teacher(config, shape, device)
    start = None if config.start_from is None else read_start(config.start_from, shape)
    run = Run(config, title, device, store, train, validation, shape, teacher, start)
    run.tell(news)
    return run


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
    for name in ("layerdrop", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if getattr(config, name) is not None:
            overrides[name] = getattr(config, name)
    if config.dropout is not None:
        overrides |= dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout"), config.dropout)
    rate = 500 / config.downsampling_factor
    try:
        return HubertECGConfig.preset(config.size, sampling_rate_hz=rate, **overrides)
    except ValueError as error:
        raise UserError(
            f"pretrain: there is no such {config.size} model for downsampling_factor {config.downsampling_factor} "
            f"(500 Hz divided by it): {error}"
        ) from error
