"""Gradients of all ranks, added up while the backward pass still runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from hubert_ecg.train.distributed import answering, num_ranks

_BUCKET_BYTES = 25 << 20


class GradientSum:
    """Adds up the gradients of all ranks, bucket by bucket, in the last backward pass of a step.

    DistributedDataParallel would look for unused parameters on the host in every step, because LayerDrop leaves layers
    without a gradient, and it would divide by the number of ranks where ours are weighted already. Here the host knows
    which layers were dropped, on every rank the same. Buckets are sent in one order, whatever order gradients come in.

    Args:
        parameters: What is trained, in the order of the forward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        self._place: dict[nn.Parameter, int] = {}
        if num_ranks() == 1:
            return
        room = 0
        for parameter in reversed(list(parameters)):
            size = parameter.numel() * parameter.element_size()
            if size > room or parameter.dtype != self._buckets[-1][0].dtype:
                self._buckets.append([])
                room = max(_BUCKET_BYTES, size)
            room -= size
            self._buckets[-1].append(parameter)
            self._place[parameter] = len(self._buckets) - 1
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._missing: list[set[nn.Parameter]] | None = None
        self._sent: list[tuple[list[nn.Parameter], Tensor, Any]] = []
        self._next = 0

    @contextlib.contextmanager
    def last_backward(self, absent: Iterable[nn.Parameter] = ()) -> Iterator[None]:
        """The last backward pass of a step goes inside; afterwards each ``grad`` is the sum over all ranks.

        Args:
            absent: Parameters that get no gradient in this pass, the same on all ranks.

        Raises:
            RankLostError: If another rank is gone.
        """
        if not self._buckets:
            yield
            return
        self._missing = [set(bucket) for bucket in self._buckets]
        for parameter in absent:
            if parameter in self._place:
                self._missing[self._place[parameter]].discard(parameter)
        self._next = 0
        yield
        while self._next < len(self._buckets):
            self._send()
        self._missing = None
        for parameters, flat, work in self._sent:
            with answering():
                work.wait()
            for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = grad.view_as(parameter)
        self._sent.clear()

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._missing is None:
            return
        assert self._place[parameter] >= self._next, "a gradient came after its bucket had left"
        self._missing[self._place[parameter]].discard(parameter)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send()

    def _send(self) -> None:
        # A layer that was dropped in all micro-batches has no gradient, on no rank.
        parameters = [parameter for parameter in self._buckets[self._next] if parameter.grad is not None]
        self._next += 1
        if not parameters:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        with answering():
            work = distributed.all_reduce(flat, async_op=True)
        self._sent.append((parameters, flat, work))
