"""First centres."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import cluster

from hubert_ecg import KMeans
from hubert_ecg.clustering import points, starts

from .toy import blobs


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


def test_random_starts_are_different_points(monkeypatch):
    monkeypatch.setattr(starts, "_DRAWN", 70)
    x = blobs(500)
    given = points.Points("fit", x, normalize=False)
    start = starts.draw_start(given, 40, "random", np.random.default_rng(0)).numpy()
    assert {tuple(row) for row in start} < {tuple(row) for row in x}
    places = draw(x, 40)
    assert len(np.unique(places)) == 40
    assert (np.diff(places) > 0).all()
    np.testing.assert_array_equal(draw(x, 500), np.arange(500))


def draw(x, how_many, seed=0, **options):
    given = points.Points("fit", x, normalize=False, **options)
    return starts.draw_rows(given, how_many, np.random.default_rng(seed))


@pytest.mark.parametrize("how_many", [1, 3])
def test_rows_are_drawn_by_weight(how_many):
    weight = np.array([0.0, 1.0, 2.0, 3.0, 0.0, 6.0])
    drawn = [draw(np.zeros((6, 1)), how_many, seed, weight=weight) for seed in range(1500)]
    times = np.bincount(np.concatenate(drawn), minlength=6) / 1500
    assert times[[0, 4]].sum() == 0
    if how_many == 1:
        np.testing.assert_allclose(times, weight / 12, atol=0.04)
    else:
        # Without replacement: 1 - the chance that it is the one of the four that is left.
        assert times.sum() == pytest.approx(3)
        assert (np.diff(times[[1, 2, 3, 5]]) > 0).all()
    # Rows without weight are taken last, and only where there are no others.
    np.testing.assert_array_equal(draw(np.zeros((6, 1)), 5, weight=weight)[1:], [1, 2, 3, 5])


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 1001])
def test_the_random_number_of_a_row_depends_on_its_place_alone(first):
    whole = starts.row_uniforms(7, 0, 2000)
    np.testing.assert_array_equal(starts.row_uniforms(7, first, 50), whole[first : first + 50])
    assert not np.array_equal(starts.row_uniforms(8, 0, 2000), whole)
    assert abs(whole.mean() - 0.5) < 0.03


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_shuffled_is_a_permutation(n):
    whole = starts.shuffled(5, n, 0, n)
    np.testing.assert_array_equal(np.sort(whole), np.arange(n))
    np.testing.assert_array_equal(starts.shuffled(5, n, n // 3, n), whole[n // 3 :])
    if n > 100:
        assert not np.array_equal(whole, starts.shuffled(6, n, 0, n))
        assert abs(np.corrcoef(whole, np.arange(n))[0, 1]) < 0.15
        # Each place of the first batch is equally likely: a chi-square of 10 bins, over many seeds.
        first = np.concatenate([starts.shuffled(seed, n, 0, 20) for seed in range(200)])
        expected = len(first) / 10
        assert ((np.histogram(first, 10, (0, n))[0] - expected) ** 2 / expected).sum() < 28


def test_shuffled_of_a_thousand_million():
    some = starts.shuffled(0, 10**9, 10**8, 10**8 + 1000)
    assert len(np.unique(some)) == 1000
    assert 0 <= some.min() < some.max() < 10**9


def test_k_means_parallel_draws_about_k_in_a_round():
    x = blobs(5000, 6, 30, spread=0.5)
    given = points.Points("fit", x, normalize=False)
    far = given.take(np.array([0])).x
    drawn = [len(starts._oversample(given, far, 50, seed)) for seed in range(20)]
    assert 45 < np.mean(drawn) < 55
    # The chance of a row is K d^2 / cost.
    distances = ((x - x[0]).astype(np.float64) ** 2).sum(1)
    times = np.zeros(len(x))
    for seed in range(300):
        u = starts.row_uniforms(seed, 0, len(x))
        rows = starts._oversample(given, far, 50, seed)
        np.testing.assert_array_equal(rows, x[u < 50 * distances / distances.sum()])
        times += u < 50 * distances / distances.sum()
    assert np.corrcoef(times, distances)[0, 1] > 0.5


@pytest.mark.parametrize("init", ["k-means||", "random", "k-means++"])
def test_starts_of_few_different_points(init):
    x = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    model = KMeans(5, init=init, normalize=False, random_state=0).fit(x)
    assert model.inertia_ == pytest.approx(0, abs=1e-12)
    assert KMeans(3, init=init, random_state=0).fit(np.ones((5, 2))).inertia_ == pytest.approx(0, abs=1e-12)
    as_many = KMeans(4, init=init, normalize=False, random_state=0).fit(blobs(4))
    assert sorted(as_many.labels_) == [0, 1, 2, 3]
    # All weight on one point.
    weight = np.array([0, 0, 2.0, 0])
    assert KMeans(3, init=init, random_state=0).fit(blobs(4), sample_weight=weight).inertia_ == pytest.approx(0)


def test_given_centres_make_one_start():
    x, told = blobs(300), []
    model = KMeans(4, init=x[:4], n_init=5, normalize=False).fit(x, progress=lambda *news: told.append(news))
    assert len(told) == model.n_iter_
