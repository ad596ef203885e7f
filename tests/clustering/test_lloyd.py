"""Iterations, mini-batches, and clusters that run empty."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn import cluster

from hubert_ecg import KMeans
from hubert_ecg.clustering import lloyd, points

from .toy import blobs


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


def test_progress_is_told_the_falling_inertia():
    x, told = blobs(), []
    model = KMeans(8, random_state=0).fit(x, progress=lambda iteration, inertia: told.append((iteration, inertia)))
    assert [iteration for iteration, _ in told] == list(range(1, model.n_iter_ + 1))
    assert all(later <= earlier * (1 + 1e-9) for (_, earlier), (_, later) in itertools.pairwise(told))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_inertia_told_is_that_of_a_second_pass(offset, weighted):
    x, told = blobs(2000, 5, 8, dtype=np.float64) + offset, []
    weight = np.random.default_rng(0).uniform(0, 3, size=len(x)) if weighted else np.ones(len(x))
    start = x[:10]
    KMeans(10, init=start, normalize=False).fit(
        x, sample_weight=weight if weighted else None, progress=lambda iteration, inertia: told.append(inertia)
    )
    assert told[0] == pytest.approx((weight * ((x[:, None] - start) ** 2).sum(-1).min(1)).sum(), rel=1e-9)


def test_the_variance_is_that_of_float64(monkeypatch):
    monkeypatch.setitem(points._CHUNK, "cpu", 1000)
    x = blobs(1003, 4, dtype=np.float64) * [1, 1e-3, 1e3, 0] + [0, 1e6, -5, 3]
    given = points.Points("fit", x, normalize=False)
    assert lloyd.mean_variance(given) == pytest.approx(x.var(0).mean(), rel=1e-12)


@pytest.mark.parametrize("batch_size", [None, 64])
def test_interrupted_it_is_as_before(batch_size):
    x = blobs(500)
    model = KMeans(5, batch_size=batch_size, tol=0, random_state=0)

    def interrupt(iteration, inertia):
        if iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(x, progress=interrupt)
    assert not [name for name in vars(model) if name.endswith("_")]
    before = dict(vars(model.fit(x)))
    with pytest.raises(KeyboardInterrupt):
        model.fit(x[:200], progress=interrupt)
    assert vars(model) == before


def test_mini_batches_are_each_row_once_in_an_iteration(monkeypatch):
    x, seen = blobs(1003, 3), []
    step = lloyd.batch_step
    monkeypatch.setattr(lloyd, "batch_step", lambda batch, *rest: seen.append(batch.x.numpy()) or step(batch, *rest))
    KMeans(4, normalize=False, batch_size=100, max_iter=2, tol=0, random_state=0).fit(x)
    assert [len(rows) for rows in seen] == [*([100] * 10), 3] * 2
    first, second = np.concatenate(seen[:11]), np.concatenate(seen[11:])
    for rows in (first, second):
        np.testing.assert_array_equal(rows[np.lexsort(rows.T)], x[np.lexsort(x.T)])
    assert not np.array_equal(first, second)


def test_sizes_count_the_points_and_weights_what_was_given():
    x = blobs(900, 3, 3)
    for batch_size, times in ((None, 1), (100, 2)):
        model = KMeans(3, batch_size=batch_size, max_iter=2, tol=0, random_state=0).fit(x)
        np.testing.assert_array_equal(model.cluster_sizes_, np.bincount(model.labels_, minlength=3))
        assert model.cluster_weights_.sum() == 900 * times


def test_verbose_says_each_iteration(capsys):
    model = KMeans(5, n_init=2, verbose=True, random_state=0, max_iter=3).fit(blobs(300))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("k-means: start 1 of 2, iteration 1 of 3, inertia ")
    assert any(line.startswith("k-means: start 2 of 2, iteration 1 of 3") for line in lines)
    assert repr(model) == "KMeans(n_clusters=5, n_init=2, max_iter=3, random_state=0, verbose=True)"
