"""Hidden states of a frozen model, which k-means turns into the pseudo-labels of the later iterations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Latent:
    """The hidden states of one layer of a frozen model; the layers above it are neither kept nor computed.

    Args:
        model: A model of this package, which is changed: it loses the layers above, and its dropout.
        layer: Which layer, from 1 to the number of layers.

    Attributes:
        model: The model, up to the layer.
        layer: Which layer.
        width: Numbers in a vector, H.

    Raises:
        ValueError: If the model has no such layer.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        encoder: Any = model.encoder
        if not 1 <= layer <= len(encoder.layers):
            raise ValueError(f"Latent: layer must be from 1 to {len(encoder.layers)}, got {layer}")
        encoder.layers = encoder.layers[:layer]
        self.model, self.layer = model.eval().requires_grad_(False), layer
        self.width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]

    @torch.no_grad()
    def __call__(self, ecg: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The hidden states, in float32 on a CPU and with bfloat16 products on a GPU, whatever autocast is around.

        Args:
            ecg: ``[B, 12, T] float32`` as models read it, on the device of the model.
            lengths: ``[B]`` or ``[B, 12]``, valid samples of each lead; default: all.

        Returns:
            ``[B, N, H] float32``.
        """
        model: Any = self.model
        with torch.autocast(ecg.device.type, torch.bfloat16, enabled=ecg.device.type == "cuda"):
            return model.encode(ecg, lengths).last_hidden_state.float()


def default_layer(num_layers: int) -> int:
    """Five sixths of the depth, where the clusters of the published models were best.

    >>> default_layer(12)
    10
    """
    return max(1, round(num_layers * 5 / 6))
