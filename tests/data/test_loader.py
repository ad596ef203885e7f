from __future__ import annotations

import numpy as np
import pytest
import torch

from hubert_ecg.data import Loader
from hubert_ecg.signal import decimate_flattened, decimate_leads


def epoch(loader, number=0, start=0):
    return list(loader.batches(number, start))


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        for name in ("ecg", "lengths", "index", "present"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=0, msg=name)


def test_batches_are_crops_of_the_records(store):
    loader = Loader(store, store.split("all"), 4, crop_s=5.0, crop="first")
    batches = epoch(loader)
    assert [len(batch) for batch in batches] == [4, 2]
    assert loader.num_batches == len(loader) == 2
    for batch in batches:
        for row, length, index, present in zip(batch.ecg, batch.lengths, batch.index, batch.present, strict=True):
            signal = store[int(index)].signal[:, :500]
            assert int(length) == signal.shape[1]
            np.testing.assert_array_equal(row[:, :length], signal)
            assert not row[:, length:].any()
            assert present.all()


def test_random_crops_lie_everywhere_in_a_record(store):
    loader = Loader(store, np.array([0]), 1, num_crops=400, crop_s=2.0, num_workers=0)
    starts = loader._starts(0)
    assert starts[:, 0].min() < 40
    assert 760 < starts[:, 0].max() <= 800
    np.testing.assert_array_equal(starts[:, 5], 0)
    (batch,) = epoch(loader)
    for row, start in zip(batch.ecg[:5].numpy(), starts[:5, 0], strict=True):
        np.testing.assert_array_equal(row, store[0].signal[:, start : start + 200])


def test_order_and_crops_depend_on_seed_and_epoch_alone(store):
    def loader(**options):
        return Loader(store, store.split("all"), 2, crop_s=1.0, shuffle=True, seed=3, **options)

    reference = epoch(loader(num_workers=0), 1)
    for num_workers in (1, 4):
        assert_equal(epoch(loader(num_workers=num_workers), 1), reference)
    for start in range(4):
        assert_equal(epoch(loader(), 1, start), reference[start:])
    orders = {tuple(torch.cat([batch.index for batch in epoch(loader(), number)]).tolist()) for number in range(8)}
    assert len(orders) > 4
    assert all(sorted(order) == list(range(6)) for order in orders)


def test_the_crop_of_a_record_does_not_depend_on_its_company(store):
    together = Loader(store, store.split("all"), 6, crop_s=1.0, seed=5)
    alone = Loader(store, np.array([3]), 1, crop_s=1.0, seed=5)
    for number in range(3):
        (batch,), (single,) = epoch(together, number), epoch(alone, number)
        torch.testing.assert_close(batch.ecg[3], single.ecg[0], rtol=0, atol=0)


def test_even_crops_go_from_beginning_to_end(store):
    loader = Loader(store, np.array([3, 5, 0]), 2, crop_s=5.0, crop="even", num_crops=3)
    first, second = epoch(loader)
    assert first.index.tolist() == [3, 3, 3, 5, 5, 5]
    assert second.index.tolist() == [0, 0, 0]
    for crop, start in enumerate((0, 250, 500)):
        np.testing.assert_array_equal(first.ecg[crop], store[3].signal[:, start : start + 500])
        np.testing.assert_array_equal(second.ecg[crop], store[0].signal[:, start : start + 500])
    assert first.lengths.tolist() == [500] * 3 + [140] * 3
    (once,) = epoch(Loader(store, np.array([3]), 1, crop_s=5.0, crop="even"))
    np.testing.assert_array_equal(once.ecg[0], store[3].signal[:, 250:750])


def test_published_crops_are_decimated_across_leads(published):
    (batch,) = epoch(Loader(published, np.array([0, 2]), 2, crop_s=5.0, crop="first"))
    assert batch.ecg.shape == (2, 12, 500)
    crop, _ = published.gather(np.array([0, 2]), None, 2500)
    np.testing.assert_array_equal(batch.leads, decimate_leads(crop, 5))
    torch.testing.assert_close(batch.ecg, torch.from_numpy(decimate_flattened(crop, 5)), rtol=0, atol=0)
    assert batch.lengths.tolist() == [500, 300]


def test_last_batch_and_empty_loader(store):
    assert [len(batch) for batch in epoch(Loader(store, np.arange(5), 2, drop_last=True))] == [2, 2]
    assert epoch(Loader(store, np.zeros(0, dtype=np.int64), 2)) == []
    assert epoch(Loader(store, np.arange(4), 2), start=2) == []


def test_an_abandoned_epoch_leaves_no_threads(store):
    before = torch.get_num_threads()
    batches = Loader(store, np.arange(6), 1, num_workers=2).batches(0)
    next(batches)
    batches.close()
    assert torch.get_num_threads() == before
    assert list(batches) == []


def test_signals_and_labels_move_and_what_the_host_looks_at_stays(labelled, published):
    (batch,) = epoch(Loader(labelled, np.arange(2), 2, crop="first", labels="mfcc"))
    moved = batch.to("meta")
    assert {x.device.type for x in (moved.ecg, moved.leads, moved.labels)} == {"meta"}
    assert {x.device.type for x in (moved.index, moved.lengths, moved.present)} == {"cpu"}
    # What is one tensor is copied once.
    assert moved.leads is moved.ecg
    assert moved.ecg.shape == batch.ecg.shape
    (batch,) = epoch(Loader(published, np.arange(2), 2))
    moved = batch.to("meta")
    assert moved.leads is not moved.ecg
    assert moved.labels is None


