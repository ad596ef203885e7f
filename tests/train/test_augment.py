from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hubert_ecg.config import UserError
from hubert_ecg.data import Batch
from hubert_ecg.signal import LEADS
from hubert_ecg.train.augment import AUGMENTATIONS, Augment

RATE_HZ = 100.0
FIRST, SECOND, THIRD, AVR, AVL, AVF = range(6)
TIMED = [name for name in AUGMENTATIONS if name != "drop"]


def make_batch(num_records=6, num_samples=500, records=None, silent=False):
    """Twelve leads of nine electrodes' sines; the second record is short, the third has no V1 and V2."""
    records = torch.arange(num_records) if records is None else torch.tensor(records, dtype=torch.int64)
    time = torch.arange(num_samples) / RATE_HZ
    electrode = torch.arange(9)[:, None]
    rate = 1 + records[:, None, None] / 7
    potential = (0.4 * torch.sin(2 * torch.pi * rate * time + electrode) + 0.1 * electrode).float()
    right, left, foot = potential[:, 0], potential[:, 1], potential[:, 2]
    first, second = left - right, foot - right
    limb = [first, second, second - first, -(first + second) / 2, first - second / 2, second - first / 2]
    ecg = torch.cat((torch.stack(limb, 1), potential[:, 3:]), 1)
    lengths = torch.where(records == 1, 300, num_samples)
    present = torch.ones(len(records), len(LEADS), dtype=torch.bool)
    present[records == 2, 6:8] = False
    there = (torch.arange(num_samples) < lengths[:, None, None]) & present[:, :, None]
    ecg = torch.where(there, ecg * (not silent), 0)
    return Batch(ecg, lengths, records, present, ecg, num_global=len(records))


def einthoven(ecg):
    """How far the limb leads are from Einthoven's and Goldberger's equations."""
    first, second = ecg[:, FIRST], ecg[:, SECOND]
    wanted = {THIRD: second - first, AVR: -(first + second) / 2, AVL: first - second / 2, AVF: second - first / 2}
    return max((ecg[:, lead] - value).abs().max().item() for lead, value in wanted.items())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_changes_what_is_there_and_nothing_else(name):
    batch = make_batch()
    before = batch.ecg.clone()
    new = Augment(name, 0, RATE_HZ)(batch, step=3)
    assert torch.equal(batch.ecg, before)
    assert new.ecg.dtype == torch.float32
    assert torch.isfinite(new.ecg).all()
    assert all((new.ecg[k] != before[k]).any() for k in range(6)) or name == "drop"
    assert (new.ecg != before).any()
    assert not new.ecg[1, :, 300:].any()
    assert not new.ecg[2, 6:8].any()
    assert new.lengths is batch.lengths
    assert new.index is batch.index
    assert not (new.present & ~batch.present).any()
    assert torch.equal(new.present, batch.present) == (name != "drop")


@pytest.mark.parametrize("name", TIMED)
def test_limb_leads_still_agree(name):
    batch = make_batch()
    assert einthoven(batch.ecg) < 1e-6
    assert einthoven(Augment(name, 0, RATE_HZ)(batch, 0).ecg) < 1e-5


def test_a_record_is_changed_alike_in_any_batch():
    augment = Augment("all", 5, RATE_HZ)
    whole = augment(make_batch(), 7)
    for chosen in ([4], [2, 1], [5, 3, 1, 0, 2]):
        part = augment(make_batch(records=chosen), 7)
        assert torch.equal(part.ecg, whole.ecg[chosen])
        assert torch.equal(part.present, whole.present[chosen])


def test_seed_step_and_record_decide():
    batch = make_batch(4, records=[8, 8, 9, 1 << 38])
    new = Augment("noise", 0, RATE_HZ)(batch, 0).ecg - batch.ecg
    assert torch.allclose(new[0], new[1], atol=1e-6)
    assert not torch.allclose(new[0], new[2], atol=1e-3)
    assert not torch.allclose(new[0], new[3], atol=1e-3)
    for seed, step in ((1, 0), (0, 1)):
        assert not torch.allclose(Augment("noise", seed, RATE_HZ)(batch, step).ecg - batch.ecg, new, atol=1e-3)


def test_scale_is_one_factor_for_a_record():
    batch = make_batch(400)
    new = Augment("scale", 0, RATE_HZ)(batch, 0).ecg
    factor = (new.abs().amax((1, 2)) / batch.ecg.abs().amax((1, 2)))[:, None, None]
    torch.testing.assert_close(new, batch.ecg * factor)
    assert 0.8 <= factor.min() < 0.85
    assert 1.2 < factor.max() <= 1.2501
    assert abs(factor.log().mean()) < 0.02


