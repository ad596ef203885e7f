"""Augmentation of training crops, in batches, on their device.

Each one is a function of (seed, step, record) alone: the same for any batch the record is in, and after resuming.

- ``scale``: all leads of a record times one factor, 0.8 to 1.25 (Um et al., ICMI 2017: standard deviation 0.1).
- ``wander``: base line of each electrode, three sines of 0.05 to 0.5 Hz (breathing and movement; Friesen et al., IEEE
  Transactions on Biomedical Engineering 1990), together up to 0.1.
- ``noise``: white noise of each electrode, standard deviation up to 0.03 (Iwana & Uchida, PLOS ONE 2021: 0.03).
- ``warp``: time runs up to 20 % faster or slower within a crop, whose ends stay (Um et al., Iwana & Uchida: 0.2).
- ``drop``: each lead is lost with a chance of up to 0.5, drawn for each record (Oh et al., CHIL 2022: 0.5); one stays.

Amplitudes are in units of model input, where a typical R peak is 0.5. Wander and noise arise at nine electrodes: they
obey Einthoven's and Goldberger's equations, as leads do. What a crop does not have stays zero: samples after its end
and absent leads. Random crops are the loader's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hubert_ecg import data
from hubert_ecg.config import UserError
from hubert_ecg.ops._dropout import bits

_SCALE = 1.25
_WANDER, _WANDER_HZ, _NUM_WAVES = 0.1, (0.05, 0.5), 3
_NOISE = 0.03
_WARP, _NUM_BENDS = 0.2, 3
_DROP = 0.5
_NUM_ELECTRODES = 9
# Random numbers that a record may draw of one kind in one step.
_DRAWS = 1 << 24


class Augment:
    """Changes training batches at random.

    Args:
        names: Which augmentations, split by commas; "all" are all of them.
        seed: Seed of the run.
        rate_hz: Sampling rate of the batches.

    Raises:
        UserError: A name is unknown.
    """

    def __init__(self, names: str, seed: int, rate_hz: float) -> None:
        self.names, self.seed, self.rate_hz = augmentations(names), seed, rate_hz

    def __call__(self, batch: data.Batch, step: int) -> data.Batch:
        """The batch, changed; ``ecg`` and ``present`` are new tensors, the others are those of the batch.

        Args:
            batch: ``ecg`` may be on any device.
            step: Optimiser step, in which a record occurs once.
        """
        ecg, lengths, present = batch.ecg, batch.lengths.to(batch.ecg.device), batch.present
        for name in self.names:
            draw = _Draw(f"{self.seed} {step} {name}", batch.index)
            if name == "drop":
                present = present & _kept(present, draw)
            else:
                ecg = AUGMENTATIONS[name](ecg, lengths, self.rate_hz, draw)
        time = torch.arange(ecg.shape[-1], device=ecg.device)
        there = (time < lengths[:, None, None]) & present.to(ecg.device)[:, :, None]
        return dataclasses.replace(batch, ecg=torch.where(there, ecg, 0), present=present)


def augmentations(names: str | None) -> tuple[str, ...]:
    """The names in the order in which they are applied.

    >>> augmentations("drop, scale"), augmentations(None)
    (('scale', 'drop'), ())
    """
    wanted = [name.strip() for name in names.split(",")] if names is not None else []
    if any(name not in (*AUGMENTATIONS, "all") for name in wanted):
        raise UserError(f"--augment must be of {', '.join(AUGMENTATIONS)}, split by commas, or all, got {names!r}")
    return tuple(name for name in AUGMENTATIONS if name in wanted or "all" in wanted)


class _Draw:
    """Uniform and normal numbers of each record of a batch, functions of a key and the record."""

    def __init__(self, key: str, record: Tensor) -> None:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        self.seed, self.record = int.from_bytes(digest, "little", signed=True), record
        self._used = 0

    def uniform(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """``[B, *shape] float32``, above 0 and at most 1."""
        size = math.prod(shape)
        place = torch.arange(self._used, self._used + size, device=device)
        self._used += size
        index = self.record.to(device)[:, None] * _DRAWS + place
        drawn = bits(torch.tensor(self.seed, device=device), index)
        # 24 bits are what float32 holds exactly.
        return ((drawn >> 8) + 1).float().mul_(2.0**-24).view(len(index), *shape)

    def between(self, low: float, high: float, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return low + (high - low) * self.uniform(*shape, device=device)

    def normal(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """``[B, *shape] float32`` of mean 0 and variance 1 (Box and Muller 1958)."""
        radius = (-2 * self.uniform(*shape, device=device).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(*shape, device=device)).cos()


def _scale(ecg: Tensor, lengths: Tensor, rate_hz: float, draw: _Draw) -> Tensor:
    return ecg * (math.log(_SCALE) * draw.between(-1, 1, 1, 1, device=ecg.device)).exp()


def _wander(ecg: Tensor, lengths: Tensor, rate_hz: float, draw: _Draw) -> Tensor:
    shape, device = (_NUM_ELECTRODES, _NUM_WAVES, 1), ecg.device
    low, high = (math.log(hz) for hz in _WANDER_HZ)
    turns = draw.between(low, high, *shape, device=device).exp() / rate_hz
    time = torch.arange(ecg.shape[-1], device=device)
    waves = (2 * math.pi * (turns * time + draw.uniform(*shape, device=device))).sin()
    height = draw.uniform(1, 1, device=device) * (_WANDER / _NUM_WAVES)
    return ecg + height * _leads(waves.sum(2))


def _noise(ecg: Tensor, lengths: Tensor, rate_hz: float, draw: _Draw) -> Tensor:
    height = _NOISE * draw.uniform(1, 1, device=ecg.device)
    return ecg + height * _leads(draw.normal(_NUM_ELECTRODES, ecg.shape[-1], device=ecg.device))


def _warp(ecg: Tensor, lengths: Tensor, rate_hz: float, draw: _Draw) -> Tensor:
    """Reads sample ``t`` of ``n`` at ``t + n * sum_k a_k sin(pi k t / n)``, whose slope stays within 1 -+ 0.2."""
    device, last = ecg.device, (lengths - 1).clamp_min(1)[:, None].float()
    order = torch.arange(1, _NUM_BENDS + 1, device=device)
    bends = draw.between(-_WARP, _WARP, _NUM_BENDS, device=device) / (math.pi * order * _NUM_BENDS)
    time = torch.arange(ecg.shape[-1], device=device)
    share = time / last
    shift = (bends[:, :, None] * (math.pi * order[:, None] * share[:, None]).sin()).sum(1)
    place = torch.minimum((time + last * shift).clamp_min(0), last)
    # Cubic convolution of four samples (Keys 1981, a = -1/2): between two of them, a line would blunt QRS complexes.
    start = place.floor()
    x = (place - start)[:, None]
    weights = (
        ((-0.5 * x + 1) * x - 0.5) * x,
        (1.5 * x - 2.5) * x * x + 1,
        ((-1.5 * x + 2) * x + 0.5) * x,
        (0.5 * x - 0.5) * x * x,
    )
    ends = last.long()
    warped = torch.zeros_like(ecg)
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        near = torch.minimum((start.long() + offset).clamp_min(0), ends)
        warped += weight * ecg.gather(2, near[:, None].expand(ecg.shape))
    return warped


def _kept(present: Tensor, draw: _Draw) -> Tensor:
    """Which leads stay, ``[B, 12] bool`` on the CPU, where they decide shapes."""
    chance = _DROP * draw.uniform(1)
    luck = draw.uniform(present.shape[1]).masked_fill(~present, 0)
    return (luck > chance) | (luck == luck.amax(1, keepdim=True))


def _leads(electrodes: Tensor) -> Tensor:
    """The twelve leads ``[B, 12, T]`` of the potentials of RA, LA, LL and C1 to C6 ``[B, 9, T]``, over the square root
    of 2: a bipolar lead of equal and independent potentials is as large as one of them."""
    right, left, foot = electrodes[:, :3].unbind(1)
    # Rather than a matrix product, whose rounding may depend on the size of the batch.
    first, second, third = left - right, foot - right, foot - left
    limb = [first, second, third, -(first + second) / 2, (first - third) / 2, (second + third) / 2]
    chest = electrodes[:, 3:] - ((right + left + foot) / 3)[:, None]
    return torch.cat((torch.stack(limb, 1), chest), 1) * math.sqrt(0.5)


# In the order in which they are applied; the last only says which leads are there.
AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor, float, _Draw], Tensor]] = {
    "warp": _warp,
    "scale": _scale,
    "wander": _wander,
    "noise": _noise,
    "drop": lambda ecg, lengths, rate_hz, draw: ecg,
}
