"""Scores of clusters against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics

from hubert_ecg import KMeans, clustering

from .toy import blobs, rows_of_length_one


def test_scores_are_those_of_scikit_learn():
    x = rows_of_length_one(blobs(dtype=np.float64))
    model = KMeans(12, random_state=0).fit(x)
    found = clustering.scores(x, model.labels_, model.cluster_centers_)
    assert found["inertia"] == pytest.approx(model.inertia_)
    assert found["davies_bouldin"] == pytest.approx(metrics.davies_bouldin_score(x, model.labels_))
    assert found["calinski_harabasz"] == pytest.approx(metrics.calinski_harabasz_score(x, model.labels_))
    share = np.bincount(model.labels_) / len(x)
    assert found["cluster_use_entropy"] == pytest.approx(-(share * np.log(share)).sum() / math.log(12))
    assert found["cluster_use_perplexity"] == pytest.approx(12 ** found["cluster_use_entropy"])
    assert found["num_empty"] == 0
    sampled = [clustering.scores(x, model.labels_, model.cluster_centers_, max_points=500, seed=1) for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert sampled[0]["davies_bouldin"] == pytest.approx(found["davies_bouldin"], rel=0.2)
    assert sampled[0]["inertia"] == found["inertia"]


def test_scores_of_one_used_cluster_and_of_wrong_labels():
    x, centers = np.zeros((4, 2)), np.zeros((3, 2))
    found = clustering.scores(x, [1, 1, 1, 1], centers)
    assert found["cluster_use_entropy"] == 0
    assert found["cluster_use_perplexity"] == 1
    assert found["num_empty"] == 2
    assert math.isnan(found["davies_bouldin"])
    for wrong in ([0, 1, 2, 3], [0, -1, 0, 0], [0, 1]):
        with pytest.raises(ValueError, match="scores: labels must be"):
            clustering.scores(x, wrong, centers)


@pytest.mark.parametrize("max_points", [500, 20_000])
def test_scores_find_the_labels_themselves(max_points, tmp_path):
    x = blobs()
    model = KMeans(12, random_state=0).fit(x)
    wanted = clustering.scores(model.normalized(x), model.labels_, model.cluster_centers_, max_points=max_points)
    found = clustering.scores(x, None, model.cluster_centers_, max_points=max_points, normalize=True)
    assert found == pytest.approx(wanted, rel=1e-12)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[:] = x
    assert clustering.scores(mapped, None, model.cluster_centers_, max_points=max_points, normalize=True) == found
