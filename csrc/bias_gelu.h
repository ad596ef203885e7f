#pragma once
#include "tensor.h"

namespace hubert_ecg {

// y = dropout(gelu(x + bias)), gelu(a) = a (1 + erf(a / sqrt(2))) / 2; dropout.h says which elements are kept.
//   x, y (written) [N, D] of one type, float16, bfloat16, float32 or float64; bias [D] float64 for float64, else
//   float32, which it is computed in; seed [] int64, read where dropout_p > 0
void bias_gelu_cpu(Tensor x, Tensor bias, double dropout_p, Tensor seed, Tensor y);

// The gradients of x and bias from that of y. Sums over rows are added in an order that only the shape decides.
void bias_gelu_backward_cpu(Tensor grad, Tensor x, Tensor bias, double dropout_p, Tensor seed, Tensor to_x,
                            Tensor to_bias);

}  // namespace hubert_ecg
