"""The prepare command: packing, shared by the processes that torchrun started."""

from __future__ import annotations

from hubert_ecg import data
from hubert_ecg.config import PrepareConfig
from hubert_ecg.data.build import Ranks
from hubert_ecg.train import distributed


def prepare(config: PrepareConfig) -> data.Store:
    """Run the prepare command. Stopped, it goes on where it was; under torchrun, each process packs a share.

    Raises:
        UserError: A data set is unknown or missing, no record can be read, or output_dir holds something else.
    """
    with distributed.ranks("cpu") as (_, rank, num_ranks):
        store = data.prepare(config, progress=rank == 0, ranks=Ranks(rank, num_ranks, distributed.gather))
        distributed.gather(None)
    return store
