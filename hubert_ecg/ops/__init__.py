"""Operators, each with a plain PyTorch reference and faster backends where they exist.

Shape letters: B records, L leads, T samples or tokens, F frames, S samples in a frame, D features, K clusters,
C classes, H heads, N points.
"""

from hubert_ecg.ops._op import OPS, use_backend

__all__ = ["OPS", "use_backend"]
