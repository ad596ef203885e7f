"""Statistics and cepstral coefficients of each frame side by side: 29 numbers."""

from __future__ import annotations

import torch

from hubert_ecg.features import mfcc, time_freq
from hubert_ecg.features.tokens import Frames


def features(frames: Frames) -> torch.Tensor:
    """16 statistics, then 13 cepstral coefficients: ``[B, N, 29]``."""
    return torch.cat([time_freq.features(frames), mfcc.static(frames)], -1)
