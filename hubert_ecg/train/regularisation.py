"""Weight decay and dropout that follow the validations, as in the published recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hubert_ecg.models.encoder import Attention, Encoder, EncoderLayer, FeedForward

_FACTOR, _LEAST_DECAY = 5.0, 0.01
_STEP, _LEAST_DROPOUT, _MOST_DROPOUT = 0.05, 0.1, 0.9


class DynamicRegularisation:
    """Less of it while validations improve, more of it while they do not.

    On an improvement the weight decay is divided by 5, to 0.01 at least, and each dropout of the encoder lowered by
    0.05, to 0.1 at least; what is below that stays. After every patience // 4 validations without one the weight decay
    is multiplied by 5 and each dropout raised by 0.05, to 0.9 at most.

    Args:
        model: The model whose dropouts change in place.
        optimiser: Its groups that decay change in place.
        patience: Validations without improvement that end the run.
    """

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer, patience: int) -> None:
        self.model, self.optimiser = model, optimiser
        self.every = max(patience // 4, 1)

    def after_validation(self, bad_validations: int) -> None:
        """Take in a validation that was the best so far (0), or that many after the best one."""
        if bad_validations == 0:
            for group in self.groups:
                decay = group["weight_decay"]
                group["weight_decay"] = max(_LEAST_DECAY, decay / _FACTOR) if decay > _LEAST_DECAY else decay
            self._set(lambda p: round(max(_LEAST_DROPOUT, p - _STEP), 6) if p > _LEAST_DROPOUT else p)
        elif bad_validations % self.every == 0:
            for group in self.groups:
                group["weight_decay"] *= _FACTOR
            self._set(lambda p: round(min(_MOST_DROPOUT, p + _STEP), 6))

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Those that decay: found again each time, because loading a state makes new ones."""
        return [group for group in self.optimiser.param_groups if group["weight_decay"]]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        return {
            "weight_decay": [group["weight_decay"] for group in self.groups],
            "dropout": [self._get(module) for module in self._places()],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        for group, decay in zip(self.groups, state["weight_decay"], strict=True):
            group["weight_decay"] = decay
        dropouts = iter(state["dropout"])
        self._set(lambda _: next(dropouts))

    def _places(self) -> list[Any]:
        """Every dropout of the encoders: a module, or a layer that drops inside of an op."""
        places: list[Any] = []
        for module in self.model.modules():
            if isinstance(module, Encoder):
                places.append(module.dropout)
            elif isinstance(module, (EncoderLayer, Attention, FeedForward)):
                places.append(module)
        return places

    @staticmethod
    def _get(place: Any) -> float:
        return place.p if isinstance(place, nn.Dropout) else place.dropout

    def _set(self, change: Callable[[float], float]) -> None:
        for place in self._places():
            setattr(place, "p" if isinstance(place, nn.Dropout) else "dropout", change(self._get(place)))
