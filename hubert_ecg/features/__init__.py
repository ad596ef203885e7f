"""Features of tokens, which k-means turns into pseudo-labels.

A feature type of the signal is a file here and a line in :data:`FEATURE_TYPES`. "latent" is the one that needs a model:
:class:`Latent`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hubert_ecg import ops
from hubert_ecg.features import mfcc, mixed, time_freq
from hubert_ecg.features.latent import Latent, default_layer
from hubert_ecg.features.tokens import Frames, TokenGeometry, cut_frames, frame_plan, token_geometry, token_places
from hubert_ecg.ops._op import takes_arrays
from hubert_ecg.signal import LEADS

FEATURE_TYPES: dict[str, Callable[[Frames], torch.Tensor]] = {
    "mfcc": mfcc.features,
    "time_freq": time_freq.features,
    "mixed": mixed.features,
}
#: Feature types whose clusters one op finds from the signal, without features in between.
ASSIGN: dict[str, Callable[..., Any]] = {
    "mfcc": ops.mfcc_assign,
    "time_freq": ops.time_freq_assign,
    "mixed": ops.mixed_assign,
}

__all__ = [
    "ASSIGN",
    "FEATURE_TYPES",
    "Frames",
    "Latent",
    "TokenGeometry",
    "cut_frames",
    "default_layer",
    "extract",
    "frame_plan",
    "num_features",
    "token_geometry",
    "token_places",
]


@takes_arrays("ecg")
def extract(ecg: Any, feature_type: str, compat: str = "corrected", sample_rate_hz: float = 100) -> Any:
    """One feature vector for each token of the model.

    Corrected: the frame of a token is the ``stride`` samples in the middle of its receptive field in the leads laid end
    to end, mel filters cover 0.5-50 Hz, and slopes are taken over neighbouring frames of the same lead; a frame that
    straddles two leads belongs to the one that holds most of it.

    Published: frames are cut from leads trimmed at both ends, mel filters cover 20 Hz to Nyquist, and slopes are 0.

    Args:
        ecg: ``[12, T]`` or ``[B, 12, T]`` of any real dtype, preprocessed, at ``sample_rate_hz``; a NumPy, CuPy or
            torch array on any device. T is free, and 5 s with ``compat="published"``.
        feature_type: "mfcc" (D = 39: 13 coefficients, their slopes, the slopes of these), "time_freq" (16) or "mixed"
            (29: time_freq, then 13 coefficients).
        compat: "corrected" or "published".
        sample_rate_hz: 100, 50 or 500.

    Returns:
        ``[N, D]`` or ``[B, N, D]`` float32, N the number of tokens, the kind of array and the device that were given.

    Raises:
        ValueError: an argument is out of its range; the message names it and says what to do.

    >>> extract(torch.zeros(12, 500), "mixed").shape
    torch.Size([93, 29])
    """
    if feature_type == "latent":
        raise ValueError("extract: latent features are of a model; use features.Latent(model, layer)")
    if feature_type not in FEATURE_TYPES:
        raise ValueError(f"extract: feature_type must be one of {sorted(FEATURE_TYPES)}, got {feature_type!r}")
    plan = frame_plan("extract", ecg, compat, sample_rate_hz)
    if ecg.is_complex():
        raise ValueError(f"extract: ecg must be real, got {ecg.dtype}")
    records = ecg.detach().to(torch.float32).reshape(-1, *ecg.shape[-2:])
    vectors = FEATURE_TYPES[feature_type](cut_frames(records, plan))
    return vectors[0] if ecg.ndim == 2 else vectors


@functools.cache
def num_features(feature_type: str) -> int:
    """Numbers in a feature vector.

    >>> num_features("mfcc")
    39
    """
    return extract(torch.zeros(len(LEADS), 500), feature_type).shape[-1]
