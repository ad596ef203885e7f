"""The processes that cluster together, each with a shard of the points: rank 0 has the first rows, and so on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Ranks:
    """A process group, or this process alone.

    Args:
        op: Whose work it is, for errors.
        distributed: False, True (the default group of ``torch.distributed``), or a process group.

    Raises:
        ValueError: There is no such group, or this process is not in it.
    """

    def __init__(self, op: str = "KMeans", distributed: Any = False) -> None:
        self.op = op
        self.rank, self.size = 0, 1
        self._group: Any = None
        if distributed is False or distributed is None:
            return
        from torch import distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            want = "False, or True or a process group after torch.distributed.init_process_group"
            raise ValueError(f"{op}: distributed must be {want}, got {distributed!r} without that call")
        group = dist.group.WORLD if distributed is True else distributed
        if not isinstance(group, dist.ProcessGroup):
            want = "False, True or a process group that this process is in"
            raise ValueError(f"{op}: distributed must be {want}, got {distributed!r}")
        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_gpu = "nccl" in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def sum(self, *tensors: Tensor) -> None:
        """Adds up, in place, what each rank holds in a contiguous tensor of this shape."""
        if self.size == 1:
            return
        for tensor in tensors:
            there = tensor.to(self._device)
            self._dist.all_reduce(there, group=self._group)
            tensor.copy_(there)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in their order; first dimensions may differ."""
        if self.size == 1:
            return [tensor]
        lengths = [int(n) for n in self._all_gather(torch.tensor([len(tensor)]))]
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return [part[:n].to(tensor.device) for part, n in zip(self._all_gather(padded), lengths, strict=True)]

    def first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank; ``tensor`` says its shape and dtype on the others."""
        if self.size == 1:
            return tensor
        there = tensor.to(self._device).contiguous()
        self._dist.broadcast(there, self._dist.get_global_rank(self._group, 0), group=self._group)
        return there.to(tensor.device)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one rank cannot do, none goes on with: the others are not left waiting for it.

        The block must not talk to other ranks.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [bool(flag) for flag in self._all_gather(torch.tensor([error is not None]).to(torch.uint8))]
        if error is not None:
            raise error
        if any(failed):
            raise RuntimeError(f"{self.op}: rank {failed.index(True)} could not go on; its error says why")

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        there = tensor.to(self._device).contiguous()
        parts = [torch.empty_like(there) for _ in range(self.size)]
        self._dist.all_gather(parts, there, group=self._group)
        return parts
