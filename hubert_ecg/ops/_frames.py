"""Where the tokens of the model lie in a recording, and the frames that features of tokens are computed from."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

NUM_LEADS = 12
COMPATS = ("corrected", "published")


class TokenGeometry(NamedTuple):
    """How the convolutional extractor cuts 12 leads laid end to end into tokens.

    Attributes:
        stride: samples from a token to the next.
        receptive_field: token t sees the samples ``[stride t, stride t + receptive_field)``.
        frame_length: samples of a published frame; the corrected ones are as long as the stride.
        kernels: kernel of each convolution.
        strides: stride of each convolution.
    """

    stride: int
    receptive_field: int
    frame_length: int
    kernels: tuple[int, ...]
    strides: tuple[int, ...]

    def num_tokens(self, num_samples: int) -> int:
        """Tokens of ``num_samples`` samples of one lead, 12 leads laid end to end.

        >>> token_geometry(100).num_tokens(500)
        93
        """
        return max(0, (NUM_LEADS * num_samples - self.receptive_field) // self.stride + 1)


class FramePlan(NamedTuple):
    """The frames of a recording: frame t is ``joined(ecg)[:, start + t frame_length :][:, :frame_length]``.

    Attributes:
        start: samples before the first frame.
        num_frames: N, one frame for each token.
        frame_length: S, samples of a frame.
        frames_per_lead: frames that belong to each of the 12 leads, in order; None where each frame stands alone.
        band_hz: the band that mel filters cover, in Hz.
        sample_rate_hz: sampling rate in Hz.
        trims: samples left out at the start and the end of each lead; None where leads are whole.
    """

    start: int
    num_frames: int
    frame_length: int
    frames_per_lead: list[int] | None
    band_hz: tuple[float, float]
    sample_rate_hz: int
    trims: tuple[tuple[int, int], ...] | None

    def joined(self, ecg: torch.Tensor) -> torch.Tensor:
        """The leads ``[B, 12, T]``, trimmed and laid end to end: ``[B, n]``."""
        if self.trims is None:
            return ecg.flatten(1)
        last = ecg.shape[-1]
        if len(set(self.trims)) == 1:
            head, tail = self.trims[0]
            return ecg[..., head : last - tail].flatten(1)
        return torch.cat([ecg[:, lead, head : last - tail] for lead, (head, tail) in enumerate(self.trims)], -1)

    def places(self, num_samples: int) -> torch.Tensor:
        """Lead and sample in which the middle of each frame lies, of leads of ``num_samples``: ``[N, 2] int64``."""
        trims = torch.tensor(self.trims or [(0, 0)] * NUM_LEADS)
        lengths = num_samples - trims.sum(1)
        ends = lengths.cumsum(0)
        middle = self.start + self.frame_length // 2 + self.frame_length * torch.arange(self.num_frames)
        lead = torch.searchsorted(ends, middle, right=True)
        return torch.stack([lead, middle - (ends - lengths)[lead] + trims[lead, 0]], 1)


def _geometry(frame_length: int, kernels: tuple[int, ...], strides: tuple[int, ...]) -> TokenGeometry:
    stride = receptive_field = 1
    for kernel, step in zip(kernels, strides, strict=True):
        receptive_field += (kernel - 1) * stride
        stride *= step
    return TokenGeometry(stride, receptive_field, frame_length, kernels, strides)


_GEOMETRIES = {
    50: _geometry(32, (10, 3, 3, 2), (4, 2, 2, 2)),
    100: _geometry(64, (10, 3, 3, 2, 2), (4, 2, 2, 2, 2)),
    500: _geometry(322, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)),
}

# Samples that the published frames leave out at the start and the end of leads with an even and an odd index; the rest
# of 5 s is a whole number of frames, one for each token.
_PUBLISHED_TRIMS = {50: ((1, 1), (1, 1)), 100: ((2, 2), (2, 2)), 500: ((2, 2), (2, 3))}
_PUBLISHED_S = 5


def token_geometry(sample_rate_hz: float, op: str = "token_geometry") -> TokenGeometry:
    """The tokens of the model at a sampling rate of 50, 100 or 500 Hz.

    >>> token_geometry(100)[:3]
    (64, 82, 64)

    Raises:
        ValueError: another rate; ``op`` is who says so.
    """
    if sample_rate_hz not in _GEOMETRIES:
        raise ValueError(
            f"{op}: sample_rate_hz must be one of {sorted(_GEOMETRIES)}, got {sample_rate_hz}; "
            "downsampling_factor 10, 5 or 1 brings 500 Hz there"
        )
    return _GEOMETRIES[int(sample_rate_hz)]


def token_places(num_samples: int, sample_rate_hz: float) -> torch.Tensor:
    """Where the middle of each token lies: its lead, and the sample in it.

    Args:
        num_samples: samples T of each of the 12 leads.
        sample_rate_hz: 100, 50 or 500.

    Returns:
        ``[N, 2] int64``.

    Raises:
        ValueError: there is no token, or no model at this rate.

    >>> token_places(500, 100)[6:9].tolist()
    [[0, 425], [0, 489], [1, 53]]
    """
    leads = torch.empty(NUM_LEADS, num_samples, device="meta")
    return frame_plan("token_places", leads, "corrected", sample_rate_hz).places(num_samples)


def frame_plan(op: str, ecg: torch.Tensor | None, compat: str, sample_rate_hz: float) -> FramePlan:
    """The frames of ``ecg`` ``[12, T]`` or ``[B, 12, T]``.

    Corrected: the ``stride`` samples amid the receptive field of each token; a frame belongs to the lead that its
    middle lies in. Published: trimmed leads cut into frames, which begin up to 46 samples beside their tokens.

    Raises:
        ValueError: an argument is out of its range; ``op`` is who says so.
    """
    if compat not in COMPATS:
        raise ValueError(f"{op}: compat must be 'corrected' or 'published', got {compat!r}")
    geometry = token_geometry(sample_rate_hz, op)
    if ecg is None or ecg.ndim not in (2, 3) or ecg.shape[-2] != NUM_LEADS:
        given = None if ecg is None else list(ecg.shape)
        raise ValueError(f"{op}: ecg must be [12, T] or [B, 12, T], got {given}")
    num_samples, rate_hz = ecg.shape[-1], int(sample_rate_hz)
    if compat == "published" and num_samples != _PUBLISHED_S * rate_hz:
        raise ValueError(
            f"{op}: ecg must hold {_PUBLISHED_S * rate_hz} samples of each lead ({_PUBLISHED_S} s at {rate_hz} Hz) "
            f"with compat='published', got {num_samples}; cut it into {_PUBLISHED_S} s, or use compat='corrected'"
        )
    num_tokens = geometry.num_tokens(num_samples)
    if num_tokens == 0:
        raise ValueError(
            f"{op}: ecg must hold at least {-(-geometry.receptive_field // NUM_LEADS)} samples of each lead, "
            f"one token at {rate_hz} Hz, got {num_samples}"
        )
    if compat == "published":
        trims = tuple(_PUBLISHED_TRIMS[rate_hz][lead % 2] for lead in range(NUM_LEADS))
        return FramePlan(0, num_tokens, geometry.frame_length, None, (20.0, rate_hz / 2), rate_hz, trims)
    stride = geometry.stride
    start = (geometry.receptive_field - stride) // 2
    middle = start + stride // 2
    # Frames whose middle lies before the end of a lead.
    ends = [min(num_tokens, max(0, -(-(lead * num_samples - middle) // stride))) for lead in range(NUM_LEADS + 1)]
    frames_per_lead = [end - begin for begin, end in itertools.pairwise(ends)]
    # Below 0.5 Hz there is base line only, above 50 Hz nothing that the preprocessing lets pass.
    band_hz = (0.5, min(50.0, rate_hz / 2))
    return FramePlan(start, num_tokens, stride, frames_per_lead, band_hz, rate_hz, None)
