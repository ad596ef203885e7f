from __future__ import annotations

import numpy as np
import pytest

from hubert_ecg.config import UserError
from hubert_ecg.train.records import data_key, hold_out, label_subset, positive_weights, split_for_pretraining


class FakeStore:
    """As much of a store as the splits look at."""

    dataset, sampling_rate_hz, compat, path = "toy", 100.0, "corrected", "toy"

    def __init__(self, patients, folds=None, tasks=()):
        self.columns = {"patient_id": patients, "record_id": [f"r{i}" for i in range(len(patients))]}
        self.num_samples = np.full(len(patients), 1000)
        self.folds = np.asarray(folds if folds is not None else np.ones(len(patients), dtype=int))
        self.tasks = tasks

    def __len__(self):
        return len(self.num_samples)

    def column(self, name):
        return np.array(self.columns[name], dtype=object)

    def split(self, name):
        masks = {"train": self.folds < 9, "validation": self.folds == 9, "all": self.folds > 0}
        return np.flatnonzero(masks[name])


def test_a_labelled_set_keeps_its_folds():
    store = FakeStore([None] * 20, folds=np.r_[np.repeat(np.arange(1, 11), 2)], tasks=("all",))
    train, validation, news = split_for_pretraining(store, 0.05, 0)
    assert train.tolist() == list(range(16))
    assert validation.tolist() == [16, 17]
    assert "16 records in folds 1-8" in news


def test_recordings_without_labels_are_all_used():
    store = FakeStore([None] * 40, folds=np.repeat(np.arange(1, 11), 4))
    train, validation, news = split_for_pretraining(store, 0.1, 3)
    assert sorted([*train, *validation]) == list(range(40))
    assert len(validation) == 4
    assert "4 drawn by seed 3" in news
    again = split_for_pretraining(store, 0.1, 3)
    assert again[0].tolist() == train.tolist()
    assert split_for_pretraining(store, 0.1, 4)[1].tolist() != validation.tolist()


def test_a_labelled_set_without_validation_records_never_touches_its_test_records():
    store = FakeStore([None] * 10, folds=[1, 1, 1, 2, 2, 2, 3, 3, 10, 10], tasks=("all",))
    train, validation, _ = split_for_pretraining(store, 0.2, 0)
    assert sorted([*train, *validation]) == list(range(8))
    assert len(validation) == 2


def test_one_record_is_too_few():
    with pytest.raises(UserError, match="at least 2 records, got 1"):
        split_for_pretraining(FakeStore([None]), 0.05, 0)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_held_out_patients_are_whole(share):
    patients = [f"p{i // 3}" for i in range(30)]
    store = FakeStore(patients)
    pool = np.arange(2, 30)
    left, held = hold_out(store, pool, share, seed=1)
    assert sorted([*left, *held]) == pool.tolist()
    assert not {patients[i] for i in left} & {patients[i] for i in held}
    assert len(left)
    assert len(held)
    if share == 0.3:
        assert 6 <= len(held) <= 9


def test_one_patient_cannot_be_divided():
    with pytest.raises(UserError, match="second patient"):
        hold_out(FakeStore(["p"] * 5), np.arange(5), 0.2, 0)


def test_a_subset_has_a_positive_of_every_label():
    rng = np.random.default_rng(0)
    targets = (rng.random((1000, 6)) < [0.5, 0.2, 0.05, 0.01, 0.004, 0.0]).astype(np.float32)
    targets[7, 4] = 1
    kept = label_subset(targets, 0.1, seed=2)
    assert len(kept) == 100
    assert len(set(kept)) == 100
    assert (targets[kept].sum(0)[:5] >= 1).all()
    share = targets[kept].mean(0)[:2]
    np.testing.assert_allclose(share, targets.mean(0)[:2], atol=0.08)
    assert label_subset(targets, 0.1, seed=2).tolist() == kept.tolist()
    assert label_subset(targets, 0.1, seed=3).tolist() != kept.tolist()


def test_the_rarest_labels_come_first_when_the_share_is_too_small_for_all():
    targets = np.eye(10, dtype=np.float32).repeat(np.arange(1, 11), axis=0)
    kept = label_subset(targets, 3 / len(targets), seed=0)
    assert targets[kept].argmax(1).tolist() == [0, 1, 2]


def test_shares_out_of_range_and_whole():
    assert label_subset(np.ones((5, 1)), 1.0, 0).tolist() == [0, 1, 2, 3, 4]
    assert len(label_subset(np.zeros((5, 1)), 1e-9, 0)) == 1
    for share in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="label_share must be above 0"):
            label_subset(np.ones((5, 1)), share, 0)


def test_weights_follow_the_order_of_the_classes():
    targets = np.zeros((10, 4), dtype=np.float32)
    targets[:2, 0] = 1
    targets[:5, 1] = 1
    targets[:, 3] = 1
    assert positive_weights(targets).tolist() == [4.0, 1.0, 1.0, 1.0]
    assert positive_weights(targets).dtype == np.float32


def test_the_key_knows_records_and_their_order_but_not_their_folder():
    a, b = FakeStore([None] * 6), FakeStore([None] * 6)
    b.path = "elsewhere"
    train, validation = np.arange(4), np.arange(4, 6)
    assert data_key(a, train, validation) == data_key(b, train, validation)
    assert data_key(a, train, validation) != data_key(a, validation, train)
    assert data_key(a, np.arange(6), np.arange(0)) != data_key(a, train, validation)
    b.sampling_rate_hz = 50.0
    assert data_key(b, train, validation) != data_key(a, train, validation)
