#pragma once
#include "tensor.h"

namespace hubert_ecg {

// Products of matrices in 16 bits, for processors that have none of half precision: pairs of int16 are multiplied and
// added in one instruction, twice as many numbers at a time as of float32.
//
// Of both matrices, kDepth numbers of a row at a time are rounded in a unit of their own, by which they are kLength
// long. The products of two such pieces add up to less than 2^31 (Cauchy and Schwarz), so sums are exact in int32; they
// are joined in float32. Each is off by about 1e-5 of the product of both lengths. A row that is not finite gives NaN;
// one shorter than 1e-33 counts as zeros.
//
// Each matrix is float32, float16 or bfloat16: [M, K], or [B, F, K] for M = B F rows. Only the numbers of a row lie
// side by side; rows may be apart, and those that are read may overlap, as the windows of a convolution do.
//
// y = x weight^T + bias:
//   x [M, K]; weight [N, K]; bias [N] float32, [0]: none; y [M, N] (written)
void linear_cpu(Tensor x, Tensor weight, Tensor bias, Tensor y);
//   grad [M, N]; x [M, K]; weight [N, K]; to_x [M, K] = grad weight, to_weight [N, K] = grad^T x (written; [0, 0]: not)
void linear_backward_cpu(Tensor grad, Tensor x, Tensor weight, Tensor to_x, Tensor to_weight);

}  // namespace hubert_ecg
