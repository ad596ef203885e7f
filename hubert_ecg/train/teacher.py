"""Models that pretraining begins with: the teacher whose layer is clustered, and the weights that a run starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hubert_ecg.config import AuditConfig, ExtractConfig, LabelConfig, PretrainConfig, UserError
from hubert_ecg.features import Latent, default_layer
from hubert_ecg.models import HubertECG, HubertECGConfig
from hubert_ecg.models.pretrained import config_of, load_weights, locate, read_weights

#: Settings that say what is clustered.
FeatureConfig = ExtractConfig | LabelConfig | AuditConfig | PretrainConfig


def check_flags(config: FeatureConfig) -> None:
    """Raises UserError where ``feature_type``, ``teacher`` and ``teacher_layer`` do not go together."""
    latent = config.feature_type == "latent"
    if latent and config.teacher is None:
        raise UserError("--feature_type latent needs a model: give --teacher MODEL (a .pt file, a folder, a hub id)")
    for flag in ("teacher", "teacher_layer"):
        if getattr(config, flag) is not None and not latent:
            raise UserError(
                f"--{flag} is for --feature_type latent, got --feature_type {config.feature_type}; "
                "give --feature_type latent, or leave it out"
            )


def load_teacher(config: FeatureConfig, shape: HubertECGConfig, device: torch.device) -> Latent | None:
    """The model whose hidden states a run clusters; None where features are of the signal.

    Args:
        config: Settings of the run.
        shape: A model that reads the run's input: what is clustered must have its tokens.
        device: Where the teacher runs.

    Raises:
        UserError: If there is no such model or layer, or it reads other input or has other tokens.
    """
    check_flags(config)
    if config.teacher is None:
        return None
    own, tensors = _read("teacher", config.teacher, shape)
    model = HubertECG(own)
    load_weights(model, tensors, source=config.teacher)
    num_layers = own.num_hidden_layers
    layer = default_layer(num_layers) if config.teacher_layer is None else config.teacher_layer
    if layer > num_layers:
        raise UserError(f"--teacher_layer must be from 1 to {num_layers} for {config.teacher}, got {layer}")
    return Latent(model.to(device), layer)


def read_start(name: str, shape: HubertECGConfig) -> dict[str, Tensor]:
    """The weights that a model of this shape shall start from.

    Raises:
        UserError: If there is no such model, or it is of another shape or reads other input.
    """
    own, tensors = _read("start_from", name, shape)
    for field in ("hidden_size", "num_hidden_layers"):
        if getattr(own, field) != getattr(shape, field):
            raise UserError(
                f"--start_from must be of the --size that is trained, with {field} {getattr(shape, field)}, "
                f"got {getattr(own, field)} in {name}"
            )
    return tensors


def load_start(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give a model these weights but for its codebooks, which stay as they were drawn.

    Raises:
        UserError: If they do not fit.
    """
    load_weights(model, tensors, source=source, fresh=("label_embedding.",))


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Changes when a weight does; not with the file that holds it.

    >>> weights_hash({"w": torch.zeros(2)}) == weights_hash({"w": torch.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(flag: str, name: str, shape: HubertECGConfig) -> tuple[HubertECGConfig, dict[str, Tensor]]:
    """The config and the weights of a model that reads the input of ``shape`` and has its tokens."""
    fields, tensors = read_weights(locate(name))
    # Weights that do not say how they were made are published ones.
    own = config_of({"compat": "published", **fields}, source=f"--{flag} {name}")
    for what, flags in (
        ("sampling_rate_hz", f"--downsampling_factor {500 / own.sampling_rate_hz:g}"),
        ("compat", f"--compat {own.compat}"),
        ("num_leads", "a model for twelve leads"),
        ("receptive_field", "a model with the same convolutions"),
        ("stride", "a model with the same convolutions"),
    ):
        want, given = getattr(shape, what), getattr(own, what)
        if want != given:
            raise UserError(
                f"--{flag} must be a model of {what} {want} as the records are prepared, got {given} in {name}; "
                f"give {flags}"
            )
    return own, tensors
