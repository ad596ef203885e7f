"""Processes that torchrun started together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import distributed

from hubert_ecg.config import UserError
from hubert_ecg.train import machine


@contextlib.contextmanager
def ranks(device_name: str) -> Iterator[tuple[torch.device, int, int]]:
    """The device, rank and number of the processes that work together; under torchrun, inside their process group.

    With device "auto" or "cuda", each process of a machine has a GPU of its own.

    Raises:
        UserError: If there is no such device here.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        alone = not distributed.is_initialized()
        yield (
            machine.device(device_name),
            *((0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())),
        )
        return
    local = int(os.environ["LOCAL_RANK"])
    if device_name in ("auto", "cuda") and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"device: there must be a GPU for each process, got {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(local)
    device = machine.device(device_name)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def wait() -> None:
    """Return when every process that works together has come here."""
    if distributed.is_initialized():
        distributed.barrier()
