"""Points to cluster."""

from __future__ import annotations

import numpy as np


def blobs(n=3000, d=13, k=12, seed=0, dtype=np.float32, spread=0.6):
    random = np.random.default_rng(seed)
    middles = random.normal(size=(k, d))
    return (middles[random.integers(k, size=n)] + spread * random.normal(size=(n, d))).astype(dtype)


def rows_of_length_one(x):
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)
