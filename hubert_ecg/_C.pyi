# ruff: noqa: N999
"""Kernels. Tensors are DLPack capsules; outputs come last and are written in place. See csrc/<stem>.h."""

from typing import Any

def set_num_threads(num_threads: int) -> None: ...
def mfcc_cpu(frames: Any, window: Any, circle: Any, bank: Any, dct: Any, out: Any) -> None: ...
def deltas_cpu(x: Any, ends: Any, out: Any, window: int) -> None: ...
def time_freq_cpu(frames: Any, circle: Any, out: Any) -> None: ...
def kmeans_assign_cpu(x: Any, centroids: Any, labels: Any) -> None: ...
def kmeans_accumulate_cpu(
    x: Any, labels: Any, sums: Any, counts: Any, partial_sums: Any, partial_counts: Any
) -> None: ...
def kmeans_step_cpu(
    x: Any,
    centroids: Any,
    labels: Any,
    sums: Any,
    counts: Any,
    inertia: Any,
    partial_sums: Any,
    partial_counts: Any,
    with_inertia: bool,
) -> None: ...
def linear_cpu(x: Any, weight: Any, bias: Any, y: Any) -> None: ...
def linear_backward_cpu(grad: Any, x: Any, weight: Any, to_x: Any, to_weight: Any) -> None: ...
def add_norm_cpu(
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    eps: float,
    dropout_p: float,
    seed: Any,
    y: Any,
    mean: Any,
    rstd: Any,
) -> None: ...
def add_norm_backward_cpu(
    grad: Any,
    x: Any,
    residual: Any,
    weight: Any,
    mean: Any,
    rstd: Any,
    dropout_p: float,
    seed: Any,
    to_x: Any,
    to_residual: Any,
    to_weight: Any,
    to_bias: Any,
) -> None: ...
def bias_gelu_cpu(x: Any, bias: Any, dropout_p: float, seed: Any, y: Any) -> None: ...
def bias_gelu_backward_cpu(
    grad: Any, x: Any, bias: Any, dropout_p: float, seed: Any, to_x: Any, to_bias: Any
) -> None: ...
def frame_assign_cpu(
    ecg: Any,
    scale: Any,
    centroids: Any,
    window: Any,
    circle: Any,
    bank: Any,
    dct: Any,
    frame_circle: Any,
    ends: Any,
    labels: Any,
    kind: int,
    start: int,
    frame_length: int,
    normalize: bool,
) -> None: ...
def masked_span_attention_cpu(
    q: Any,
    k: Any,
    v: Any,
    spans: Any,
    queries: Any,
    seed: Any,
    out: Any,
    logsumexp: Any,
    dropout_p: float,
    scale: float,
) -> None: ...
def masked_span_attention_backward_cpu(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    logsumexp: Any,
    spans: Any,
    queries: Any,
    seed: Any,
    gradients: Any,
    dropout_p: float,
    scale: float,
) -> None: ...
def conv_norm_gelu_cpu(x: Any, taps: Any, offset: Any, y: Any, stride: int) -> None: ...
def conv_norm_gelu_backward_cpu(
    grad: Any, x: Any, taps: Any, offset: Any, sums: Any, windows: Any, stride: int
) -> None: ...

class Shards:
    def __init__(self, paths: list[str], sizes: list[int], half: bool) -> None: ...
    def gather(
        self, shard: Any, offset: Any, length: Any, start: Any, scale: Any, out: Any, num_threads: int
    ) -> None: ...

# Where the module was built with CUDA, those with a csrc/<stem>.cu have a twin, <op>_cuda, whose last argument is the
# stream's handle.
