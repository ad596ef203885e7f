"""A pretraining run that takes a second: its settings, and how tests stop it. As a script, what ranks do of it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hubert_ecg import cli, train
from hubert_ecg.config import PretrainConfig
from hubert_ecg.train import distributed
from hubert_ecg.train.objective import Objective
from hubert_ecg.train.run import open_run
from hubert_ecg.train.stopping import Interrupted
from hubert_ecg.train.targets import find_targets


def settings(folder: Path, data_path: Path, **fields) -> PretrainConfig:
    defaults = {
        "size": "tiny",
        "batch_size": 5,
        "max_steps": 12,
        "validate_every": 4,
        "checkpoint_every": 3,
        "log_every": 2,
        "learning_rate": 1e-3,
        "mask_prob": 0.33,
        "num_clusters": 8,
        "layerdrop": 0.3,
        "num_workers": 0,
        "device": "cpu",
    }
    return PretrainConfig(**{"data_path": data_path, "output_dir": folder, **defaults, **fields})


@contextlib.contextmanager
def stopped(objective: type[Objective], where: Callable[[Objective, int], bool]) -> Iterator[None]:
    """A run inside is told to stop in the middle of the step for which this holds, and does."""
    loss = objective.loss

    def stopping(self, batch, step, micro):
        if where(self, step):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, step, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "loss", stopping)
        with pytest.raises(Interrupted, match="143"):
            yield


def resume(folder: str, store: str, threads: str) -> None:
    """Train, to be killed on the way."""
    torch.set_num_threads(int(threads))
    train.pretrain(settings(Path(folder), Path(store), resume=True))


def share(folder: str, store: str, teacher: str, name: str) -> None:
    """Find clusters of a teacher's hidden states, extract these and label the store."""
    latent = {"feature_type": "latent", "teacher": teacher}
    flags = [word for flag, value in latent.items() for word in (f"--{flag}", value)]
    common = ["--data_path", store, "--num_workers", "0", "--device", "cpu", *flags]
    with distributed.ranks("cpu") as (device, _, _):
        find_targets(open_run(settings(Path(folder), Path(store), **latent), "both", device))
        assert cli.main(["extract", *common, "--output_path", f"{folder}/features"]) == 0
        kmeans = f"{folder}/hubert_ecg/kmeans.safetensors"
        assert cli.main(["label", *common, "--kmeans_path", kmeans, "--name", name]) == 0


if __name__ == "__main__":
    {"resume": resume, "share": share}[sys.argv[1]](*sys.argv[2:])
