"""Processes that torchrun started together: who they are, and what they tell each other.

Numbers of the step travel in the default group (nccl on GPUs, gloo on CPUs). What the hosts agree on travels in a gloo
group of its own, so that no host waits for its GPU. Alone, every function here does nothing and costs nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from hubert_ecg.config import RunError, UserError
from hubert_ecg.train import machine

_T = TypeVar("_T")
# A rank that is gone is noticed by its closed connections; this is for one that hangs.
_TIMEOUT = datetime.timedelta(minutes=10)
# While rank 0 packs records or fits clusters, the others wait for as long as that takes.
_PATIENCE = datetime.timedelta(days=7)
_hosts: dict[Any, Any] = {}
# How many processes, one after another, read the same records.
_tensor_ranks = 1


class RankLostError(RunError):
    """Another process of the run has ended or does not answer."""


@contextlib.contextmanager
def ranks(device_name: str, tensor_ranks: int = 1) -> Iterator[tuple[torch.device, int, int]]:
    """The device, rank and number of the processes that work together; under torchrun, inside their process group.

    With device "auto" or "cuda", each process of a machine has a GPU of its own.

    Args:
        device_name: auto, cpu, cuda, cuda:1, ...
        tensor_ranks: How many processes share each layer of the model, and so read the same records.

    Raises:
        UserError: If there is no such device here.
    """
    global _tensor_ranks
    _tensor_ranks = tensor_ranks
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        yield machine.device(device_name), rank(), num_ranks()
        return
    local = int(os.environ["LOCAL_RANK"])
    if device_name in ("auto", "cuda") and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"device: there must be a GPU for each process, got {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(local)
    device = machine.device(device_name)
    with answering():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store, number, size = _meet()
        distributed.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_TIMEOUT)
        host_group()
    # Not after an error: the others may be gone, and taking leave of them would wait for them.
    yield device, rank(), num_ranks()
    _hosts.clear()
    distributed.destroy_process_group()


def _meet() -> tuple[Any, int, int]:
    """Torchrun's store, under a name that no processes have used before, and the number of this process and of all.

    Torchrun keeps its store when it starts processes again, with the addresses of those that are gone
    (github.com/pytorch/pytorch/issues/135712), and each machine counts restarts for itself. So rank 0 draws a name, and
    waits until every other rank has asked for it, been answered, and said so.
    """
    store, number, size = next(distributed.rendezvous("env://", timeout=_TIMEOUT))
    mine = uuid.uuid4().hex
    if number > 0:
        store.set(f"asks/{number}", mine)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/heard/{number}", "1")
        return distributed.PrefixStore(name, store), number, size
    end = time.monotonic() + _TIMEOUT.total_seconds()
    for other in range(1, size):
        while not store.check([f"{mine}/heard/{other}"]):
            if time.monotonic() > end:
                raise RuntimeError(f"rank {other} has not come")
            # The one who asks may be an earlier process, until this one's question is in its place.
            store.set(f"answer/{store.get(f'asks/{other}').decode()}", mine)
            time.sleep(0.01)
    return distributed.PrefixStore(mine, store), number, size


def rank() -> int:
    """Number of this process among those that work together."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_ranks() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def data_rank() -> int:
    """Which part of the records this process reads."""
    return rank() // _tensor_ranks


def num_data_ranks() -> int:
    """In how many parts the records are read."""
    return num_ranks() // _tensor_ranks


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Turn the backends' errors about lost ranks into one.

    Raises:
        RankLostError: If a collective inside fails.
    """
    try:
        yield
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RankLostError(f"another process of the run has ended or does not answer ({first})") from error


def add_up(x: Tensor) -> Tensor:
    """The sum of x over all ranks, in place, the same bits on each of them."""
    if num_ranks() > 1:
        with answering():
            distributed.all_reduce(x)
    return x


def lowest(x: Tensor) -> Tensor:
    """The least x of all ranks."""
    if num_ranks() > 1:
        x = x.clone()
        with answering():
            distributed.all_reduce(x, distributed.ReduceOp.MIN)
    return x


def gather(value: _T) -> list[_T]:
    """The values of all ranks in their order, on every rank; they are pickled on their way."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    with answering():
        distributed.all_gather_object(values, value, group=host_group())
    return values


def gather_parts(value: _T) -> list[_T]:
    """The values of all data ranks in their order, on every rank."""
    return gather(value)[::_tensor_ranks]


def agreed(value: _T) -> _T:
    """What rank 0 has, on every rank."""
    if num_ranks() == 1:
        return value
    values = [value]
    with answering():
        distributed.broadcast_object_list(values, src=0, group=host_group())
    return values[0]


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 goes through the block while the others wait, so that they find what it has made there."""
    if rank() > 0:
        agreed(None)
    yield
    if rank() == 0:
        agreed(None)


class Share:
    """What this rank sees of records that are read in batches: whole batches, so that results are those of one rank.

    Args:
        indices: ``[N]`` records in their order.
        batch_size: Records in a batch.

    Attributes:
        indices: Those of this rank, consecutive; the shares of all ranks, in their order, are the whole.
    """

    def __init__(self, indices: np.ndarray, batch_size: int) -> None:
        num_batches = -(-len(indices) // batch_size)
        mine = np.array_split(np.arange(num_batches), num_data_ranks())[data_rank()]
        self.indices = indices[mine[0] * batch_size : (mine[-1] + 1) * batch_size] if len(mine) else indices[:0]
        self._num_polls = num_batches // num_data_ranks()

    def polled(self, batches: Iterable[_T], poll: Callable[[], None]) -> Generator[_T, None, None]:
        """The batches of this rank, with a poll before each that every rank has."""
        for number, batch in enumerate(batches):
            if number < self._num_polls:
                poll()
            yield batch


class Votes:
    """Whether any rank wants to stop, asked in every step without waiting for the answer.

    A vote is sent off with one call and read with the next, when all have long answered: every rank reads the same
    votes, and so stops after the same step.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, Any] | None = None

    def __call__(self, mine: int) -> int:
        """Send a vote, and read the one before: the largest number that any rank gave then. Alone: this one."""
        if num_ranks() == 1:
            return mine
        with answering():
            found = self.read()
            vote = torch.tensor(mine)
            work = distributed.all_reduce(vote, distributed.ReduceOp.MAX, group=host_group(), async_op=True)
        self._sent = vote, work
        return found

    def read(self) -> int:
        """Read the vote that is still out, if there is one."""
        if self._sent is None:
            return 0
        (vote, work), self._sent = self._sent, None
        with answering():
            work.wait()
        return int(vote)


def host_group() -> Any:
    """The group in which hosts agree."""
    world = distributed.group.WORLD
    if world not in _hosts:
        _hosts.clear()
        _hosts[world] = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    return _hosts[world]
