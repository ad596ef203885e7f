"""The optimiser of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hubert_ecg.train.parallel import layout


def adamw(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only, fused.

    A parameter with at most one axis longer than 1 is a bias, the scale of a norm or the embedding of the mask: pulling
    those to zero is no regularisation.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters.values():
        is_matrix = sum(n > 1 for n in parameter.shape) > 1
        groups.setdefault((not is_matrix, layout(parameter)), []).append(parameter)
    # Matrices first; of a sharded model, what lies on the ranks in another way is a group of its own.
    given = [
        {"params": group, "weight_decay": 0.0 if exempt else weight_decay}
        for (exempt, _), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]
    return torch.optim.AdamW(given, lr=0.0, betas=betas, eps=eps, fused=True)


def load_moments(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Any]
) -> None:
    """Take up the state of each parameter by its name, whatever the order that the optimiser has them in."""
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]
    optimiser.load_state_dict(optimiser.state_dict() | {"state": {i: moments[name] for i, name in enumerate(order)}})
