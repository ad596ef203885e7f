"""How the CUDA kernels were checked for their values. One that is not named here is never the default.

``tests/cuda_on_host`` checks every kernel in the host build and fails where this table says another thing. A kernel
whose tests marked ``cuda`` passed on a GPU has the GPU's name added: ``"host build; NVIDIA H100"``.
"""

from __future__ import annotations

CUDA_CHECKS = {
    "deltas": "host build",
    "frame_assign": "host build",
    "kmeans_accumulate": "host build",
    "kmeans_assign": "host build",
    "kmeans_step": "host build",
    "masked_span_attention": "host build",
    "masked_span_attention_backward": "host build",
    "mfcc": "host build",
    "time_freq": "host build",
}