def test_batches_arrive_on_the_device(store):
    (batch,) = epoch(Loader(store, np.arange(3), 3, device="meta"))
    assert {x.device.type for x in batch.on_device()} == {"meta"}
    assert_equal(epoch(Loader(store, np.arange(6), 4, device="cpu")), epoch(Loader(store, np.arange(6), 4)))


@pytest.mark.cuda
def test_copies_to_a_gpu_are_ahead_and_whole(store):
    options = {"crop_s": 1.0, "shuffle": True, "seed": 1}
    on_cpu = Loader(store, store.split("all"), 2, **options)
    on_gpu = Loader(store, store.split("all"), 2, device="cuda", **options)
    for number in range(20):
        batches = epoch(on_gpu, number)
        assert all(x.is_cuda for batch in batches for x in batch.on_device())
        assert not any(batch.index.is_cuda for batch in batches)
        moved_back = [batch.to("cpu") for batch in batches]
        torch.cuda.synchronize()
        assert_equal(moved_back, epoch(on_cpu, number))


@pytest.mark.parametrize("num_crops", [1, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("num_ranks", "batch_size"), [(2, 1), (2, 2), (3, 1), (4, 2), (5, 1)])
def test_ranks_share_the_batches_of_one(store, num_ranks, batch_size, drop_last, num_crops):
    # Eleven reads of six records: the last batch is short, and for some numbers of ranks shorter than these.
    indices = np.arange(11) % 6
    options = {"crop_s": 1.0, "shuffle": True, "seed": 3, "drop_last": drop_last, "num_crops": num_crops}
    alone = Loader(store, indices, num_ranks * batch_size, **options)
    ranks = [Loader(store, indices, batch_size, rank=r, num_ranks=num_ranks, **options) for r in range(num_ranks)]
    assert {loader.num_batches for loader in ranks} == {alone.num_batches}
    for start in (0, 1):
        whole, parts = epoch(alone, 2, start), [epoch(loader, 2, start) for loader in ranks]
        assert len(whole) == alone.num_batches - start
        for k, batch in enumerate(whole):
            of_ranks = [batches[k] for batches in parts]
            sizes = [len(part) for part in of_ranks]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] - sizes[-1] <= num_crops
            assert {part.num_global for part in of_ranks} == {batch.num_global} == {len(batch)}
            for name in ("ecg", "lengths", "index", "present"):
                joined = torch.cat([getattr(part, name) for part in of_ranks])
                torch.testing.assert_close(joined, getattr(batch, name), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("which", ["labelled", "published"])
def test_a_rank_left_over_gets_an_empty_batch_of_the_same_kind(which, request):
    store = request.getfixturevalue(which)
    labels = store.label_sets
    loader = Loader(store, np.arange(5), 1, crop="first", rank=3, num_ranks=4, labels=labels)
    full, empty = epoch(loader)
    assert (len(full), len(empty), full.num_global, empty.num_global) == (1, 0, 4, 1)
    for name in ("ecg", "leads", "lengths", "index", "present"):
        one, other = getattr(full, name), getattr(empty, name)
        assert (one.dtype, one.shape[1:]) == (other.dtype, other.shape[1:]), name
        assert len(other) == 0
    if labels:
        assert full.labels.shape == (3, 1, 93)
        assert empty.labels.shape == (3, 0, 93)
        assert empty.labels.dtype == torch.int64


def test_batches_carry_labels_of_their_records(labelled):
    loader = Loader(labelled, labelled.split("all"), 4, crop="first", shuffle=True, labels=["mfcc", "second"])
    expected = np.concatenate([labelled.labels(name).values for name in ("mfcc", "second")])
    for batch in loader.batches(1):
        np.testing.assert_array_equal(batch.labels, expected[:, batch.index])
        assert batch.labels.dtype == torch.int64
    assert next(Loader(labelled, np.arange(2), 2).batches()).labels is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "random"}, "crop must be first with labels, got random: the labels mfcc are of the beginning"),
        ({"crop": "even"}, "crop must be first with labels, got even"),
        ({"crop": "first", "crop_s": 2.5}, "crop_s must be 5 with labels mfcc, got 2.5"),
        ({"crop": "first", "labels": "mel"}, "has no finished labels 'mel'; its labels: mfcc, second"),
    ],
)
def test_labels_of_other_crops_are_refused(labelled, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(labelled, np.arange(2), 2, **{"labels": "mfcc", **options})


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        ([6], {}, "indices must be positions below 6"),
        ([-1], {}, "indices must be positions below 6"),
        ([[0]], {}, "in one dimension"),
        ([0], {"batch_size": 0}, "batch_size and num_crops must be at least 1"),
        ([0], {"num_crops": 0}, "batch_size and num_crops must be at least 1"),
        ([0], {"crop": "last"}, "crop must be random, even, or first"),
        ([0], {"crop": "first", "num_crops": 2}, "crop must be random, even, or first"),
        ([0], {"rank": 2, "num_ranks": 2}, r"rank must be 0 to num_ranks - 1 = 1, got 2"),
        ([0], {"rank": 0, "num_ranks": 0}, r"rank must be 0 to num_ranks - 1 = -1, got 0"),
        ([0], {"crop_s": 0.001}, "crop_s must hold a sample"),
    ],
)
def test_wrong_arguments(store, indices, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(store, np.array(indices), **{"batch_size": 1, **options})
