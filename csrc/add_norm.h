#pragma once
#include "tensor.h"

namespace hubert_ecg {

// y = (t - mean(t)) / sqrt(var(t) + eps) weight + bias for each row t = residual + dropout(x); dropout.h says which
// elements are kept.
//   x, residual, y (written) [N, D]; weight, bias [D]; mean, rstd [N] (written); all float32 or all float64, but that x
//   and its gradient may be float16 or bfloat16 beside float32; seed [] int64, read where dropout_p > 0
void add_norm_cpu(Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps, double dropout_p, Tensor seed,
                  Tensor y, Tensor mean, Tensor rstd);

// The gradients of x, residual, weight and bias from that of y. Sums over rows are added in an order that only the
// shape decides.
void add_norm_backward_cpu(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd,
                           double dropout_p, Tensor seed, Tensor to_x, Tensor to_residual, Tensor to_weight,
                           Tensor to_bias);

}  // namespace hubert_ecg
