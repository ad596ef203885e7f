"""The frames that features of tokens are computed from, cut out of a recording."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hubert_ecg.ops._frames import FramePlan, TokenGeometry, frame_plan, token_geometry, token_places

__all__ = ["FramePlan", "Frames", "TokenGeometry", "cut_frames", "frame_plan", "token_geometry", "token_places"]


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


def cut_frames(ecg: torch.Tensor, plan: FramePlan) -> Frames:
    """The frames of ``ecg`` ``[B, 12, T] float32``."""
    flat = plan.joined(ecg)[:, plan.start : plan.start + plan.num_frames * plan.frame_length]
    samples = flat.unflatten(1, (plan.num_frames, plan.frame_length)).contiguous()
    return Frames(samples, plan.frames_per_lead, plan.band_hz, plan.sample_rate_hz)
