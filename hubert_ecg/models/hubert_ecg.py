"""HuBERT-ECG: the encoder, and the encoder with the heads of masked prediction."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_ecg.models.encoder import (
    Encoder,
    FeatureExtractor,
    FeatureProjection,
    HubertECGConfig,
    ModelOutput,
    num_tokens,
    padding_lengths,
    sample_mask,
    window_mask,
)
from hubert_ecg.models.pretrained import Pretrained

TEMPERATURE = 0.1
IGNORED = -100


def draw_mask(
    batch: int,
    num_tokens: int,
    mask_prob: float,
    mask_length: int = 1,
    valid: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    min_masks: int = 2,
) -> Tensor:
    """Draw the tokens that masked prediction masks: the same number for each record, so that shapes are static.

    Spans are put down in random order until there are enough masked tokens; the last span is cut where it would give
    more. Spans may touch and overlap. A record with padding has the share ``mask_prob`` of its valid tokens masked;
    the rest of its M indices point at padding, which the loss ignores.

    Args:
        batch: Number of records, B.
        num_tokens: Tokens of a record, N.
        mask_prob: Share of the tokens to mask.
        mask_length: Tokens in a span.
        valid: ``[B, N]`` bool, tokens that are no padding; default: all.
        generator: Source of the random numbers, on ``device``; default: torch's own.
        device: Where to draw; default: that of ``valid``, else of ``generator``, else the CPU.
        min_masks: Fewest masked tokens of a record (as far as it has as many).

    Returns:
        ``[B, M]`` int64 with ``M = min(N, max(min_masks, round(mask_prob * N)))``: distinct token indices, ascending.

    Raises:
        ValueError: If ``mask_prob``, ``mask_length`` or ``valid`` is out of range.
    """
    if not 0 < mask_prob <= 1:
        raise ValueError(f"draw_mask: mask_prob must be above 0 and at most 1, got {mask_prob}")
    if mask_length < 1:
        raise ValueError(f"draw_mask: mask_length must be at least 1, got {mask_length}")
    if valid is not None and (valid.shape != (batch, num_tokens) or valid.dtype != torch.bool):
        raise ValueError(
            f"draw_mask: valid must be [{batch}, {num_tokens}] bool, got {list(valid.shape)} {valid.dtype}"
        )
    if device is None:
        device = valid.device if valid is not None else generator.device if generator is not None else "cpu"
    length = min(mask_length, num_tokens)
    # A token comes as early as the earliest span over it: the smallest number drawn by any of the starts that reach it.
    start = torch.rand(batch, num_tokens - length + 1, generator=generator, device=device)
    if valid is not None:
        valid = valid.to(device)
        start = start.masked_fill(~valid.unfold(1, length, 1).all(-1), 1.0)
    order = -F.max_pool1d(F.pad(-start, (length - 1, length - 1), value=-2.0)[:, None], length, stride=1)[:, 0]
    count = _mask_count(num_tokens, mask_prob, min_masks)
    if valid is None:
        return order.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    # Valid tokens first, in the order drawn; those that no whole span reaches come after all that one does.
    order = torch.where(order < 1, order, 1 + torch.rand(order.shape, generator=generator, device=device))
    order = order.masked_fill(~valid, 3.0).argsort(dim=1, stable=True)
    num_valid = valid.sum(1, keepdim=True)
    wanted = _mask_counts(num_tokens, mask_prob, min_masks, start.device)[num_valid]
    place = torch.arange(count, device=device).expand(batch, -1)
    place = torch.where(place < wanted, place, place - wanted + num_valid)
    return order.gather(1, place).sort(dim=1).values


def _mask_count(num_tokens: int, mask_prob: float, min_masks: int) -> int:
    return min(num_tokens, max(min_masks, int(mask_prob * num_tokens + 0.5)))


@functools.lru_cache(maxsize=16)
def _mask_counts(num_tokens: int, mask_prob: float, min_masks: int, device: torch.device) -> Tensor:
    """Masked tokens of a record with 0 to N valid ones; kept, so that a step copies nothing to the device."""
    return torch.tensor([_mask_count(n, mask_prob, min_masks) for n in range(num_tokens + 1)], device=device)


def codebook_logits(x: Tensor, codebook: Tensor) -> Tensor:
    """Cosine similarity of projected tokens and codebook entries, over the temperature 0.1, as one matrix product.

    Args:
        x: ``[..., D]``, projected hidden states.
        codebook: ``[K, D]``.

    Returns:
        ``[..., K]``, at least float32 whatever autocast says: cross entropy wants finer steps than half precision has.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        x = F.normalize(x.to(wide), dim=-1, eps=1e-8)
        return F.linear(x, F.normalize(codebook.to(wide), dim=-1, eps=1e-8)) / TEMPERATURE


