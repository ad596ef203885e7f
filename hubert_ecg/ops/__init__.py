"""Operators, each with a plain PyTorch reference and faster backends where they exist.

Shape letters: B records, L leads, T samples or tokens, F frames, S samples in a frame, D features, K clusters,
C classes, H heads, N points.
"""

from hubert_ecg.ops._op import OPS, use_backend
from hubert_ecg.ops.add_norm import add_norm
from hubert_ecg.ops.attention import masked_span_attention, spans_of
from hubert_ecg.ops.bias_gelu import bias_gelu
from hubert_ecg.ops.codebook_loss import IGNORED, codebook_cross_entropy, codebook_loss
from hubert_ecg.ops.conv_norm_gelu import conv_norm_gelu
from hubert_ecg.ops.deltas import deltas
from hubert_ecg.ops.kmeans import kmeans_accumulate, kmeans_assign, kmeans_step
from hubert_ecg.ops.label import frame_assign, mfcc_assign, mixed_assign, time_freq_assign
from hubert_ecg.ops.linear import linear
from hubert_ecg.ops.mask_embedding import mask_embedding
from hubert_ecg.ops.mfcc import mfcc
from hubert_ecg.ops.positional_conv import positional_conv
from hubert_ecg.ops.span_mask import span_mask
from hubert_ecg.ops.strided_conv import strided_conv
from hubert_ecg.ops.time_freq import TIME_FREQ_NAMES, time_freq

__all__ = [
    "IGNORED",
    "OPS",
    "TIME_FREQ_NAMES",
    "add_norm",
    "bias_gelu",
    "codebook_cross_entropy",
    "codebook_loss",
    "conv_norm_gelu",
    "deltas",
    "frame_assign",
    "kmeans_accumulate",
    "kmeans_assign",
    "kmeans_step",
    "linear",
    "mask_embedding",
    "masked_span_attention",
    "mfcc",
    "mfcc_assign",
    "mixed_assign",
    "positional_conv",
    "span_mask",
    "spans_of",
    "strided_conv",
    "time_freq",
    "time_freq_assign",
    "use_backend",
]
