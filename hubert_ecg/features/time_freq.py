"""Statistics of each frame in time and frequency: 16 numbers."""

from __future__ import annotations

import torch

from hubert_ecg import ops
from hubert_ecg.features.tokens import Frames


def features(frames: Frames) -> torch.Tensor:
    """The statistics of :data:`hubert_ecg.ops.TIME_FREQ_NAMES`: ``[B, N, 16]``."""
    return ops.time_freq(frames.samples)
