"""The instruments of the other tests can fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hubert_ecg.testing import assert_close, assert_same_clusters, poisoned_memory, strided, tiled_store


def test_assert_close_names_the_tensor_and_its_worst_element():
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    actual = expected.clone()
    actual[1, 0] += 0.5
    with pytest.raises(
        AssertionError, match=r"^gradient\[1\]\[1, 0\]: got 3.5, expected 3.0 .* 1 of 4 elements are off$"
    ):
        assert_close((expected, actual), (expected, expected), rtol=0, atol=0.4, name="gradient")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_assert_close_tells_what_is_no_number_from_what_is(value):
    x, y = torch.tensor([value, 1.0]), torch.tensor([0.0, 1.0])
    assert_close(x, x.clone(), rtol=0, atol=0)
    for actual, expected in ((x, y), (y, x)):
        with pytest.raises(AssertionError, match=r"^output\[0\]"):
            assert_close(actual, expected, rtol=1, atol=1e30)


def test_assert_close_takes_integers_at_their_word():
    x = torch.tensor([2**53, 7])
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_close(x + torch.tensor([0, 1]), x, rtol=1, atol=1)


def test_poisoned_memory_is_poisoned():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert (torch.ones(3, dtype=torch.int64).new_empty(1000) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_strided_is_equal_and_apart():
    x = torch.arange(6.0).reshape(2, 3)
    assert strided(x).equal(x)
    assert not strided(x).is_contiguous()


def test_assert_same_clusters_lets_ties_pass_alone():
    centroids = torch.tensor([[0.0], [1.0], [3.0]])
    points = torch.tensor([[0.2], [0.5001], [0.5001], [2.9]]).double()
    expected = torch.tensor([0, 1, 1, 2])
    rounding = torch.full((4,), 2e-4)
    assert_same_clusters(torch.tensor([0, 0, 1, 2]), expected, points, centroids, rounding)
    # Beyond rounding, never so near, and as far as the others but for the nearest.
    for wrong, at in [([1, 1, 1, 2], 0), ([0, 2, 1, 2], 1), ([0, 1, 1, 1], 3)]:
        with pytest.raises(AssertionError, match=rf"^labels\[{at}\]: got {wrong[at]}, expected {int(expected[at])}; "):
            assert_same_clusters(torch.tensor(wrong), expected, points, centroids, rounding)
    with pytest.raises(AssertionError, match=r"^labels\[1\]"):
        assert_same_clusters(torch.tensor([0, 0, 1, 2]), expected, points, centroids, rounding / 4)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_clusters(expected[:3], expected, points, centroids, rounding)


def test_a_tiled_store_repeats_a_few_records(tmp_path):
    store = tiled_store(tmp_path / "s", 5, 2.0, num_tiled=2)
    assert store.column("record_id").tolist() == [f"{i:08d}" for i in range(5)]
    assert len(set(store.column("patient_id"))) == 5
    assert store.tasks == ()
    signals = [record.signal for record in store]
    assert signals[0].shape == (12, 200)
    for i in range(5):
        assert np.array_equal(signals[i], signals[i % 2])
    assert not np.array_equal(signals[0], signals[1])
