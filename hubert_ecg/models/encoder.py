"""The encoder: convolutional feature extractor, positional convolution, post-norm transformer.

Parameters carry the names that the published HuBERT-ECG weights and transformers' ``HubertModel`` use.
Shape letters: B records, L leads, T samples of a lead, N tokens, C channels, H hidden size, M masked tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from hubert_ecg.models.shape import HubertECGConfig, window_mask
from hubert_ecg.models.tensor_ranks import TensorRanks, dropout_seed, entering, local, summed
from hubert_ecg.ops import (
    add_norm,
    bias_gelu,
    conv_norm_gelu,
    linear,
    mask_embedding,
    masked_span_attention,
    positional_conv,
    spans_of,
    strided_conv,
)


@dataclasses.dataclass
class ModelOutput:
    """What a model returns; what it does not compute is None.

    Attributes:
        last_hidden_state: ``[B, N, H]``, the last layer; ``[B, M, H]`` where only masked tokens reach the loss.
        hidden_states: ``num_hidden_layers + 1`` tensors ``[B, N, H]``: the embedding, then each layer.
        valid: ``[B, N]`` bool, tokens that see a recording; None where there is no padding.
        logits: ``[B, num_labels]`` of a classifier; one ``[B, N, K]`` for each codebook in masked prediction.
        loss: The loss, a scalar.
        accuracy: Share of the masked tokens whose cluster is the likeliest one, mean over codebooks.
        masked_loss: Cross entropy on masked tokens, summed over codebooks.
        unmasked_loss: The same on the other tokens; only computed where alpha is below 1.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    valid: Tensor | None = None
    logits: Any = None
    loss: Tensor | None = None
    accuracy: Tensor | None = None
    masked_loss: Tensor | None = None
    unmasked_loss: Tensor | None = None


