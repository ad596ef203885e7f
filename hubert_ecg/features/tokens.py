"""Where tokens lie in a recording, and the frames that features of tokens are computed from."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hubert_ecg.signal import LEADS


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
        return max(0, (len(LEADS) * num_samples - self.receptive_field) // self.stride + 1)


class Frames(NamedTuple):
    """What a feature type computes from.

    Attributes:
        samples: ``[B, N, S] float32``, one frame for each token.
        frames_per_lead: frames that belong to each of the 12 leads, in order; None where each frame stands alone.
        band_hz: the band that mel filters cover, in Hz.
        sample_rate_hz: sampling rate in Hz.
    """

    samples: torch.Tensor
    frames_per_lead: list[int] | None
    band_hz: tuple[float, float]
    sample_rate_hz: int


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


def token_geometry(sample_rate_hz: float) -> TokenGeometry:
    """The tokens of the model at a sampling rate of 50, 100 or 500 Hz.

    >>> token_geometry(100)[:3]
    (64, 82, 64)

    Raises:
        ValueError: another rate.
    """
    if sample_rate_hz not in _GEOMETRIES:
        raise ValueError(
            f"token_geometry: sample_rate_hz must be one of {sorted(_GEOMETRIES)}, got {sample_rate_hz}; "
            "downsampling_factor 10, 5 or 1 brings 500 Hz there"
        )
    return _GEOMETRIES[int(sample_rate_hz)]


def corrected_frames(ecg: torch.Tensor, sample_rate_hz: int) -> Frames:
    """The ``stride`` samples amid each token's receptive field; a frame belongs to the lead that its middle lies in."""
    geometry = token_geometry(sample_rate_hz)
    num_tokens = geometry.num_tokens(ecg.shape[-1])
    start = (geometry.receptive_field - geometry.stride) // 2
    flat = ecg.flatten(1)[:, start : start + num_tokens * geometry.stride]
    middles = start + geometry.stride // 2 + geometry.stride * torch.arange(num_tokens)
    frames_per_lead = torch.bincount(middles // ecg.shape[-1], minlength=len(LEADS)).tolist()
    # Below 0.5 Hz there is base line only, above 50 Hz nothing that the preprocessing lets pass.
    band_hz = (0.5, min(50.0, sample_rate_hz / 2))
    samples = flat.unflatten(1, (num_tokens, geometry.stride)).contiguous()
    return Frames(samples, frames_per_lead, band_hz, sample_rate_hz)


def published_frames(ecg: torch.Tensor, sample_rate_hz: int) -> Frames:
    """The trimmed leads laid end to end and cut into frames, which begin up to 46 samples beside their tokens."""
    geometry = token_geometry(sample_rate_hz)
    trims = (_PUBLISHED_TRIMS[sample_rate_hz][lead % 2] for lead in range(len(LEADS)))
    leads = [ecg[:, lead, head : ecg.shape[-1] - tail] for lead, (head, tail) in enumerate(trims)]
    samples = torch.cat(leads, -1).unflatten(1, (-1, geometry.frame_length))
    return Frames(samples, None, (20.0, sample_rate_hz / 2), sample_rate_hz)
