#pragma once
#include "tensor.h"

namespace hubert_ecg {

// out[b, f] = sum_k k (x[b, f + k] - x[b, f - k]) / (2 sum_k k^2) for k = 1 .. (window - 1) / 2, each lead held at its
// ends.
//   x [B, F, D] float or double, ends [L] int64: where each lead ends, the last at F, out like x (written)
void deltas_cpu(Tensor x, Tensor ends, Tensor out, int64_t window);
void deltas_cuda(Tensor x, Tensor ends, Tensor out, int64_t window, intptr_t stream);

template <class T>
void check_deltas(const Tensor& x, const Tensor& ends, const Tensor& out, int64_t window) {
  HUBERT_ECG_CHECK(x.is<T>() && x.contiguous() && x.ndim() == 3, "deltas: x must be contiguous [B, F, D], got ", x);
  HUBERT_ECG_CHECK(ends.is<int64_t>() && ends.contiguous() && ends.ndim() == 1, "deltas: ends must be int64 [L], got ",
                   ends);
  HUBERT_ECG_CHECK(out.is<T>() && out.contiguous() && out.ndim() == 3 && out.size(0) == x.size(0) &&
                       out.size(1) == x.size(1) && out.size(2) == x.size(2),
                   "deltas: out must be like x, ", x, ", got ", out);
  HUBERT_ECG_CHECK(window >= 3 && window % 2 == 1, "deltas: window must be odd and at least 3, got ", window);
}

// What the sum over k is divided by.
inline double delta_scale(int64_t reach) { return static_cast<double>(reach * (reach + 1) * (2 * reach + 1)) / 3; }

}  // namespace hubert_ecg
