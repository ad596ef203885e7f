"""A model small enough to be stepped a hundred times in a second, with dropout so that random states matter."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hubert_ecg.config import FinetuneConfig
from hubert_ecg.files import replacing
from hubert_ecg.train.distributed import num_ranks, rank, ranks
from hubert_ecg.train.loop import Loop
from hubert_ecg.train.objective import Objective
from hubert_ecg.train.throughput import COLUMNS

NUM_RECORDS, NUM_INPUTS = 22, 6


@dataclasses.dataclass
class ToyBatch:
    x: torch.Tensor
    y: torch.Tensor
    index: np.ndarray


class ToyBatches:
    """Order is a pure function of the epoch, as the loader's is; of several ranks each gets a part of each batch."""

    def __init__(self, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(NUM_RECORDS, NUM_INPUTS, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(NUM_RECORDS, 1, generator=generator)
        self.batch_size = batch_size

    @property
    def num_batches(self) -> int:
        return -(-NUM_RECORDS // (self.batch_size * num_ranks()))

    def batches(self, epoch, start=0):
        order = np.random.default_rng([5, epoch]).permutation(NUM_RECORDS)
        for k in range(start, self.num_batches):
            size = self.batch_size * num_ranks()
            index = np.array_split(order[k * size : (k + 1) * size], num_ranks())[rank()]
            yield ToyBatch(self.x[index], self.y[index], index)


class ToyObjective(Objective):
    metrics = ("error",)
    higher_is_better = False

    def __init__(self, folder: Path, dropout: float = 0.2, on_step=None, seed: int = 0, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        layers = nn.Linear(NUM_INPUTS, 16), nn.LayerNorm(16), nn.Dropout(dropout), nn.Linear(16, 1)
        self.model, self.device = nn.Sequential(*layers).to(device), device
        self.folder, self.on_step = folder, on_step
        self.all = ToyBatches(NUM_RECORDS)

    def loss(self, batch, step, micro):
        if self.on_step is not None:
            self.on_step(step, batch)
        error = self.model(batch.x.to(self.device)) - batch.y.to(self.device)
        return (error**2).mean(), {"error": error.abs().mean()}

    def validate(self, poll):
        poll()
        error = self.model(self.all.x.to(self.device)) - self.all.y.to(self.device)
        return {"loss": float((error**2).mean()), "error": float(error.abs().mean())}

    def save_best(self):
        with replacing(self.folder / "best.pt") as path:
            torch.save(self.model.state_dict(), path)

    def save_last(self):
        torch.save(self.model.state_dict(), self.folder / "last.pt")


def config(folder: Path, **fields) -> FinetuneConfig:
    defaults = {"batch_size": 5, "num_epochs": 4, "learning_rate": 0.02, "log_every": 3, "checkpoint_every": 2}
    return FinetuneConfig(
        dataset="toy", task="all", pretrained_model="none", output_dir=folder, device="cpu", **{**defaults, **fields}
    )


def make_loop(folder: Path, *, on_step=None, dropout=0.2, device="cpu", dtype=torch.float32, **fields) -> Loop:
    settings = config(folder, **fields)
    objective = ToyObjective(folder, dropout=dropout, on_step=on_step, seed=settings.seed, device=device)
    batches = ToyBatches(settings.batch_size)
    return Loop(settings, objective, batches, folder=folder, device=torch.device(device), dtype=dtype)


def rows(folder: Path) -> list[str]:
    """The log without its last columns, the speed."""
    return [line.rsplit(",", len(COLUMNS))[0] for line in (folder / "metrics.csv").read_text().splitlines()]


if __name__ == "__main__":
    # A run for a test to stop: folder, settings, seconds of a step, threads, and which rank to kill when and how, once.
    folder, fields, seconds, threads, killed = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
    # Sums are split among threads: as many as in the run it is compared with.
    torch.set_num_threads(threads)

    def on_step(step, batch):
        # In one piece, or the lines of two ranks mix.
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()
        time.sleep(seconds)
        done = folder / "killed"
        if killed and [rank(), step] == killed[:2] and not done.exists():
            done.touch()
            os.kill(os.getpid(), killed[2])

    with ranks("cpu"):
        make_loop(folder, on_step=on_step, **fields).run()
