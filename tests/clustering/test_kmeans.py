"""KMeans against scikit-learn's Lloyd, its arguments and its files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn import base, cluster, model_selection, pipeline, preprocessing

import hubert_ecg
from hubert_ecg import KMeans, ops
from hubert_ecg.config import UserError

from .toy import blobs, rows_of_length_one


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


@pytest.mark.parametrize("kind", ["normal", "uniform", "correlated"])
def test_rounding_of_float32_decides_nothing(kind):
    """Points without structure, where many are almost equally near to two centres, for as long as iterations go on."""
    random = np.random.default_rng(5)
    for num_points, width, k in ((12000, 20, 35), (6000, 19, 23), (9863, 39, 39)):
        x = random.uniform(size=(num_points, width)) if kind == "uniform" else random.normal(size=(num_points, width))
        if kind == "correlated":
            x = x @ random.normal(size=(width, width))
        x = x.astype(np.float32)
        ours = KMeans(k, init=x[:k], normalize=False, max_iter=300).fit(x)
        exact = x.astype(np.float64)
        theirs = cluster.KMeans(k, init=exact[:k], n_init=1, algorithm="lloyd", max_iter=300).fit(exact)
        assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)


def test_weights_count_as_repetitions():
    x, times = blobs(400, 5, 4, dtype=np.float64), np.random.default_rng(1).integers(0, 4, size=400)
    start = x[:4]
    weighted = KMeans(4, init=start, normalize=False).fit(x, sample_weight=times)
    repeated = KMeans(4, init=start, normalize=False, tol=0).fit(np.repeat(x, times, axis=0))
    theirs = cluster.KMeans(4, init=start, n_init=1, algorithm="lloyd").fit(x, sample_weight=times)
    assert weighted.inertia_ == pytest.approx(theirs.inertia_, rel=1e-9)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-3)
    assert weighted.score(x, sample_weight=times) == pytest.approx(-weighted.inertia_, rel=1e-12)


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


def test_transform_and_score():
    x = blobs(100, 5, 3)
    model = KMeans(3, random_state=0).fit(x)
    distances = model.transform(x)
    unit = rows_of_length_one(x.astype(np.float64))
    np.testing.assert_allclose(distances, np.linalg.norm(unit[:, None] - model.cluster_centers_, axis=-1), atol=1e-6)
    np.testing.assert_array_equal(distances.argmin(1), model.labels_)
    assert model.score(x) == pytest.approx(-model.inertia_, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "x", "said"),
    [
        ({"n_clusters": 5}, np.zeros((4, 2)), "fit: x must have at least n_clusters = 5 rows, got 4"),
        ({"n_clusters": 0}, np.zeros((4, 2)), "n_clusters must be a whole number of at least 1, got 0"),
        ({"n_clusters": 2.0}, np.zeros((4, 2)), "n_clusters must be a whole number"),
        ({"n_clusters": True}, np.zeros((4, 2)), "n_clusters must be a whole number"),
        ({"n_init": 0}, np.zeros((9, 2)), "n_init must be"),
        ({"tol": None}, np.zeros((9, 2)), "fit: tol must be a number, got None"),
        ({"normalize": "yes"}, np.zeros((9, 2)), "fit: normalize must be True or False, got 'yes'"),
        ({"random_state": -1}, np.zeros((9, 2)), "fit: random_state must be a whole number from 0, .*, got -1"),
        (
            {"n_clusters": 2},
            sparse.csr_array(np.eye(3)),
            "fit: x must be dense, got a sparse csr_array",
        ),
        ({"n_clusters": 2}, torch.eye(3).to_sparse(), "fit: x must be dense, got a sparse_coo tensor"),
        ({"n_clusters": 2}, torch.zeros(9, 2, device="meta"), "fit: x must hold numbers, got a meta tensor"),
        ({"n_clusters": 2}, [[1, 2], [3]], "fit: x must have rows of one length"),
        ({"n_clusters": 2}, None, "fit: x must be a NumPy, CuPy or torch array, got None"),
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


def test_in_a_pipeline_of_scikit_learn():
    x = blobs()
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), KMeans(5, init="k-means||", random_state=0))
    labels = model.set_params(kmeans__n_clusters=7).fit_predict(x)
    scaled = preprocessing.StandardScaler().fit_transform(x)
    alone = KMeans(7, init="k-means||", random_state=0).fit(scaled)
    np.testing.assert_array_equal(labels, alone.labels_)
    np.testing.assert_array_equal(model.predict(x), labels)
    assert model.transform(x).shape == (len(x), 7)
    assert base.is_clusterer(model)
    assert base.is_clusterer(alone)
    assert not base.is_regressor(alone)
    start = scaled[:3].copy()
    for made in (KMeans(3, init=start, tol=0.5, batch_size=100), alone):
        copy = base.clone(made)
        assert type(copy) is KMeans
        assert not hasattr(copy, "cluster_centers_")
        assert repr(copy) == repr(made)
    np.testing.assert_array_equal(base.clone(KMeans(3, init=start)).init, start)
    search = model_selection.GridSearchCV(KMeans(random_state=0), {"n_clusters": [2, 7]}, cv=2).fit(x)
    assert search.best_params_ == {"n_clusters": 7}


def test_weighted_inertia_does_not_depend_on_the_number_of_threads():
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(200_000, 3)), random.random(200_000)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = KMeans(4, init="k-means||", random_state=0, max_iter=3).fit(x, sample_weight=weight)
            found.add((model.inertia_, model.cluster_centers_.tobytes()))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


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
