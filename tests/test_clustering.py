"""KMeans against scikit-learn's Lloyd, and what it does at the edges."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn import cluster, metrics

import hubert_ecg
from hubert_ecg import clustering, ops
from hubert_ecg.clustering import points
from hubert_ecg.config import UserError

KMeans = clustering.KMeans


def blobs(n=3000, d=13, k=12, seed=0, dtype=np.float32, spread=0.6):
    random = np.random.default_rng(seed)
    middles = random.normal(size=(k, d))
    return (middles[random.integers(k, size=n)] + spread * random.normal(size=(n, d))).astype(dtype)


def rows_of_length_one(x):
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("offset", "k"), [(0.0, 12), (0.0, 40), (30.0, 12)])
def test_from_the_same_start_it_ends_where_scikit_learn_ends(dtype, normalize, offset, k):
    x = blobs(dtype=dtype) + dtype(offset)
    theirs_x = rows_of_length_one(x) if normalize else x
    start = theirs_x[:k]
    ours = KMeans(k, init=start, normalize=normalize).fit(x)
    theirs = cluster.KMeans(k, init=start, n_init=1, algorithm="lloyd").fit(theirs_x)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.n_iter_ == pytest.approx(theirs.n_iter_, abs=1)
    np.testing.assert_allclose(
        ours.cluster_centers_, theirs.cluster_centers_, atol=2e-3 if dtype == np.float32 else 1e-9
    )
    assert ours.cluster_centers_.dtype == dtype
    assert ours.labels_.dtype == np.int64
    exact = ((theirs_x.astype(np.float64) - ours.cluster_centers_[ours.labels_]) ** 2).sum()
    assert ours.inertia_ == pytest.approx(exact, rel=1e-6)
    np.testing.assert_array_equal(ours.predict(x), ours.labels_)


def test_weights_count_as_repetitions():
    x, times = blobs(400, 5, 4, dtype=np.float64), np.random.default_rng(1).integers(0, 4, size=400)
    start = x[:4]
    weighted = KMeans(4, init=start, normalize=False).fit(x, sample_weight=times)
    repeated = KMeans(4, init=start, normalize=False, tol=0).fit(np.repeat(x, times, axis=0))
    theirs = cluster.KMeans(4, init=start, n_init=1, algorithm="lloyd").fit(x, sample_weight=times)
    assert weighted.inertia_ == pytest.approx(theirs.inertia_, rel=1e-9)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-3)
    assert weighted.score(x, sample_weight=times) == pytest.approx(-weighted.inertia_, rel=1e-12)


@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
def test_starts_are_as_good_as_theirs(init):
    x = blobs(4000, 8, 30, spread=0.2)
    ours = [KMeans(30, init=init, normalize=False, random_state=seed).fit(x).inertia_ for seed in range(15)]
    theirs = [cluster.KMeans(30, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(15)]
    assert np.mean(ours) < 1.1 * np.mean(theirs)
    assert KMeans(30, init=init, normalize=False, n_init=15, random_state=0).fit(x).inertia_ <= 1.02 * min(ours)


def test_k_means_plus_plus_takes_a_sample_of_many_points(monkeypatch):
    monkeypatch.setitem(points._BLOCK, "cpu", 3000)  # and every pass is made in parts
    x = blobs(70_000, 3, 5, spread=0.1)
    model = KMeans(5, normalize=False, random_state=0).fit(x)
    assert model.inertia_ == pytest.approx(cluster.KMeans(5, n_init=5, random_state=0).fit(x).inertia_, rel=1e-4)


def test_one_seed_gives_one_result():
    x = blobs()
    one, same, other = (KMeans(20, random_state=seed).fit(x) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.cluster_centers_, same.cluster_centers_)
    np.testing.assert_array_equal(one.labels_, same.labels_)
    assert not np.array_equal(one.cluster_centers_, other.cluster_centers_)
    batches = [KMeans(20, random_state=3, batch_size=500, max_iter=3).fit(x).cluster_centers_ for _ in range(2)]
    np.testing.assert_array_equal(*batches)


def test_normalisation_belongs_to_the_model():
    x = blobs()
    model = KMeans(10, random_state=0).fit(x)
    scales = np.random.default_rng(0).uniform(0.01, 100, size=(len(x), 1)).astype(np.float32)
    assert (model.predict(x * scales) == model.labels_).mean() > 0.999
    np.testing.assert_allclose(np.linalg.norm(model.normalized(x), axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(model.normalized(np.zeros((2, 13), np.float32)), 0)
    for value in (1e-38, 1e-30, 1e30):
        np.testing.assert_allclose(model.normalized(np.full((1, 13), value, np.float32)), 13**-0.5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch_size", [None, 50])
def test_the_points_given_stay_as_they_are(dtype, batch_size):
    x = blobs(200, dtype=dtype)
    before = x.copy()
    model = KMeans(5, batch_size=batch_size, max_iter=3, random_state=0).fit(x).partial_fit(x)
    model.predict(x), model.score(x), model.transform(x), model.normalized(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
    "kind", ["numpy", "torch", "list", "float16", "read-only", "strided", "int", "big-endian", "long double"]
)
def test_any_kind_of_points(kind):
    x = np.round(blobs(200, 4, 3) * 8)
    give = {
        "numpy": lambda: x,
        "torch": lambda: torch.from_numpy(x),
        "list": lambda: x.tolist(),
        "float16": lambda: x.astype(np.float16),
        "read-only": lambda: np.lib.stride_tricks.as_strided(x, writeable=False),
        "strided": lambda: np.repeat(x, 2, axis=1)[:, ::2],
        "int": lambda: x.astype(np.int32),
        "big-endian": lambda: x.astype(">f4"),
        "long double": lambda: x.astype(np.longdouble),
    }[kind]()
    model = KMeans(3, init=x[:3], normalize=False).fit(give)
    want = KMeans(3, init=x[:3], normalize=False).fit(x)
    np.testing.assert_allclose(model.cluster_centers_, want.cluster_centers_, rtol=1e-6)
    predicted = model.predict(give)
    assert isinstance(predicted, torch.Tensor if kind == "torch" else np.ndarray)
    np.testing.assert_array_equal(predicted, want.labels_)
    np.testing.assert_array_equal(KMeans(3, init=x[:3], normalize=False).fit_predict(give), want.labels_)


def test_empty_clusters_are_moved_and_counted():
    x = blobs(500, 3, 4, spread=0.1)
    far = np.full((1, 3), 50, np.float32)
    start = np.concatenate([x[:4], far, far + 1])
    model = KMeans(6, init=start, normalize=False).fit(x)
    assert model.empty_clusters_ == 2
    assert len(np.unique(model.labels_)) == 6
    theirs = cluster.KMeans(6, init=start, n_init=1, algorithm="lloyd").fit(x)
    assert model.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)


def test_fewer_different_points_than_clusters():
    x = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    for normalize in (False, True):
        model = KMeans(5, normalize=normalize, random_state=0).fit(x)
        assert model.inertia_ == pytest.approx(0, abs=1e-12)
        assert np.isfinite(model.cluster_centers_).all()
        assert model.empty_clusters_ > 0
    assert KMeans(3, random_state=0).fit(np.zeros((5, 2))).inertia_ == 0
    random = np.random.default_rng(0)
    for dtype, _ in itertools.product((np.float32, np.float64), range(20)):
        different = random.normal(size=(11, 17)).astype(dtype)
        x = different[random.integers(11, size=1500)]
        model = KMeans(21, init=x[:21], normalize=False).fit(x, sample_weight=random.uniform(0.1, 3, size=len(x)))
        # Each move of an empty cluster can win one more point, and rounding is nothing to win.
        assert model.inertia_ < 1e-9
        assert model.n_iter_ < 20
        np.testing.assert_array_equal(model.predict(x), model.labels_)
    as_many = KMeans(4, normalize=False, random_state=0).fit(blobs(4))
    assert as_many.inertia_ == pytest.approx(0, abs=1e-9)
    assert sorted(as_many.labels_) == [0, 1, 2, 3]


def test_mini_batches_come_close():
    x = blobs(6000, 8, 10, spread=0.3)
    whole = KMeans(10, random_state=0).fit(x)
    small = KMeans(10, random_state=0, batch_size=512, max_iter=20).fit(x)
    assert small.inertia_ < 1.1 * whole.inertia_
    np.testing.assert_array_equal(small.predict(x), small.labels_)


def test_partial_fit_is_the_mean_of_all_points_given():
    x = blobs(900, 3, 3, dtype=np.float64, spread=0.01)
    model = KMeans(3, normalize=False, random_state=0)
    for part in np.split(x, 9):
        model.partial_fit(part)
    labels = model.predict(x)
    for k in range(3):
        np.testing.assert_allclose(model.cluster_centers_[k], x[labels == k].mean(0), rtol=1e-9)
    assert model.n_iter_ == 9
    again = KMeans.from_state(model.state()).partial_fit(x[:100])
    np.testing.assert_array_equal(again.cluster_centers_, model.partial_fit(x[:100]).cluster_centers_)


def test_transform_and_score():
    x = blobs(100, 5, 3)
    model = KMeans(3, random_state=0).fit(x)
    distances = model.transform(x)
    unit = rows_of_length_one(x.astype(np.float64))
    np.testing.assert_allclose(distances, np.linalg.norm(unit[:, None] - model.cluster_centers_, axis=-1), atol=1e-6)
    np.testing.assert_array_equal(distances.argmin(1), model.labels_)
    assert model.score(x) == pytest.approx(-model.inertia_, rel=1e-9)


def test_progress_is_told_the_falling_inertia():
    x, told = blobs(), []
    model = KMeans(8, random_state=0).fit(x, progress=lambda iteration, inertia: told.append((iteration, inertia)))
    assert [iteration for iteration, _ in told] == list(range(1, model.n_iter_ + 1))
    assert all(later <= earlier * (1 + 1e-9) for (_, earlier), (_, later) in itertools.pairwise(told))


@pytest.mark.parametrize(
    ("options", "x", "said"),
    [
        ({"n_clusters": 5}, np.zeros((4, 2)), "fit: x must have at least n_clusters = 5 rows, got 4"),
        ({"n_clusters": 0}, np.zeros((4, 2)), "n_clusters must be a whole number of at least 1, got 0"),
        ({"n_clusters": 2.0}, np.zeros((4, 2)), "n_clusters must be a whole number"),
        ({"n_init": 0}, np.zeros((9, 2)), "n_init must be"),
        ({"batch_size": 0}, np.zeros((9, 2)), "batch_size must be"),
        ({"tol": -1}, np.zeros((9, 2)), "tol must be at least 0"),
        ({"init": "best"}, np.zeros((9, 2)), "init must be 'k-means\\+\\+', 'k-means\\|\\|', 'random' or an array"),
        (
            {"n_clusters": 2, "init": np.zeros((3, 2))},
            np.zeros((9, 2)),
            r"init must be .* \[2, 2\], got shape \[3, 2\]",
        ),
        ({"n_clusters": 2}, np.zeros(9), r"fit: x must be \[N, D\] with D > 0, got shape \[9\]"),
        ({"n_clusters": 2}, np.zeros((9, 2), complex), "fit: x must hold numbers, got dtype complex128"),
        ({"n_clusters": 2}, np.array([["a"], ["b"]]), "fit: x must hold numbers, got dtype <U1"),
        ({"n_clusters": 2}, torch.zeros(9, 2, dtype=torch.complex64), "fit: x must hold numbers, got dtype"),
        ({"n_clusters": 2}, np.array([[0, 1], [np.nan, 0], [1, 1]]), "got NaN or infinity in row 1"),
        ({"n_clusters": 2}, np.array([[0, 1], [1, 0], [np.inf, 1]]), "got NaN or infinity in row 2"),
    ],
)
def test_what_is_wrong_is_said(options, x, said):
    with pytest.raises(ValueError, match=said):
        KMeans(**options).fit(x)


def test_use_before_fit_and_other_features_are_refused():
    with pytest.raises(ValueError, match="predict: the model must be fitted first"):
        KMeans().predict(np.zeros((3, 2)))
    model = KMeans(2, random_state=0).fit(blobs(20, 3, 2))
    for call in (model.predict, model.score, model.transform, model.partial_fit):
        with pytest.raises(ValueError, match=r"x must be \[N, 3\], got shape \[5, 4\]"):
            call(np.zeros((5, 4)))
    with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
        model.fit(blobs(20, 3, 2), sample_weight=np.full(20, -1.0))


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
@pytest.mark.parametrize("init", ["k-means++", "array"])
def test_saved_and_loaded_it_is_the_same(suffix, init, tmp_path):
    x = blobs(dtype=np.float32)
    init = x[:7] if init == "array" else init
    model = KMeans(7, init=init, tol=1e-3, random_state=5, normalize=True).fit(x)
    path = tmp_path / f"kmeans{suffix}"
    model.save(path)
    loaded = KMeans.load(path)
    np.testing.assert_array_equal(loaded.cluster_centers_, model.cluster_centers_)
    np.testing.assert_array_equal(loaded.predict(x), model.labels_)
    for name in ("n_clusters", "n_init", "max_iter", "tol", "normalize", "batch_size", "random_state"):
        assert getattr(loaded, name) == getattr(model, name)
    np.testing.assert_array_equal(loaded.init, init)
    for name in ("inertia_", "n_iter_", "empty_clusters_"):
        assert getattr(loaded, name) == getattr(model, name)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".pkl":
        assert pickle.loads(path.read_bytes())["format"] == "hubert_ecg.KMeans"


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_numpy_numbers_as_arguments_are_saved(suffix, tmp_path):
    x = blobs(100)
    options = {"tol": np.float32(1e-3), "normalize": np.bool_(False), "random_state": np.int64(5)}
    KMeans(np.int64(3), max_iter=np.int32(9), **options).fit(x).save(tmp_path / f"kmeans{suffix}")
    loaded = KMeans.load(tmp_path / f"kmeans{suffix}")
    assert (loaded.n_clusters, loaded.max_iter, loaded.normalize, loaded.random_state) == (3, 9, False, 5)


@pytest.mark.parametrize("name", ["missing.pkl", "damaged.safetensors", "other.pkl", "other.txt", "poor.pkl"])
def test_what_is_no_model_is_refused(name, tmp_path):
    if name != "missing.pkl":
        content = {"other.pkl": {"a": 1}, "poor.pkl": {"format": "hubert_ecg.KMeans"}}.get(name)
        (tmp_path / name).write_bytes(b"\x00" * 20 if content is None else pickle.dumps(content))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        KMeans.load(tmp_path / name)


def test_parameters_and_their_text():
    model = hubert_ecg.KMeans(5, tol=0.01)
    assert model.get_params()["tol"] == 0.01
    assert repr(model) == "KMeans(n_clusters=5, tol=0.01)"
    assert repr(model.set_params(init=np.zeros((5, 2)))) == "KMeans(n_clusters=5, init=<array>, tol=0.01)"
    with pytest.raises(ValueError, match=r"set_params: name must be one of n_clusters, .*, got k"):
        model.set_params(k=3)


def test_labels_are_those_of_float64_on_hard_data():
    random = np.random.default_rng(0)
    centers = random.normal(size=(100, 39)).astype(np.float32)
    pairs = random.integers(100, size=(20_000, 2))
    middle = (centers[pairs[:, 0]] + centers[pairs[:, 1]]) / 2
    x = (middle + 1e-6 * random.normal(size=middle.shape)).astype(np.float32)
    labels = ops.kmeans_assign(x, centers)
    exact = np.concatenate(
        [((part[:, None].astype(np.float64) - centers) ** 2).sum(-1).argmin(1) for part in np.split(x, 40)]
    )
    np.testing.assert_array_equal(labels, exact)


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
