"""transformers' HubertModel with the published configuration, heads and precision: the peer of whole models."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_ecg.models import HubertECGForClassification, HubertECGForPretraining
from hubert_ecg.train.machine import autocast

from .ceilings import precisions

TOKENS = 93


def encoder_of(ours: nn.Module, backbone: str = "") -> nn.Module:
    """transformers' encoder with the weights of ours, whose names begin with ``backbone``."""
    import transformers

    encoder = transformers.HubertModel(transformers.HubertConfig(**ours.config.to_dict()))
    state = {name.removeprefix(backbone): x for name, x in ours.state_dict().items() if name.startswith(backbone)}
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    return encoder


class Pretraining(nn.Module):
    """Logits of all tokens by a cosine over [B, N, K, D]; those that are masked are picked afterwards."""

    def __init__(self, ours: HubertECGForPretraining) -> None:
        super().__init__()
        self.encoder = encoder_of(ours)
        self.project = nn.Linear(ours.config.hidden_size, ours.config.classifier_proj_size)
        self.project.load_state_dict(ours.final_proj[0].state_dict())
        self.codebook = nn.Parameter(ours.state_dict()["label_embedding.0.weight"].clone())

    def forward(self, ecg: Tensor, labels: Tensor, masked: Tensor) -> Tensor:
        x = self.encoder(ecg.flatten(1), mask_time_indices=masked).last_hidden_state
        logits = F.cosine_similarity(self.project(x)[:, :, None], self.codebook[None, None], dim=-1) / 0.1
        return F.cross_entropy(logits[masked], labels[masked])


class Classification(nn.Module):
    """The mean of all tokens, and a linear layer."""

    def __init__(self, ours: HubertECGForClassification) -> None:
        super().__init__()
        self.encoder = encoder_of(ours, "hubert_ecg.")
        self.classifier = nn.Linear(ours.config.hidden_size, len(ours.label_names))
        self.classifier.load_state_dict(ours.classifier.state_dict())

    def forward(self, ecg: Tensor) -> Tensor:
        return self.classifier(self.encoder(ecg.flatten(1)).last_hidden_state.mean(1))


def step(
    model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype, fused: bool | None = None
) -> Callable[[], None]:
    """A training step that changes no weight, so that every one does the same."""
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run() -> None:
        optimiser.zero_grad()
        with autocast(device, dtype):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimiser)
        scaler.update()

    return run


def peers_of(
    ours: nn.Module,
    our_loss: Callable[[], Tensor],
    theirs: nn.Module,
    their_loss: Callable[..., Tensor],
    compiled: bool = True,
    emulated: bool = False,
) -> dict[str, Callable[[], None]]:
    """Steps of a peer: in float16 on a GPU, as published, and ``compiled``; on a CPU in float32 and bfloat16.

    ``their_loss(model)`` is the loss of the peer, whichever way it is compiled. Ours, which is timed in bfloat16, takes
    part in float32, too. ``emulated``: in bfloat16, too, on a CPU that takes minutes for such a step.
    """
    device = next(theirs.parameters()).device
    if device.type != "cuda":
        found = {
            f"transformers, {name}": step(theirs, functools.partial(their_loss, theirs), dtype)
            for name, dtype in of_the_cpu(device, emulated).items()
        }
        return {**found, "ours, float32": step(ours, our_loss, torch.float32, fused=True)}
    found = {"transformers, float16": step(theirs, functools.partial(their_loss, theirs), torch.float16)}
    if compiled:
        faster = functools.partial(their_loss, torch.compile(theirs))
        found["transformers, float16, compiled"] = step(theirs, faster, torch.float16)
    return found


def of_the_cpu(device: torch.device, emulated: bool = False) -> dict[str, torch.dtype]:
    """Precisions of a CPU by name: those that it has, and bfloat16 where what is ``emulated`` is wanted, too."""
    found = {*precisions(device), *([torch.bfloat16] * emulated)}
    return {str(dtype).removeprefix("torch."): dtype for dtype in sorted(found, key=str)}