class ConvLayer(nn.Module):
    """Convolution, for the first one a norm over time, GELU."""

    def __init__(self, config: HubertECGConfig, index: int):
        super().__init__()
        channels = config.conv_dim[index]
        self.conv = nn.Conv1d(
            config.conv_dim[index - 1] if index else 1,
            channels,
            config.conv_kernel[index],
            config.conv_stride[index],
            bias=config.conv_bias,
        )
        self.layer_norm = nn.GroupNorm(channels, channels) if index == 0 else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``[B, C, F]`` to ``[B, C', F']``, in memory channels last.

        ``valid`` ``[B, F']`` bool limits the statistics of the norm.
        """
        conv, norm, stride = self.conv, self.layer_norm, self.conv.stride[0]
        if norm is not None:
            y = conv_norm_gelu(x[:, 0], conv.weight, norm.weight, norm.bias, stride, valid, norm.eps, conv.bias)
        else:
            y = F.gelu(strided_conv(x.transpose(1, 2), conv.weight, stride, conv.bias))
        return y.transpose(1, 2)


class FeatureExtractor(nn.Module):
    """From samples to one vector for each token."""

    def __init__(self, config: HubertECGConfig):
        super().__init__()
        self.first_window = (config.conv_kernel[0], config.conv_stride[0])
        self.compat = config.compat
        self.conv_layers = nn.ModuleList(ConvLayer(config, index) for index in range(len(config.conv_dim)))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Args: x ``[B, S]``; valid ``[B, S]`` bool, samples that are no padding. Returns ``[B, N, C]``."""
        frames = None
        if valid is not None and self.compat == "corrected":
            frames = window_mask(valid, *self.first_window)
        x = x[:, None]
        for index, layer in enumerate(self.conv_layers):
            x = layer(x, frames if index == 0 else None)
        return x.transpose(1, 2)


class Linear(nn.Linear):
    """torch's, with the products of :func:`hubert_ecg.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., N]``."""
        return linear(x, self.weight, self.bias)


class FeatureProjection(nn.Module):
    """LayerNorm, then the linear map into the transformer's width."""

    def __init__(self, config: HubertECGConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = Linear(config.conv_dim[-1], config.hidden_size)
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, x: Tensor, masked: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """``[B, N, C]`` to ``[B, N, H]``; tokens that are ``masked`` ``[B, N]`` become ``embedding`` ``[H]``."""
        x = self.layer_norm(x)
        if masked is None or embedding is None:
            return self.dropout(self.projection(x))
        if self.training and self.dropout.p > 0:
            x = self.dropout(self.projection(x))
            return torch.where(masked[..., None], embedding.to(x.dtype), x)
        return mask_embedding(linear(x, self.projection.weight), self.projection.bias, embedding, masked)


class PositionalConv(nn.Module):
    """Relative positions by a grouped convolution with weight norm over its taps, then GELU; its input is added."""

    def __init__(self, config: HubertECGConfig):
        super().__init__()
        taps = config.num_conv_pos_embeddings
        conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            taps,
            padding=taps // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        # Before weight norm takes the weight apart, so that its gains match.
        nn.init.normal_(conv.weight, std=2 / math.sqrt(taps * config.hidden_size))
        nn.init.constant_(conv.get_parameter("bias"), 0)
        self.conv = parametrizations.weight_norm(conv, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, H]`` to ``[B, N, H]``: x with its positions added."""
        return positional_conv(x, self.conv.weight, self.conv.bias, self.conv.groups)


class Attention(nn.Module):
    """Multi-head self-attention; with ``tensor_ranks``, each of several processes has some of the heads."""

    tensor_ranks: TensorRanks | None = None

    def __init__(self, config: HubertECGConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, spans: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Each token's look at the others.

        Args:
            x: ``[B, N, H]``.
            spans: ``[B, S, 2]`` of valid tokens; None for all.
            rows: ``[B, M]``, the tokens whose results are wanted; None for all.

        Returns:
            ``[B, N, H]`` or ``[B, M, H]``.
        """
        parts, ranks = (self.q_proj, self.k_proj, self.v_proj), self.tensor_ranks
        weight = torch.cat([local(part.weight, ranks) for part in parts])
        bias = torch.cat([local(part.bias, ranks) for part in parts])
        qkv = linear(entering(x, ranks), weight, bias).unflatten(-1, (3, -1, self.head_size))
        dropout = self.dropout if self.training else 0.0
        seed = dropout_seed(dropout, x.device, ranks)
        y = masked_span_attention(qkv, spans=spans, queries=rows, dropout_p=dropout, seed=seed)
        return summed(y.flatten(-2), self.out_proj, ranks)

    def split(self, ranks: TensorRanks) -> None:
        """Keep the heads of this process."""
        ranks.split(self, ("q_proj", "k_proj", "v_proj"), "out_proj")


class FeedForward(nn.Module):
    """Two linear layers with GELU between them; with ``tensor_ranks``, each process has a part of what is between."""

    tensor_ranks: TensorRanks | None = None

    def __init__(self, config: HubertECGConfig):
        super().__init__()
        self.dropout = config.activation_dropout
        self.intermediate_dense = Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, H]`` to ``[B, N, H]``."""
        first, ranks, dropout = self.intermediate_dense, self.tensor_ranks, self.dropout if self.training else 0.0
        seed = dropout_seed(dropout, x.device, ranks)
        x = linear(entering(x, ranks), local(first.weight, ranks))
        return summed(bias_gelu(x, local(first.bias, ranks), dropout, seed), self.output_dense, ranks)

    def split(self, ranks: TensorRanks) -> None:
        """Keep the part of this process."""
        ranks.split(self, ("intermediate_dense",), "output_dense")


class EncoderLayer(nn.Module):
    """Post-norm transformer layer: attention and feed-forward, each added to its input and normalised."""

    def __init__(self, config: HubertECGConfig):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, spans: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """``[B, N, H]`` to ``[B, N, H]``, or to ``[B, M, H]`` for the tokens ``rows``; see :class:`Attention`."""
        y = self.attention(x, spans, rows)
        x = self._add(y, x if rows is None else take_tokens(x, rows), self.layer_norm)
        return self._add(self.feed_forward(x), x, self.final_layer_norm)

    def _add(self, y: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return add_norm(y, x, norm.weight, norm.bias, norm.eps, self.dropout if self.training else 0.0)


def take_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """The tokens ``rows`` ``[B, M]`` of x ``[B, N, H]``: ``[B, M, H]``."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


class Encoder(nn.Module):
    """Positional convolution and transformer layers.

    Set ``gradient_checkpointing`` to recompute layers in the backward pass instead of keeping their activations.

    Attributes:
        layerdrop_seed: What LayerDrop draws from, the same on all ranks; None draws from torch's CPU generator.
        kept: Which layers ran in the last training pass.
    """

    def __init__(self, config: HubertECGConfig):
        super().__init__()
        self.layerdrop = config.layerdrop
        self.layerdrop_seed: int | None = None
        self.gradient_checkpointing = False
        self.kept: Sequence[bool] = [True] * config.num_hidden_layers
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        output_hidden_states: bool = False,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """From the projected tokens to the last layer.

        Args:
            x: ``[B, N, H]``.
            valid: ``[B, N]`` bool, tokens that are no padding.
            output_hidden_states: Also return the embedding and every layer.
            rows: ``[B, M]``, the only tokens whose last hidden states are wanted: the last layer computes no others.

        Returns:
            The last layer ``[B, N, H]`` or ``[B, M, H]``, and on request the embedding and every layer.
        """
        spans = None
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
            spans = spans_of(valid)
        x = self.dropout(self.layer_norm(self.pos_conv_embed(x)))
        states = [x]
        keep = self._draw_layers()
        last = max([-1, *[index for index, kept in enumerate(keep) if kept]])
        for index, layer in enumerate(self.layers):
            if keep[index]:
                x = self._run(layer, x, spans, rows if index == last else None)
            if output_hidden_states:
                states.append(x)
        if rows is not None and last < 0:
            x = take_tokens(x, rows)
        return x, tuple(states) if output_hidden_states else None

    def _draw_layers(self) -> Sequence[bool]:
        """Which layers run: LayerDrop, drawn on the host, so that no device waits for it."""
        if not self.training or self.layerdrop == 0:
            return [True] * len(self.layers)
        seed = self.layerdrop_seed
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.kept = (torch.rand(len(self.layers), generator=generator, device="cpu") >= self.layerdrop).tolist()
        return self.kept

    def dropped_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the layers that did not run in the last training pass."""
        for layer, kept in zip(self.layers, self.kept, strict=True):
            if not kept:
                yield from layer.parameters()

    def _run(self, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)
