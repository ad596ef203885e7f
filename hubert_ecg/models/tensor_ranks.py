"""One transformer layer on several processes: each holds some of its heads and of its feed-forward width.

The first product of each half is split by columns and the second by rows (Shoeybi et al., "Megatron-LM", 2019), so that
each half needs one sum over the processes: at its exit in the forward pass, at its entrance in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hubert_ecg.ops import linear

# Takes the seeds of the processes apart; any odd number with half of its bits set would do.
_STEP = 0x5851F42D4C957F2D


class TensorRanks:
    """The processes that share the layers of a model.

    Args:
        mesh: A one-dimensional DeviceMesh of them.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.rank: int = mesh.get_local_rank()

    def split(self, layer: nn.Module, by_column: tuple[str, ...], by_row: str) -> None:
        """Keep this process's part of the linear layers of these names: their parameters become DTensors.

        The bias of the one that is split by rows is left whole: it is added after the sum.
        """
        from torch.distributed.tensor import Shard, distribute_tensor

        def keep(part_of: nn.Module, name: str, axis: int) -> None:
            whole = part_of.get_parameter(name)
            part = distribute_tensor(whole.detach(), self.mesh, [Shard(axis)], src_data_rank=None)
            setattr(part_of, name, nn.Parameter(part, requires_grad=whole.requires_grad))

        for column in map(layer.get_submodule, by_column):
            keep(column, "weight", 0)
            keep(column, "bias", 0)
        keep(layer.get_submodule(by_row), "weight", 1)
        layer.tensor_ranks = self  # type: ignore[assignment]


def entering(x: Tensor, ranks: TensorRanks | None) -> Tensor:
    """``x``, whose gradient is the sum over the processes."""
    return x if ranks is None else _Entering.apply(x, ranks.mesh)


def local(parameter: Any, ranks: TensorRanks | None) -> Tensor:
    """The part of a split parameter that this process holds; all of it where nothing is split."""
    return parameter if ranks is None else parameter.to_local()


def summed(x: Tensor, layer: nn.Linear, ranks: TensorRanks | None) -> Tensor:
    """``layer(x)``, where each process has some columns of ``x`` and those of the weight."""
    if ranks is None:
        return layer(x)
    y = _Leaving.apply(linear(x, local(layer.weight, ranks)), ranks.mesh)
    return y + layer.bias.to(y.dtype)


def dropout_seed(dropout_p: float, device: torch.device, ranks: TensorRanks | None) -> Tensor | None:
    """A seed that differs between the processes, drawn from generators that agree; None where the op draws its own."""
    if ranks is None or dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device) ^ (ranks.rank * _STEP % 2**63)


def _sum(x: Tensor, mesh: Any) -> Tensor:
    # Unlike torch.distributed.all_reduce, what torch.compile can trace.
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", mesh))


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Any) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.mesh), None


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Any) -> Tensor:
        return _sum(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