class Backbone(Pretrained, nn.Module):
    """Extractor, projection and encoder: what every model of the family is built on."""

    def __init__(self, config: HubertECGConfig):
        super().__init__()
        # A copy: resizing codebooks changes it, and the caller's may build another model.
        self.config = copy.deepcopy(config)
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size).uniform_())
        self.encoder = Encoder(config)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv1d) and not hasattr(module, "parametrizations"):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def encode(
        self,
        ecg: Tensor,
        lengths: Tensor | None = None,
        mask_indices: Tensor | None = None,
        output_hidden_states: bool = False,
        rows: Tensor | None = None,
    ) -> ModelOutput:
        """From samples to hidden states; see :meth:`HubertECG.forward` and, for ``rows``, :class:`Encoder`."""
        ecg, valid_samples = self._flatten(ecg, lengths)
        if num_tokens(self.config, ecg.shape[1]) < 1:
            raise ValueError(
                f"{type(self).__name__}: ecg must have at least {self.config.receptive_field} samples, "
                f"all leads together, got {ecg.shape[1]}"
            )
        valid = None
        if valid_samples is not None:
            ecg = ecg.masked_fill(~valid_samples, 0)
            valid = window_mask(valid_samples, self.config.receptive_field, self.config.stride)
        x, masked = self.feature_extractor(ecg, valid_samples), None
        if mask_indices is not None:
            if mask_indices.ndim != 2 or len(mask_indices) != len(x):
                raise ValueError(
                    f"{type(self).__name__}: mask_indices must be [{len(x)}, M], got {list(mask_indices.shape)}"
                )
            masked = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, mask_indices, True)
        x = self.feature_projection(x, masked, self.masked_spec_embed)
        x, states = self.encoder(x, valid, output_hidden_states, rows)
        return ModelOutput(last_hidden_state=x, hidden_states=states, valid=valid)

    def _flatten(self, ecg: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The leads one after another ``[B, L * T]``, and which of the samples are valid (None: all)."""
        name = type(self).__name__
        if ecg.ndim not in (2, 3):
            raise ValueError(f"{name}: ecg must be [B, L, T] or [B, L * T], got {list(ecg.shape)}")
        if not ecg.is_floating_point():
            raise ValueError(f"{name}: ecg must be floating point, got {ecg.dtype}")
        num_leads = ecg.shape[1] if ecg.ndim == 3 else self.config.num_leads
        ecg = ecg.flatten(1).to(self.masked_spec_embed.dtype)
        if lengths is None:
            return ecg, None
        if ecg.shape[1] % num_leads:
            raise ValueError(f"{name}: ecg must be {num_leads} leads of equal length, got {ecg.shape[1]} samples")
        if lengths.shape not in ((len(ecg),), (len(ecg), num_leads)):
            raise ValueError(
                f"{name}: lengths must be [{len(ecg)}] or [{len(ecg)}, {num_leads}], got {list(lengths.shape)}"
            )
        num_samples = ecg.shape[1] // num_leads
        lengths = padding_lengths(lengths, num_samples)
        if lengths is None:
            return ecg, None
        return ecg, sample_mask(lengths.to(ecg.device, non_blocking=True), num_leads, num_samples)

    def compile_layers(self, **options: object) -> None:
        """Compile each transformer layer by itself, so that LayerDrop stays a choice of the host."""
        for layer in self.encoder.layers:
            layer.compile(**options)


class HubertECG(Backbone):
    """The encoder.

    >>> model = HubertECG(HubertECGConfig.preset("tiny")).eval()
    >>> model(torch.zeros(1, 12, 500)).last_hidden_state.shape
    torch.Size([1, 93, 128])
    """

    def forward(
        self,
        ecg: Tensor,
        lengths: Tensor | None = None,
        output_hidden_states: bool = False,
        *,
        mask_indices: Tensor | None = None,
    ) -> ModelOutput:
        """Encode recordings.

        Args:
            ecg: ``[B, L, T]``, or the same with its leads one after another, ``[B, L * T]``; any number of leads.
            lengths: ``[B]`` or ``[B, L]``, valid samples of each lead (0: the lead is not there); default: all.
                What stands in the other samples does not matter.
            output_hidden_states: Also return the embedding and every layer.
            mask_indices: ``[B, M]`` int64, tokens to replace by the mask embedding.

        Returns:
            ``last_hidden_state``, ``hidden_states`` on request, and ``valid`` where there is padding.

        Raises:
            ValueError: If a shape does not fit.
        """
        return self.encode(ecg, lengths, mask_indices, output_hidden_states)


class HubertECGForPretraining(Backbone):
    """The encoder with a projection and a codebook for each k-means model that it predicts."""

    def __init__(self, config: HubertECGConfig):
        super().__init__(config)
        self.final_proj = nn.ModuleList()
        self.label_embedding = nn.ModuleList()
        self.resize_codebooks(config.vocab_sizes)

    def resize_codebooks(self, vocab_sizes: Sequence[int]) -> None:
        """Start a new iteration: fresh codebooks of these sizes. Projections are kept, as many as are needed."""
        config, like = self.config, self.masked_spec_embed
        config.vocab_sizes = [int(size) for size in vocab_sizes]
        while len(self.final_proj) < len(config.vocab_sizes):
            self.final_proj.append(nn.Linear(config.hidden_size, config.classifier_proj_size).to(like))
            self._initialise(self.final_proj[-1])
        self.final_proj = self.final_proj[: len(config.vocab_sizes)]
        self.label_embedding = nn.ModuleList(
            nn.Embedding(size, config.classifier_proj_size).to(like) for size in config.vocab_sizes
        )
        self.label_embedding.apply(self._initialise)

    def forward(
        self,
        ecg: Tensor,
        lengths: Tensor | None = None,
        output_hidden_states: bool = False,
        *,
        labels: Tensor | None = None,
        mask_indices: Tensor | None = None,
        alpha: float = 1.0,
        output_logits: bool = False,
    ) -> ModelOutput:
        """Predict the clusters of masked tokens.

        The loss is ``alpha * masked + (1 - alpha) * unmasked``: mean cross entropy over masked and other valid tokens,
        summed over codebooks. With alpha 1 no logits of unmasked tokens are computed.

        Args:
            ecg: ``[B, L, T]`` or ``[B, L * T]``.
            lengths: ``[B]`` or ``[B, L]``, valid samples of each lead.
            output_hidden_states: Also return the embedding and every layer.
            labels: ``[B, N]`` or, for E codebooks, ``[E, B, N]`` int64 clusters; -100 is ignored, as is padding.
            mask_indices: ``[B, M]`` int64, masked tokens, from :func:`draw_mask`.
            alpha: Weight of the masked tokens.
            output_logits: Return the logits of all tokens, ``[B, N, K]`` for each codebook, beside a loss too. Without
                labels they are always there.

        Raises:
            ValueError: If a shape does not fit, or there are labels and no mask.
        """
        output = self.encode(ecg, lengths, mask_indices, output_hidden_states)
        x, valid = output.last_hidden_state, output.valid
        heads = [
            (project, cast(nn.Embedding, codebook).weight)
            for project, codebook in zip(self.final_proj, self.label_embedding, strict=True)
        ]
        if output_logits or labels is None:
            output.logits = tuple(codebook_logits(project(x), codebook) for project, codebook in heads)
        if labels is None:
            return output
        if mask_indices is None:
            raise ValueError("HubertECGForPretraining: mask_indices must come with labels, got None; use draw_mask")
        labels = labels[None] if labels.ndim == 2 else labels
        if labels.shape != (len(heads), *x.shape[:2]):
            raise ValueError(
                f"HubertECGForPretraining: labels must be {[len(heads), *x.shape[:2]]}, got {list(labels.shape)}"
            )
        labels = labels.long()
        if valid is not None:
            labels = labels.masked_fill(~valid, IGNORED)
        if alpha == 1:
            x = x.gather(1, mask_indices[..., None].expand(-1, -1, x.shape[-1]))
            labels = labels.gather(2, mask_indices.expand(len(heads), -1, -1))
            masked = None
        else:
            masked = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, mask_indices, True)
        losses, others, correct = [], [], []
        for (project, codebook), target in zip(heads, labels, strict=True):
            logits = codebook_logits(project(x), codebook)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
            loss, known = loss.view_as(target), target != IGNORED
            if masked is not None:
                others.append(_mean(loss, known & ~masked))
                known = known & masked
            losses.append(_mean(loss, known))
            correct.append(_mean((logits.detach().argmax(-1) == target).float(), known))
        output.masked_loss = torch.stack(losses).sum()
        output.accuracy = torch.stack(correct).mean()
        output.loss = output.masked_loss
        if others:
            output.unmasked_loss = torch.stack(others).sum()
            output.loss = alpha * output.masked_loss + (1 - alpha) * output.unmasked_loss
        return output


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted entries; 0 where there are none."""
    return (values * counted).sum() / counted.sum().clamp_min(1)
