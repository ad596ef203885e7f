"""HuBERT-ECG with a head for a labelled task."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_ecg.models.encoder import ModelOutput
from hubert_ecg.models.hubert_ecg import HubertECG
from hubert_ecg.models.pretrained import Pretrained
from hubert_ecg.models.shape import Head, HubertECGConfig, Problem


class HubertECGForClassification(Pretrained, nn.Module):
    """The encoder, mean pooling over valid tokens, dropout, and a head.

    Args:
        config: Configuration of the encoder; it is copied, and the copy holds the arguments below.
        label_names: Names of the outputs, in their order; default: those in ``config.id2label``.
        problem: "multilabel" (sigmoid), "multiclass" (softmax) or "regression"; default: the config's.
        head: "linear", "mlp" (one hidden layer with tanh) or "label_embedding" (cosine similarity to one learned
            vector for each label); default: the config's.
        dropout: Dropout before the head; default: the config's.

    Raises:
        ValueError: If there are no label names, one appears twice, or an argument is not one of those above.
    """

    base_prefix = "hubert_ecg."

    def __init__(
        self,
        config: HubertECGConfig,
        label_names: Sequence[str] | None = None,
        problem: Problem | None = None,
        head: Head | None = None,
        dropout: float | None = None,
    ):
        super().__init__()
        config = copy.deepcopy(config)
        if label_names is not None:
            config.id2label = dict(enumerate(map(str, label_names)))
        config.problem = problem or config.problem
        config.head = head or config.head
        config.classifier_dropout = config.classifier_dropout if dropout is None else dropout
        names = config.label_names
        if not names or len(set(names)) < len(names):
            hint = "" if names else "; weights that were not fine-tuned have none: give them"
            raise ValueError(f"HubertECGForClassification: label_names must be distinct names, got {list(names)}{hint}")
        if config.problem not in ("multilabel", "multiclass", "regression"):
            raise ValueError(
                "HubertECGForClassification: problem must be multilabel, multiclass or regression, "
                f"got {config.problem!r}"
            )
        self.config = config
        self.hubert_ecg = HubertECG(config)
        self.classifier_dropout = nn.Dropout(config.classifier_dropout)
        if config.head == "linear":
            self.classifier: nn.Module = nn.Linear(config.hidden_size, len(names))
        elif config.head == "mlp":
            config.classifier_hidden_size = config.classifier_hidden_size or config.hidden_size
            self.classifier = nn.Sequential(
                nn.Linear(config.hidden_size, config.classifier_hidden_size),
                nn.Tanh(),
                nn.Linear(config.classifier_hidden_size, len(names)),
            )
        elif config.head == "label_embedding":
            self.label_embedding = nn.Embedding(len(names), config.hidden_size)
        else:
            raise ValueError(
                f"HubertECGForClassification: head must be linear, mlp or label_embedding, got {config.head!r}"
            )
        for name in ("classifier", "label_embedding"):
            if hasattr(self, name):
                getattr(self, name).apply(self.hubert_ecg._initialise)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""
        return self.config.label_names

    def forward(
        self,
        ecg: Tensor,
        lengths: Tensor | None = None,
        output_hidden_states: bool = False,
        *,
        targets: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> ModelOutput:
        """Score recordings.

        Args:
            ecg: ``[B, L, T]`` or ``[B, L * T]``.
            lengths: ``[B]`` or ``[B, L]``, valid samples of each lead.
            output_hidden_states: Also return the embedding and every layer.
            targets: ``[B, C]`` 0 or 1 (multilabel), ``[B]`` class indices or ``[B, C]`` one-hot (multiclass), or
                ``[B, C]`` values (regression). A one-hot row of zeros is left out of the loss.
            pos_weight: ``[C]``, weight of the positives of each label, or of each class.

        Returns:
            ``logits`` ``[B, C]``, ``loss`` where there are targets, and what the encoder returns.
        """
        output = self.hubert_ecg(ecg, lengths, output_hidden_states=output_hidden_states)
        pooled = mean_pool(output.last_hidden_state, output.valid)
        output.logits = self._head(self.classifier_dropout(pooled))
        if targets is not None:
            output.loss = self._loss(output.logits.float(), targets, pos_weight)
        return output

    def scores(self, logits: Tensor) -> Tensor:
        """Logits as probabilities, or as they are in a regression; ``[B, C]``."""
        if self.config.problem == "multilabel":
            return logits.float().sigmoid()
        return logits.float().softmax(-1) if self.config.problem == "multiclass" else logits.float()

    def _head(self, x: Tensor) -> Tensor:
        if self.config.head != "label_embedding":
            return self.classifier(x)
        entries = F.normalize(self.label_embedding.weight, dim=-1, eps=1e-8)
        return F.linear(F.normalize(x, dim=-1, eps=1e-8), entries)

    def _loss(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        if self.config.problem == "multiclass":
            if targets.ndim == 2:
                targets = torch.where(targets.any(-1), targets.argmax(-1), -100)
            loss = F.cross_entropy(logits, targets.long(), weight=weight, reduction="sum")
            known = targets >= 0
            total = known.sum() if weight is None else (weight[targets.clamp_min(0)] * known).sum()
            return loss / total.clamp_min(torch.finfo(logits.dtype).tiny)
        if targets.shape != logits.shape:
            raise ValueError(
                f"HubertECGForClassification: targets must be {list(logits.shape)}, got {list(targets.shape)}"
            )
        if self.config.problem == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), pos_weight=weight)
        return F.mse_loss(logits, targets.to(logits.dtype))


def mean_pool(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over tokens.

    Args:
        x: ``[B, N, H]``.
        valid: ``[B, N]`` bool, tokens that count; default: all.

    Returns:
        ``[B, H]``; zeros for a record without a valid token.
    """
    if valid is None:
        return x.mean(1)
    return x.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)
