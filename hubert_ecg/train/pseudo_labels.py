"""The targets of masked prediction: features of each token, and the k-means cluster they fall into."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import clustering, features
from hubert_ecg.config import PretrainConfig, UserError
from hubert_ecg.data import Loader
from hubert_ecg.models import HubertECGConfig, token_mask
from hubert_ecg.train.records import lead_lengths

if TYPE_CHECKING:
    from hubert_ecg.clustering import KMeans
    from hubert_ecg.data import Store

# Records whose features are computed at a time.
_BATCH = 256


class PseudoLabels:
    """Gives each token of a batch its cluster.

    Args:
        kmeans: The clusters; its normalisation is part of it.
        feature_type: What was clustered.
        compat: How features are computed.
        sampling_rate_hz: Rate of the batches.
    """

    def __init__(self, kmeans: KMeans, feature_type: str, compat: str, sampling_rate_hz: float) -> None:
        self.kmeans = kmeans
        self.feature_type = feature_type
        self._how = {"compat": compat, "sample_rate_hz": sampling_rate_hz}
        # Features are float32, and so are the centres that they are compared with.
        self._centers = torch.as_tensor(kmeans.cluster_centers_, dtype=torch.float32)

    @torch.no_grad()
    def __call__(self, ecg: Tensor) -> Tensor:
        """Clusters ``[B, N] int64`` of the crops ``[B, 12, T]``, on their device."""
        assign = features.ASSIGN.get(self.feature_type)
        if assign is not None:
            self._centers = self._centers.to(ecg.device)
            return assign(ecg, self._centers, normalize=self.kmeans.normalize, **self._how)
        # In half precision, tokens near a border would change their cluster.
        with torch.autocast(ecg.device.type, enabled=False):
            x = features.extract(ecg.float(), self.feature_type, **self._how)
            labels = self.kmeans.predict(x.flatten(0, 1))
        return labels.view(x.shape[:2])


def token_features(
    store: Store, indices: np.ndarray, config: PretrainConfig, model: HubertECGConfig, device: torch.device
) -> Tensor:
    """Features of all tokens of the first crop of these records, padding left out: ``[num_tokens, D] float32``, on the
    device."""
    loader = Loader(
        store, indices, _BATCH, crop_s=config.crop_s, crop="first", shuffle=False, num_workers=config.num_workers
    )
    parts = []
    for batch in loader.batches(0):
        x = features.extract(
            batch.leads.to(device), config.feature_type, compat=config.compat, sample_rate_hz=model.sampling_rate_hz
        )
        parts.append(x[token_mask(model, lead_lengths(batch), batch.ecg.shape[-1]).to(device)])
    return torch.cat(parts)


def fit_kmeans(
    store: Store, train: np.ndarray, config: PretrainConfig, model: HubertECGConfig, device: torch.device
) -> tuple[KMeans, dict[str, Any]]:
    """The k-means model of a run, and how good its clusters are.

    Returns:
        The model: that of ``config.kmeans_path``, else one fitted on at most ``config.kmeans_records`` of the training
        records; and quality scores, ``num_records``, ``num_tokens`` and ``counts [K]`` on these records.

    Raises:
        UserError: If there are fewer tokens than clusters, or the given model is for other features.
    """
    drawn = np.sort(np.random.default_rng(config.seed).permutation(train)[: config.kmeans_records])
    x = token_features(store, drawn, config, model, device)
    if config.kmeans_path is not None:
        kmeans = clustering.KMeans.load(config.kmeans_path)
        if kmeans.cluster_centers_.shape[1] != x.shape[1]:
            raise UserError(
                f"pretrain: kmeans_path must be a model for {x.shape[1]} features ({config.feature_type}), "
                f"got {kmeans.cluster_centers_.shape[1]} in {config.kmeans_path}"
            )
    else:
        if len(x) < config.num_clusters:
            raise UserError(
                f"pretrain: num_clusters must be at most the number of tokens, got {config.num_clusters} for {len(x)} "
                f"tokens of {len(drawn)} records; use fewer clusters or more records"
            )
        kmeans = clustering.KMeans(config.num_clusters, normalize=True, max_iter=100, random_state=config.seed).fit(x)
    labels = kmeans.predict(x)
    num_clusters = len(kmeans.cluster_centers_)
    scores = clustering.scores(kmeans.normalized(x), labels, kmeans.cluster_centers_)
    quality: dict[str, Any] = {
        "feature_type": config.feature_type,
        "num_clusters": num_clusters,
        "num_records": len(drawn),
        "num_tokens": len(x),
        "scores": {name: value if math.isfinite(value) else None for name, value in scores.items()},
        "counts": torch.bincount(labels, minlength=num_clusters).tolist(),
    }
    return kmeans, quality
