#pragma once
#include <cstddef>

#include "tensor.h"

namespace hubert_ecg {

// Channels of one step of the backward; taps and offset are padded to a multiple of it.
constexpr int64_t kConvChannels = 64;

// y = gelu(n), n[b, f, c] = offset[b, c] + sum_j x[b, stride f + j] taps[b, j, c]: a convolution with the norm after it
// folded into taps and offset.
//   x [B, S] float or double, taps [B, k, P] and offset [B, P] with P = C rounded up to 64, y [B, F, C] (written);
//   of float32 x, y and its gradient may be float16 or bfloat16
void conv_norm_gelu_cpu(Tensor x, Tensor taps, Tensor offset, Tensor y, int64_t stride);

// What the backward needs of g = grad * gelu'(n):
//   sums [B, k + 1, P] double (written): sum_f g x[stride f + j] for each j, then sum_f g;
//   windows [P / 64, B, F, k] or empty (written): sum_c g taps[b, j, c] over each 64 channels.
void conv_norm_gelu_backward_cpu(Tensor grad, Tensor x, Tensor taps, Tensor offset, Tensor sums, Tensor windows,
                                 int64_t stride);

}  // namespace hubert_ecg
