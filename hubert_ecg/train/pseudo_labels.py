"""The targets of masked prediction: features of each token, and the k-means cluster they fall into."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubert_ecg import features, ops
from hubert_ecg.clustering.points import unit_rows
from hubert_ecg.config import UserError
from hubert_ecg.train.records import lead_lengths
from hubert_ecg.train.teacher import weights_hash

if TYPE_CHECKING:
    from hubert_ecg.clustering import KMeans
    from hubert_ecg.data import Batch, Store


class Featuriser:
    """Computes the features of the tokens of a batch, on a device.

    Args:
        feature_type: mfcc, time_freq, mixed or latent.
        compat: How features of the signal are computed.
        sampling_rate_hz: Rate of the batches.
        device: Where to compute.
        teacher: Whose hidden states latent features are.
    """

    def __init__(
        self,
        feature_type: str,
        compat: str,
        sampling_rate_hz: float,
        device: torch.device,
        teacher: features.Latent | None = None,
    ) -> None:
        assert (feature_type == "latent") == (teacher is not None)
        self.feature_type, self.device, self.teacher = feature_type, device, teacher
        self.how = {"compat": compat, "sample_rate_hz": sampling_rate_hz}

    @property
    def width(self) -> int:
        """Numbers in a feature vector."""
        return features.num_features(self.feature_type) if self.teacher is None else self.teacher.width

    @functools.cached_property
    def teacher_hash(self) -> str | None:
        """Changes when the weights of the teacher do."""
        return None if self.teacher is None else weights_hash(self.teacher.model.state_dict())

    def leads(self, batch: Batch) -> Tensor:
        """What features of the signal are computed from, on the device."""
        return batch.leads.to(self.device, non_blocking=True)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """``[B, N, D] float32``."""
        if self.teacher is not None:
            return self.teacher(batch.ecg.to(self.device, non_blocking=True), lead_lengths(batch))
        # In half precision, tokens near a border would change their cluster.
        with torch.autocast(self.device.type, enabled=False):
            return features.extract(self.leads(batch), self.feature_type, **self.how)


class PseudoLabels:
    """Gives each token of a batch its clusters, one for each k-means model; features never leave the device.

    Args:
        featuriser: Computes what was clustered.
        kmeans: The k-means models of the ensemble; their normalisation is part of them.
    """

    #: Label sets that batches must carry.
    names: tuple[str, ...] = ()

    def __init__(self, featuriser: Featuriser, kmeans: Sequence[KMeans]) -> None:
        self.featuriser, self.kmeans = featuriser, kmeans
        # Features are float32, and so are the centres that they are compared with.
        self._models = [
            (torch.as_tensor(one.cluster_centers_, dtype=torch.float32, device=featuriser.device), one.normalize)
            for one in kmeans
        ]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Clusters ``[E, B, N] int64`` of the crops, on the device."""
        assign = features.ASSIGN.get(self.featuriser.feature_type)
        if assign is not None and len(self._models) == 1:
            ((centers, normalize),) = self._models
            return assign(self.featuriser.leads(batch), centers, normalize=normalize, **self.featuriser.how)[None]
        x = self.featuriser(batch)
        points = x.flatten(0, 1)
        unit = unit_rows(points) if any(normalize for _, normalize in self._models) else points
        return torch.stack(
            [
                ops.kmeans_assign(unit if normalize else points, centers).view(x.shape[:2])
                for centers, normalize in self._models
            ]
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        return {"kmeans": [one.state() for one in self.kmeans], "teacher": self.featuriser.teacher_hash}

    def check_same(self, state: Mapping[str, Any]) -> None:
        """They are those of the state, for they were made from it."""


class StoredLabels:
    """Clusters that were found before: label sets of the store, which batches carry.

    Args:
        store: Where they lie.
        names: Names of the sets, whose models come one after another.
        device: Where the clusters are wanted.

    Attributes:
        vocab_sizes: Clusters K of each model.
        facts: What each set is.

    Raises:
        UserError: If the store has no such labels.
    """

    def __init__(self, store: Store, names: Sequence[str], device: torch.device) -> None:
        self.names, self._device = tuple(name.strip() for name in names), device
        sets = [store.labels(name) for name in self.names]
        self.vocab_sizes: list[int] = []
        for one in sets:
            self.vocab_sizes += one.facts.get("vocab_sizes", [one.facts["num_clusters"]] * len(one.values))
        self.facts = [one.facts for one in sets]

    def __call__(self, batch: Batch) -> Tensor:
        """Clusters ``[E, B, N] int64`` of the crops, on the device."""
        assert batch.labels is not None
        return batch.labels.to(self._device, non_blocking=True)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        return {"labels": self.facts}

    def check_same(self, state: Mapping[str, Any]) -> None:
        """Refuse labels that have been written anew, in another way, since a run began with them.

        Raises:
            UserError: Naming what differs.
        """
        for name, before, now in zip(self.names, state["labels"], self.facts, strict=True):
            for fact in (*now, *before):
                if before.get(fact) != now.get(fact):
                    raise UserError(
                        f"resume: --labels {name} must have {fact} {before.get(fact)} as when the run began, got "
                        f"{now.get(fact)}; write them so again, or start anew without --resume"
                    )
