"""Cepstral coefficients of each frame, and how they change along the lead: 39 numbers."""

from __future__ import annotations

import torch

from hubert_ecg import ops
from hubert_ecg.features.tokens import Frames


def static(frames: Frames) -> torch.Tensor:
    """The 13 cepstral coefficients of each frame: ``[B, N, 13]``."""
    low_hz, high_hz = frames.band_hz
    return ops.mfcc(frames.samples, sample_rate_hz=frames.sample_rate_hz, low_hz=low_hz, high_hz=high_hz)


def features(frames: Frames) -> torch.Tensor:
    """13 coefficients, their slopes and the slopes of these over neighbouring frames of the lead: ``[B, N, 39]``."""
    coefficients = static(frames)
    if frames.frames_per_lead is None:
        # A frame alone has no neighbours, so the published slopes are all 0.
        return torch.cat([coefficients, torch.zeros_like(coefficients).repeat(1, 1, 2)], -1)
    slopes = ops.deltas(coefficients, frames.frames_per_lead)
    return torch.cat([coefficients, slopes, ops.deltas(slopes, frames.frames_per_lead)], -1)
