"""What ranks share of a model: nothing but gradients (ddp), its parameters (fsdp), or its layers as well (tensor).

Ranks form a grid, ``[data ranks, tensor ranks]``. Data ranks read different records; the tensor ranks of one data rank
read the same records, and each computes some heads of every layer. A model is split over tensor ranks first; what is
left on each is then sharded over the data ranks by FSDP2, layer by layer.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hubert_ecg.config import FinetuneConfig, PretrainConfig, UserError
from hubert_ecg.models.encoder import Attention, EncoderLayer, FeedForward
from hubert_ecg.models.tensor_ranks import TensorRanks
from hubert_ecg.train.distributed import add_up, num_ranks, rank
from hubert_ecg.train.gradients import GradientSum
from hubert_ecg.train.objective import Objective


def check(config: PretrainConfig | FinetuneConfig) -> None:
    """Refuse what cannot be shared, before any work is done.

    Raises:
        UserError: If the flags do not fit each other, the number of processes, or this torch.
    """
    tensor = config.tensor_ranks
    if (config.parallel == "tensor") != (tensor > 1):
        want = "at least 2 with" if config.parallel == "tensor" else f"1 with --parallel {config.parallel}, not"
        raise UserError(f"--tensor_ranks must be {want} --parallel tensor, got {tensor}")
    if num_ranks() % tensor:
        raise UserError(
            f"--tensor_ranks must divide the number of processes, {num_ranks()}, got {tensor}; "
            f"start them with torchrun --nproc_per_node {tensor} (or a multiple)"
        )
    if config.parallel != "ddp" and config.precision == "float16":
        raise UserError(f"--precision must not be float16 with --parallel {config.parallel}; use bfloat16")
    if config.parallel != "ddp" and torch.torch_version.TorchVersion(torch.__version__) < "2.9":
        raise UserError(f"--parallel {config.parallel} needs torch 2.9 or newer, this is {torch.__version__}")


class Parallel:
    """The model of an objective, shared among the ranks as the settings say; alone, it stays as it is.

    Args:
        config: Settings of the run.
        objective: Its model is changed in place: parameters that are shared become DTensors.
        device: Where the model is.
        dtype: What autocast runs in. Layers are sent in bfloat16 where that is it; gradients are summed in float32.

    Attributes:
        sharded: Whether parameters are shared.

    Raises:
        UserError: If the model's heads cannot be split.
    """

    def __init__(
        self, config: PretrainConfig | FinetuneConfig, objective: Objective, device: torch.device, dtype: torch.dtype
    ) -> None:
        check(config)
        self.objective = objective
        self.sharded = config.parallel != "ddp" and num_ranks() > 1
        self.tensor_ranks = config.tensor_ranks
        self._skeleton: nn.Module | None = None
        if self.sharded:
            self._skeleton = copy.deepcopy(objective.model).to("meta")
            self._share(objective.model, device, dtype)

    def gradient_sum(self, parameters: Iterable[nn.Parameter]) -> GradientSum:
        """What adds up the gradients of all ranks; sharded parameters do so by themselves."""
        return GradientSum(() if self.sharded else parameters)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients to this norm at most, and return the norm they had: of the whole model, on every rank."""
        parameters = list(parameters)
        if not self.sharded:
            return nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
        groups: dict[Any, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                groups.setdefault(layout(parameter), []).append(parameter)
        square = torch.zeros((), device=parameters[0].device)
        for (mesh, _), group in groups.items():
            # What is not split is on every tensor rank, and counts once.
            copies = self.tensor_ranks if mesh.ndim == 1 else 1
            square += nn.utils.get_total_norm([_here(p.grad) for p in group if p.grad is not None]) ** 2 / copies
        norm = add_up(square).sqrt()
        for group in groups.values():
            nn.utils.clip_grads_with_norm_(group, max_norm or math.inf, norm)
        return norm

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Every rank has the parameters of all data ranks inside, so that it may run the model as often as it likes.

        For validation, where ranks have different numbers of batches and nothing but parameters takes memory.
        """
        modules = self._sharded_modules()
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            # The root keeps its parameters between forward and backward pass in any case.
            for module in modules:
                module.set_reshard_after_forward(module is not self.objective.model, recurse=False)
                module.reshard()

    @contextlib.contextmanager
    def portable(self) -> Iterator[None]:
        """On rank 0, the objective's model is an ordinary one inside, on the CPU, with the weights of now.

        To be entered on all ranks.
        """
        if self._skeleton is None:
            yield
            return
        model, weights = self.objective.model, {}
        for name, value in model.state_dict().items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            if rank() == 0:
                weights[name] = whole.cpu()
        if rank() == 0:
            portable = copy.deepcopy(self._skeleton)
            portable.load_state_dict(weights, assign=True)
            if hasattr(model, "config"):
                portable.config = model.config
            self.objective.model = portable
        try:
            yield
        finally:
            self.objective.model = model

    def _share(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # No layer changes what another one gave out.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # It would tell of each gathering of what is split twice, which only saved models are.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        shape = (num_ranks() // self.tensor_ranks, self.tensor_ranks)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        if self.tensor_ranks > 1:
            split(model, TensorRanks(mesh["tensor"]), self.tensor_ranks)
        half = dtype if dtype == torch.bfloat16 else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in model.modules():
            if isinstance(layer, EncoderLayer):
                fully_shard(layer, mesh=mesh["data"], mp_policy=policy)
        fully_shard(model, mesh=mesh["data"])
        for module in self._sharded_modules():
            # Losses are weighted already: gradients are summed, as in gradients.GradientSum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _sharded_modules(self) -> list[Any]:
        if not self.sharded:
            return []
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self.objective.model.modules() if isinstance(module, FSDPModule)]


def split(model: nn.Module, ranks: TensorRanks, number: int) -> None:
    """Keep this process's part of every transformer layer.

    Raises:
        UserError: If that number of ranks cannot share one.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            width, what = module.num_heads, "heads"
        elif isinstance(module, FeedForward):
            width, what = module.intermediate_dense.out_features, "feed-forward channels"
        else:
            continue
        if width % number:
            raise UserError(f"--tensor_ranks must divide the {width} {what} of a layer, got {number}")
        module.split(ranks)


def layout(x: Any) -> Any:
    """How a tensor lies on the ranks, which those that are worked on together must share; None for an ordinary one."""
    return (x.device_mesh, x.placements) if hasattr(x, "device_mesh") else None


def laid_out(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, laid out on the ranks as another one of its shape; nothing is sent."""
    if layout(like) is None:
        return whole
    mesh, placements = layout(like)
    part = whole
    # Split over tensor ranks first, then what is left over data ranks.
    for axis in reversed(range(mesh.ndim)):
        if not placements[axis].is_replicate():
            dim, number = placements[axis].dim, mesh.get_local_rank(axis)
            parts = part.chunk(mesh.size(axis), dim)
            part = parts[number] if number < len(parts) else part.narrow(dim, 0, 0)
    laid = torch.zeros_like(like, dtype=whole.dtype)
    _here(laid).copy_(part)
    return laid


def _here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; all of an ordinary one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
