"""The shape of a model: its configuration, how many tokens it makes of a recording, and which of them are padding.

Shape letters: B records, L leads, T samples of a lead, N tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hubert_ecg.config import Compat
from hubert_ecg.features.tokens import token_geometry

Problem = Literal["multilabel", "multiclass", "regression"]
Head = Literal["linear", "mlp", "label_embedding"]

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "classifier_proj_size": 64,
        "conv_dim": 32,
        "layerdrop": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "classifier_proj_size": 256,
        "conv_dim": 512,
        "layerdrop": 0.1,
    },
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "classifier_proj_size": 256,
        "conv_dim": 512,
        "layerdrop": 0.1,
    },
    "large": {
        "hidden_size": 960,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "intermediate_size": 3840,
        "classifier_proj_size": 512,
        "conv_dim": 512,
        "layerdrop": 0.0,
    },
}
_FIXED = {
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
    "conv_pos_batch_norm": False,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
}


@dataclasses.dataclass
class HubertECGConfig:
    """Everything that shapes a model; ``config.json`` of a model folder. Names are those of transformers' HubertConfig.

    Args:
        hidden_size: Width of the transformer.
        num_hidden_layers: Number of transformer layers.
        num_attention_heads: Heads of each layer.
        intermediate_size: Width of the feed-forward layer.
        classifier_proj_size: Size of the space in which tokens are compared with codebook entries.
        conv_dim: Channels of each convolution of the extractor.
        conv_kernel: Kernel sizes of the extractor.
        conv_stride: Strides of the extractor.
        conv_bias: Whether those convolutions have a bias.
        num_conv_pos_embeddings: Taps of the positional convolution.
        num_conv_pos_embedding_groups: Groups of the positional convolution.
        layer_norm_eps: Epsilon of the layer norms.
        hidden_dropout: Dropout after attention, after the feed-forward layer and on the embedding.
        attention_dropout: Dropout of the attention weights.
        activation_dropout: Dropout inside the feed-forward layer.
        feat_proj_dropout: Dropout after the feature projection.
        final_dropout: Kept for published folders, where nothing reads it either.
        layerdrop: Chance of skipping a transformer layer in a training step.
        initializer_range: Standard deviation of freshly drawn weights.
        mask_time_prob: Share of the tokens that masked prediction masks.
        mask_time_length: Tokens in one masked span.
        mask_time_min_masks: Fewest masked tokens of a record.
        vocab_sizes: Number of clusters K of each codebook.
        sampling_rate_hz: Rate of the model's input.
        num_leads: Leads of a flattened input ``[B, L * T]``.
        compat: "published" takes the statistics of the first norm over padding, too.
        id2label: Label names of a classifier, in the order of its outputs.
        problem: What a classifier's outputs are.
        head: Kind of a classifier's head.
        classifier_hidden_size: Width of the hidden layer of an "mlp" head.
        classifier_dropout: Dropout before the head.
        thresholds: Decision thresholds of a classifier, one for each label.
        extra: Fields of a config.json that mean nothing here; kept and written back.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    classifier_proj_size: int = 256
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (4, 2, 2, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    layer_norm_eps: float = 1e-5
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    layerdrop: float = 0.1
    initializer_range: float = 0.02
    mask_time_prob: float = 0.33
    mask_time_length: int = 1
    mask_time_min_masks: int = 2
    vocab_sizes: list[int] = dataclasses.field(default_factory=lambda: [100])
    sampling_rate_hz: float = 100.0
    num_leads: int = 12
    compat: Compat = "corrected"
    id2label: dict[int, str] = dataclasses.field(default_factory=dict)
    problem: Problem = "multilabel"
    head: Head = "linear"
    classifier_hidden_size: int | None = None
    classifier_dropout: float = 0.1
    thresholds: list[float] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("conv_dim", "conv_kernel", "conv_stride"):
            setattr(self, name, tuple(getattr(self, name)))
        sizes = self.vocab_sizes
        self.vocab_sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        self.id2label = {int(index): str(label) for index, label in self.id2label.items()}
        if not self.conv_dim or not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError(
                "HubertECGConfig: conv_dim, conv_kernel and conv_stride must be of one length, got "
                f"{self.conv_dim}, {self.conv_kernel} and {self.conv_stride}"
            )
        if min(*self.conv_dim, *self.conv_stride) < 1 or any(
            kernel < stride for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True)
        ):
            raise ValueError(
                "HubertECGConfig: conv_dim and conv_stride must be positive, and no conv_kernel below its conv_stride, "
                f"got {self.conv_dim}, {self.conv_stride} and {self.conv_kernel}"
            )
        for name, divisor in (
            ("num_attention_heads", self.num_attention_heads),
            ("num_conv_pos_embedding_groups", self.num_conv_pos_embedding_groups),
        ):
            if divisor < 1 or self.hidden_size % divisor:
                raise ValueError(
                    f"HubertECGConfig: hidden_size must be a multiple of {name}, got {self.hidden_size} and {divisor}"
                )
        for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"HubertECGConfig: {name} must be from 0 to 1, got {getattr(self, name)}")
        if self.compat not in ("corrected", "published"):
            raise ValueError(f'HubertECGConfig: compat must be "corrected" or "published", got {self.compat!r}')
        if not self.vocab_sizes or min(self.vocab_sizes) < 1:
            raise ValueError(f"HubertECGConfig: vocab_sizes must be positive numbers, got {self.vocab_sizes}")
        for name, value in _FIXED.items():
            if self.extra.get(name, value) != value:
                raise ValueError(f"HubertECGConfig: {name} must be {value!r}, got {self.extra[name]!r}")

    @classmethod
    def preset(cls, size: str, *, sampling_rate_hz: float = 100, **overrides: Any) -> HubertECGConfig:
        """The configuration of a model size.

        Args:
            size: "small", "base" or "large" as published, or "tiny" for tests and demonstrations.
            sampling_rate_hz: Rate of the input: 50, 100 or 500. Tokens are 0.64 s of a lead at each of them.
            overrides: Fields that differ from the preset.

        Raises:
            ValueError: For an unknown size or rate.
        """
        if size not in _SIZES:
            raise ValueError(f"preset: size must be one of {', '.join(_SIZES)}, got {size!r}")
        geometry = token_geometry(sampling_rate_hz)
        fields = {
            **_SIZES[size],
            "conv_dim": (_SIZES[size]["conv_dim"],) * len(geometry.kernels),
            "conv_kernel": geometry.kernels,
            "conv_stride": geometry.strides,
            "sampling_rate_hz": float(sampling_rate_hz),
        }
        return cls(**{**fields, **overrides})

    @property
    def stride(self) -> int:
        """Samples from one token to the next."""
        return math.prod(self.conv_stride)

    @property
    def receptive_field(self) -> int:
        """Samples that one token sees."""
        field, stride = 1, 1
        for kernel, step in zip(self.conv_kernel, self.conv_stride, strict=True):
            field += (kernel - 1) * stride
            stride *= step
        return field

    @property
    def label_names(self) -> tuple[str, ...]:
        """Label names of a classifier, in the order of its outputs."""
        return tuple(self.id2label[index] for index in sorted(self.id2label))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, as ``config.json`` holds them."""
        fields = dataclasses.asdict(self)
        extra = fields.pop("extra")
        for name in ("conv_dim", "conv_kernel", "conv_stride"):
            fields[name] = list(fields[name])
        if fields.pop("id2label"):
            fields["id2label"] = {str(index): label for index, label in self.id2label.items()}
            fields["label2id"] = {label: index for index, label in self.id2label.items()}
        fields["ensemble_length"] = len(self.vocab_sizes)
        fields["num_feat_extract_layers"] = len(self.conv_dim)
        return {**_FIXED, **extra, **fields, "model_type": "hubert_ecg"}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> HubertECGConfig:
        """The configuration from JSON values; fields of transformers that mean nothing here are kept in ``extra``."""
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        derived = {"label2id", "ensemble_length", "num_feat_extract_layers", "model_type"}
        extra = {name: value for name, value in fields.items() if name not in known | derived}
        given = {name: value for name, value in fields.items() if name in known}
        if given.get("id2label") is None:
            given.pop("id2label", None)
        if "sampling_rate_hz" not in given and "conv_stride" in given:
            # Published folders do not say their rate: a token is 0.64 s of a lead in all of them.
            given["sampling_rate_hz"] = math.prod(given["conv_stride"]) / 0.64
        return cls(**given, extra=extra)


def num_tokens(config: HubertECGConfig, num_samples: int) -> int:
    """Tokens of a flattened input.

    Args:
        config: Configuration of the model.
        num_samples: Samples of all leads together, ``L * T``.

    >>> num_tokens(HubertECGConfig(), 12 * 500)
    93
    """
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        num_samples = max(0, (num_samples - kernel) // stride + 1)
    return num_samples


def padding_lengths(lengths: Tensor | None, num_samples: int) -> Tensor | None:
    """``lengths``, or None where they say that nothing is padded.

    Answers on the host: lengths that lie on another device, or that a compiler traces, count as padded.
    """
    if lengths is None or lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return lengths
    return None if bool((lengths >= num_samples).all()) else lengths


def sample_mask(lengths: Tensor, num_leads: int, num_samples: int) -> Tensor:
    """``[B, L * T]`` bool: the first ``lengths`` samples of each lead, flattened.

    Args:
        lengths: ``[B]`` or ``[B, L]``, valid samples of each lead; 0 is a lead that is not there.
        num_leads: L.
        num_samples: Samples of a lead, T.
    """
    if lengths.ndim == 1:
        lengths = lengths[:, None].expand(-1, num_leads)
    if lengths.ndim != 2 or lengths.shape[1] != num_leads:
        raise ValueError(f"sample_mask: lengths must be [B] or [B, {num_leads}], got {list(lengths.shape)}")
    return (torch.arange(num_samples, device=lengths.device) < lengths[..., None]).flatten(1)


def window_mask(valid: Tensor, kernel: int, stride: int) -> Tensor:
    """Which windows of a convolution are valid: those with more than half of their ``stride`` central samples valid.

    The central samples of all windows tile the signal, so each sample speaks for one window.

    Args:
        valid: ``[B, S]`` bool, valid samples.
        kernel: Samples that a window sees.
        stride: Samples from one window to the next.

    Returns:
        ``[B, (S - kernel) // stride + 1]`` bool.
    """
    count = (valid.shape[1] - kernel) // stride + 1
    start = (kernel - stride) // 2
    centres = valid[:, start : start + count * stride].unflatten(1, (count, stride))
    return 2 * centres.sum(-1) > stride


def token_mask(config: HubertECGConfig, lengths: Tensor, num_samples: int, num_leads: int | None = None) -> Tensor:
    """Which tokens see a recording rather than padding.

    Token t sees the samples ``[s t, s t + r)`` of the flattened leads; it is valid when more than half of the s samples
    in the middle of these are.

    Args:
        config: Configuration of the model, which knows s and r.
        lengths: ``[B]`` or ``[B, L]``, valid samples of each lead.
        num_samples: Samples of a lead, T.
        num_leads: L; default: ``config.num_leads``.

    Returns:
        ``[B, N]`` bool.
    """
    valid = sample_mask(lengths, num_leads or config.num_leads, num_samples)
    return window_mask(valid, config.receptive_field, config.stride)
