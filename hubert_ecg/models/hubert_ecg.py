"""HuBERT-ECG: the encoder, and the encoder with the heads of masked prediction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_ecg.models.encoder import Encoder, FeatureExtractor, FeatureProjection, Linear, ModelOutput
from hubert_ecg.models.pretrained import Pretrained
from hubert_ecg.models.shape import HubertECGConfig, num_tokens, padding_lengths, sample_mask, window_mask
from hubert_ecg.ops import IGNORED, codebook_loss

TEMPERATURE = 0.1
# Numbers of logits that are held at a time where all that is asked for is the largest.
_MAX_LOGITS = 1 << 23


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
        """Compile each transformer layer by itself, so that LayerDrop stays a choice of the host.

        ``torch.compile`` of a whole model gives one graph in evaluation, and in training where ``layerdrop`` is 0.
        """
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
            self.final_proj.append(Linear(config.hidden_size, config.classifier_proj_size).to(like))
            self._initialise(self.final_proj[-1])
        self.final_proj = self.final_proj[: len(config.vocab_sizes)]
        self.label_embedding = nn.ModuleList(
            nn.Embedding(size, config.classifier_proj_size).to(like) for size in config.vocab_sizes
        )
        self.label_embedding.apply(self._initialise)

    def likeliest(self, x: Tensor) -> Tensor:
        """The likeliest cluster of each token, without keeping the logits of all.

        Args:
            x: ``[B, N, H]``, the last hidden state.

        Returns:
            ``[E, B, N] int64``, for each codebook.
        """
        found = []
        for project, codebook in zip(self.final_proj, self.label_embedding, strict=True):
            entries = cast(nn.Embedding, codebook).weight
            parts = x.flatten(0, 1).split(max(1, _MAX_LOGITS // len(entries)))
            found.append(torch.cat([codebook_logits(project(part), entries).argmax(-1) for part in parts]))
        return torch.stack(found).unflatten(1, x.shape[:2])

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
        summed over codebooks. With alpha 1 only masked tokens reach the loss: the last layer then computes no others,
        and ``last_hidden_state`` is ``[B, M, H]``, unless hidden states or logits of all tokens are asked for.

        Args:
            ecg: ``[B, L, T]`` or ``[B, L * T]``.
            lengths: ``[B]`` or ``[B, L]``, valid samples of each lead.
            output_hidden_states: Also return the embedding and every layer.
            labels: ``[B, N]`` or, for E codebooks, ``[E, B, N]`` int64 clusters; -100 is ignored, as is padding.
            mask_indices: ``[B, M]`` int64, masked tokens, from :func:`hubert_ecg.ops.span_mask`.
            alpha: Weight of the masked tokens.
            output_logits: Return the logits of all tokens, ``[B, N, K]`` for each codebook, beside a loss too. Without
                labels they are always there.

        Raises:
            ValueError: If a shape does not fit, or there are labels and no mask.
        """
        only_masked = labels is not None and alpha == 1 and not (output_hidden_states or output_logits)
        output = self.encode(ecg, lengths, mask_indices, output_hidden_states, mask_indices if only_masked else None)
        x, valid = output.last_hidden_state, output.valid
        projections = [cast(nn.Linear, project) for project in self.final_proj]
        codebooks = [cast(nn.Embedding, codebook).weight for codebook in self.label_embedding]
        if output_logits or labels is None:
            output.logits = tuple(
                codebook_logits(project(x), codebook) for project, codebook in zip(projections, codebooks, strict=True)
            )
        if labels is None:
            return output
        if mask_indices is None:
            raise ValueError("HubertECGForPretraining: mask_indices must come with labels, got None; use ops.span_mask")
        labels = labels[None] if labels.ndim == 2 else labels
        shape = [len(codebooks), len(ecg), num_tokens(self.config, ecg.shape[1:].numel())]
        if list(labels.shape) != shape or labels.is_floating_point():
            given = f"{list(labels.shape)} {labels.dtype}"
            raise ValueError(f"HubertECGForPretraining: labels must be {shape} whole numbers, got {given}")
        labels = labels.long()
        if valid is not None:
            labels = labels.masked_fill(~valid, IGNORED)
        if only_masked:
            labels = labels.gather(2, mask_indices.expand(len(labels), -1, -1))

        def loss(labels: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
            weights, biases = zip(*((project.weight, project.bias) for project in projections), strict=True)
            return codebook_loss(x, weights, codebooks, labels, indices, TEMPERATURE, biases)

        output.masked_loss, output.accuracy = loss(labels, None if only_masked else mask_indices)
        output.loss = output.masked_loss
        if alpha != 1:
            masked = torch.zeros(shape[1:], dtype=torch.bool, device=x.device).scatter(1, mask_indices, True)
            output.unmasked_loss, _ = loss(labels.masked_fill(masked, IGNORED), None)
            output.loss = alpha * output.masked_loss + (1 - alpha) * output.unmasked_loss
        return output
