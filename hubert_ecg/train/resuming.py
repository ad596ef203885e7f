"""Which checkpoints a run may continue from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubert_ecg.config import FinetuneConfig, PretrainConfig, UserError, to_json
from hubert_ecg.train import checkpoint, distributed

# Settings that a resumed run may change: they alter neither what is computed nor in which order.
MAY_DIFFER = frozenset(
    {
        "activation_checkpointing",
        # What counts is the batch of all ranks together.
        "batch_size",
        "parallel",
        "tensor_ranks",
        "cache_dir",
        "checkpoint_every",
        "data_path",
        "device",
        "keep_features",
        "log_every",
        "num_workers",
        "output_dir",
        "resume",
        # Whose weights count, wherever they lie.
        "start_from",
        "teacher",
        "wandb",
    }
)


def check_same(state: Mapping[str, Any], config: PretrainConfig | FinetuneConfig, data_key: str, path: Path) -> None:
    """Refuse a checkpoint of other records, settings or batches.

    Args:
        state: The checkpoint.
        config: Settings of the run.
        data_key: Identifies the records of the run.
        path: Where the checkpoint is.

    Raises:
        UserError: Naming what differs.
    """
    saved = state["config"]
    checkpoint.check_same(saved, to_json(config), MAY_DIFFER, path)
    records = saved["batch_size"] * state["num_ranks"]
    num_ranks = distributed.num_data_ranks()
    if records != config.batch_size * num_ranks:
        raise UserError(
            f"resume: batch_size must be {records / num_ranks:g} on {num_ranks} rank(s), as in {path} "
            f"({saved['batch_size']} on {state['num_ranks']}), got {config.batch_size}; all ranks together "
            "must read the same batches as before"
        )
    if state["data_key"] != data_key:
        raise UserError(f"resume: the records must be those of {path}, got others; give the same data_path")
