"""Clusters of token features, and how good they are: what the cluster command and pretraining share."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hubert_ecg import clustering
from hubert_ecg.clustering.ranks import Ranks
from hubert_ecg.config import UserError
from hubert_ecg.train.token_features import ValidTokens

# Tokens of up to this many bytes are clustered in memory; more of them are read again on every pass.
IN_MEMORY_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Clusters:
    """A k-means model and how it divides the tokens that it was fitted on or is judged by.

    Args:
        kmeans: The model.
        scores: Those of ``clustering.scores``.
        counts: Tokens of each cluster, of all ranks, ``[K] int64``.
    """

    kmeans: clustering.KMeans
    scores: dict[str, float]
    counts: np.ndarray


def find_clusters(
    tokens: ValidTokens, models: Sequence[clustering.KMeans], seed: int, num_ranks: int
) -> list[Clusters]:
    """Fit the models that are not fitted yet, and judge all of them.

    Args:
        tokens: The tokens of this process.
        models: k-means models, fitted or not.
        seed: Seed of the tokens that are drawn for scores.
        num_ranks: Processes that do this together, each with its tokens.

    Raises:
        ValueError: The tokens cannot be clustered.
    """
    together = num_ranks > 1
    x = tokens if tokens.num_bytes > IN_MEMORY_BYTES else torch.from_numpy(tokens.read()).to(tokens.device)
    found = []
    for kmeans in models:
        if hasattr(kmeans, "cluster_centers_"):
            counts = torch.bincount(torch.as_tensor(kmeans.predict(x)), minlength=len(kmeans.cluster_centers_)).cpu()
            Ranks("clusters", together).sum(counts)
        else:
            kmeans.fit(x, distributed=together)
            counts = torch.from_numpy(kmeans.cluster_sizes_.astype(np.int64))
        scores = clustering.scores(
            x, None, kmeans.cluster_centers_, normalize=kmeans.normalize, seed=seed, distributed=together
        )
        found.append(Clusters(kmeans, scores, counts.numpy()))
    return found


def load_kmeans(paths: str, width: int, feature_type: str) -> list[clustering.KMeans]:
    """The k-means models of ``--kmeans_path``.

    Args:
        paths: Files with commas between them.
        width: Numbers in a feature vector.
        feature_type: What is clustered, for the error.

    Raises:
        UserError: If one is not there, or is for other features.
    """
    models = []
    for path in (Path(path.strip()) for path in paths.split(",")):
        kmeans = clustering.KMeans.load(path)
        if kmeans.cluster_centers_.shape[1] != width:
            raise UserError(
                f"kmeans_path must be a model for {width} features ({feature_type}), "
                f"got {kmeans.cluster_centers_.shape[1]} in {path}"
            )
        models.append(kmeans)
    return models


def kmeans_hash(kmeans: clustering.KMeans) -> str:
    """Changes when a label might."""
    centers = np.ascontiguousarray(kmeans.cluster_centers_)
    digest = hashlib.sha256(f"{centers.dtype} {list(centers.shape)} {kmeans.normalize}\n".encode())
    digest.update(centers.data)
    return digest.hexdigest()
