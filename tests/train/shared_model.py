"""Small pretraining runs on random records, on several ranks, which share the model as their settings say.

``shared_model.py '[{"folder": "a", "parallel": "fsdp", ...}, ...]'``
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
import unittest.mock
import warnings
from pathlib import Path

import numpy as np
import torch

from hubert_ecg.config import FinetuneConfig
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining, save_file
from hubert_ecg.models.hubert_ecg import Backbone
from hubert_ecg.train import distributed, machine
from hubert_ecg.train.loop import Loop
from hubert_ecg.train.objective import Objective
from hubert_ecg.train.stopping import Interrupted

# The last of the 5 micro-batches of an epoch is too small for 4 ranks, and the last step has 1 instead of 2.
NUM_RECORDS, GLOBAL_BATCH, NUM_CLUSTERS = 18, 4, 7
NUM_SAMPLES, NUM_TOKENS, NUM_MASKED = 200, 37, 12


@dataclasses.dataclass
class Batch:
    ecg: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    index: np.ndarray


class Batches:
    """Of several data ranks each gets a part of each batch."""

    num_batches = -(-NUM_RECORDS // GLOBAL_BATCH)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ecg = torch.randn(NUM_RECORDS, 12, NUM_SAMPLES, generator=generator)
        self.labels = torch.randint(NUM_CLUSTERS, (NUM_RECORDS, NUM_TOKENS), generator=generator)
        self.mask = torch.rand(NUM_RECORDS, NUM_TOKENS, generator=generator).argsort(1)[:, :NUM_MASKED]

    def batches(self, epoch, start=0):
        order = np.random.default_rng([5, epoch]).permutation(NUM_RECORDS)
        for k in range(start, self.num_batches):
            whole = order[k * GLOBAL_BATCH : (k + 1) * GLOBAL_BATCH]
            index = np.array_split(whole, distributed.num_data_ranks())[distributed.data_rank()]
            yield Batch(self.ecg[index], self.labels[index], self.mask[index], index)


class Prediction(Objective):
    def __init__(self, folder: Path, stop_before: int | None, **shape) -> None:
        torch.manual_seed(0)
        small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "classifier_proj_size": 16}
        drops = {"hidden_dropout": 0.0, "layerdrop": 0.4}
        fields = {**small, **drops, "vocab_sizes": [NUM_CLUSTERS], "conv_dim": (16,) * 5, **shape}
        self.model = HubertECGForPretraining(HubertECGConfig.preset("tiny", **fields))
        self.folder, self.stop_before, self.all = folder, stop_before, Batches()
        # An odd number of batches: of several ranks, one has more than the others.
        self.share = distributed.Share(np.arange(NUM_RECORDS), 7)

    def loss(self, batch, step, micro):
        if step == self.stop_before:
            raise Interrupted(3)
        output = self.model(batch.ecg, labels=batch.labels, mask_indices=batch.mask)
        return output.loss, {"masked_loss": output.masked_loss}

    metrics = ("masked_loss",)

    def validate(self, poll):
        index = self.share.indices
        sums = torch.zeros(2)
        for part in self.share.polled([index[i : i + 7] for i in range(0, len(index), 7)], poll):
            labels, mask = self.all.labels[part], self.all.mask[part]
            output = self.model(self.all.ecg[part], labels=labels, mask_indices=mask)
            sums += len(part) * torch.stack([output.loss, torch.ones(())])
        total, number = distributed.add_up(sums).tolist()
        return {"loss": total / number}

    def save_best(self):
        save_file(self.model, self.folder / "best.pt")

    def save_last(self):
        self.model.save_pretrained(self.folder / "last")

    def state(self):
        return {"kmeans": {"centres": torch.arange(6.0).view(2, 3), "name": "toy"}}


def run(folder: str, stop_before=None, shape=None, resume_from=None, validate_first=False, **settings) -> None:
    """One run. ``resume_from`` is the folder of a run that was stopped, which is left as it is."""
    fields = {"learning_rate": 3e-3, "max_steps": 4, "checkpoint_every": 2, "log_every": 2, "accumulate_steps": 2}
    config = FinetuneConfig(
        dataset="toy",
        task="all",
        pretrained_model="none",
        output_dir=folder,
        device="cpu",
        resume=resume_from is not None,
        **{**fields, **settings},
    )
    with contextlib.ExitStack() as stack:
        device, rank, _ = stack.enter_context(distributed.ranks("cpu", config.tensor_ranks))
        if config.compile:
            # The default backend's code takes a compiler and a minute; what it computes is for its makers to test.
            compiled = functools.partialmethod(Backbone.compile_layers, backend="aot_eager")
            stack.enter_context(unittest.mock.patch.object(Backbone, "compile_layers", compiled))
            # The compiler warns of what it does itself, and hides that from users alone.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        config = dataclasses.replace(config, batch_size=GLOBAL_BATCH // distributed.num_data_ranks())
        with distributed.rank_0_first():
            if rank == 0 and resume_from is not None:
                shutil.copytree(resume_from, folder)
        objective = Prediction(Path(folder), stop_before, **(shape or {}))
        dtype = machine.dtype(config.precision, device)
        loop = Loop(config, objective, Batches(), folder=Path(folder), device=device, dtype=dtype)
        if validate_first:
            with torch.no_grad(), loop.parallel.gathered():
                objective.validate(lambda: None)
        with contextlib.suppress(Interrupted):
            loop.run()
        check_agreement(loop)


def check_agreement(loop: Loop) -> None:
    """Tensor ranks do the same to what they all have."""
    ranks = loop.config.tensor_ranks
    whole = [p for p in loop.parameters.values() if ranks > 1 and p.device_mesh.ndim == 1]
    found = distributed.gather([p.to_local().tolist() for p in whole])
    assert all(found[i] == found[i - i % ranks] for i in range(len(found)))
    assert ranks == 1 or whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with distributed.ranks("cpu"):
        for job in json.loads(sys.argv[1]):
            run(**job)