def test_noise_is_white_and_bounded():
    batch = make_batch(200, silent=True, records=list(range(10, 210)))
    noise = Augment("noise", 0, RATE_HZ)(batch, 0).ecg
    spread = noise[:, SECOND].std(1)
    assert 0.001 < spread.mean() < 0.03
    assert spread.max() < 0.033
    spectrum = torch.fft.rfft(noise[:, SECOND] / spread[:, None]).abs().square().mean(0)[1:-1]
    low, high = spectrum[:100].mean(), spectrum[-100:].mean()
    assert abs(low / high - 1) < 0.1
    limb, chest = noise[:, :3].std(), noise[:, 6:].std()
    assert chest / limb == pytest.approx((4 / 3 / 2) ** 0.5, rel=0.05)


def test_wander_is_slow_and_bounded():
    batch = make_batch(100, num_samples=4000, silent=True, records=list(range(10, 110)))
    wander = Augment("wander", 0, RATE_HZ)(batch, 0).ecg
    assert 0.02 < wander.abs().max() <= 0.1 * 2 * 2**0.5
    power = torch.fft.rfft(wander * torch.hann_window(4000), dim=2).abs().square().mean((0, 1))
    hz = torch.fft.rfftfreq(4000, 1 / RATE_HZ)
    assert power[hz > 0.7].sum() < 1e-4 * power.sum()
    assert power[(hz > 0.04) & (hz < 0.6)].sum() > 0.5 * power.sum()


def test_warp_keeps_ends_and_values():
    """A ramp shows the time map itself: it rises by 0.8 to 1.2 a sample, and ends where it ended."""
    batch = make_batch(50, records=[1, *range(10, 59)])
    time = torch.arange(500.0)
    ramp = torch.where(time < batch.lengths[:, None, None], time, 0).expand(50, 12, 500)
    batch = dataclasses.replace(batch, ecg=ramp.contiguous())
    new = Augment("warp", 0, RATE_HZ)(batch, 0).ecg
    for row, length in zip(new, batch.lengths.tolist(), strict=True):
        assert row[0, 0] == 0
        assert row[0, length - 1] == pytest.approx(length - 1, abs=1e-2)
        # Cubic convolution is exact on a ramp, but not where it repeats the samples at the ends.
        slope = np.diff(row[0, 3 : length - 3].numpy())
        assert slope.min() > 0.79
        assert slope.max() < 1.21
    assert (new - batch.ecg).abs().amax((1, 2)).min() > 0.05
    assert (new - batch.ecg).abs().max() > 5


def test_drop_keeps_a_lead_and_says_which():
    batch = make_batch(1000, records=list(range(10, 1010)))
    new = Augment("drop", 0, RATE_HZ)(batch, 0)
    assert not new.ecg[~new.present].any()
    torch.testing.assert_close(new.ecg[new.present], batch.ecg[new.present])
    kept = new.present.sum(1)
    assert kept.min() >= 1
    assert abs(kept.float().mean() / 12 - 0.75) < 0.02
    assert new.present.float().mean(0).min() > 0.7


def test_drop_leaves_the_only_lead():
    batch = make_batch(300, records=list(range(10, 310)))
    batch.present[:] = False
    batch.present[:, SECOND] = True
    new = Augment("drop", 0, RATE_HZ)(batch, 0)
    assert torch.equal(new.present, batch.present)


def test_records_of_one_sample_and_empty_batches():
    batch = make_batch(2)
    short = dataclasses.replace(batch, lengths=torch.tensor([1, 2]))
    new = Augment("all", 0, RATE_HZ)(short, 0)
    assert torch.isfinite(new.ecg).all()
    assert not new.ecg[0, :, 1:].any()
    empty = make_batch(0, records=[])
    assert Augment("all", 0, RATE_HZ)(empty, 0).ecg.shape == (0, 12, 500)


def test_names():
    assert Augment("all", 0, RATE_HZ).names == tuple(AUGMENTATIONS)
    assert Augment("noise, warp", 0, RATE_HZ).names == ("warp", "noise")
    with pytest.raises(UserError, match=r"--augment must be of warp, scale, .*, or all, got 'scale,flip'"):
        Augment("scale,flip", 0, RATE_HZ)
