#include "conv_norm_gelu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"

namespace hubert_ecg {
namespace {

#define HUBERT_ECG_SIMD_FILE "conv_norm_gelu_simd.h"
#include "every_isa.h"

struct Sizes {
  int64_t B, S, F, C, P, k;
};

template <class Y>
Sizes check(const char* op, const Tensor& x, const Tensor& taps, const Tensor& offset, const char* name,
            const Tensor& frames, int64_t stride) {
  using T = Wide<Y>;
  HUBERT_ECG_CHECK(x.is<T>() && x.contiguous() && x.ndim() == 2, op, ": x must be contiguous [B, S], got ", x);
  HUBERT_ECG_CHECK(taps.is<T>() && taps.contiguous() && taps.ndim() == 3 && taps.size(0) == x.size(0) &&
                       taps.size(1) >= 1 && taps.size(2) % kConvChannels == 0,
                   op, ": taps must be contiguous [B, k, P] of the type of x with P a multiple of 64, got ", taps);
  HUBERT_ECG_CHECK(offset.is<T>() && offset.contiguous() && offset.ndim() == 2 && offset.size(0) == x.size(0) &&
                       offset.size(1) == taps.size(2),
                   op, ": offset must be contiguous [B, P] of the type of x, got ", offset);
  const Sizes n{
      x.size(0),    x.size(1),   frames.ndim() == 3 ? frames.size(1) : 0, frames.ndim() == 3 ? frames.size(2) : 0,
      taps.size(2), taps.size(1)};
  HUBERT_ECG_CHECK(stride >= 1 && n.S >= n.k, op, ": stride must be at least 1 and x as long as a window");
  HUBERT_ECG_CHECK(frames.is<Y>() && frames.contiguous() && frames.ndim() == 3 && frames.size(0) == n.B &&
                       n.F == (n.S - n.k) / stride + 1 && n.P - n.C >= 0 && n.P - n.C < kConvChannels,
                   op, ": ", name,
                   " must be contiguous [B, F, C] of the type of x, or of half precision where that is float32, got ",
                   frames);
  return n;
}

template <class Y>
void forward(const Tensor& x, const Tensor& taps, const Tensor& offset, const Tensor& y, int64_t stride) {
  using T = Wide<Y>;
  const Sizes n = check<Y>("conv_norm_gelu", x, taps, offset, "y", y, stride);
  const auto kernel = HUBERT_ECG_BEST(conv_forward<Y>);
  constexpr int64_t kFrames = 128;
  const int64_t parts = (n.F + kFrames - 1) / kFrames;
#pragma omp parallel for collapse(2) if (n.B * n.F * n.C > 65536)
  for (int64_t b = 0; b < n.B; ++b) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * kFrames, frames = std::min(kFrames, n.F - begin);
      kernel(x.data<T>() + b * n.S + begin * stride, stride, frames, n.k, taps.data<T>() + b * n.k * n.P,
             offset.data<T>() + b * n.P, n.P, n.C, y.data<Y>() + (b * n.F + begin) * n.C);
    }
  }
}

template <class Y>
void backward(const Tensor& grad, const Tensor& x, const Tensor& taps, const Tensor& offset, const Tensor& sums,
              const Tensor& windows, int64_t stride) {
  using T = Wide<Y>;
  const char* const op = "conv_norm_gelu_backward";
  const Sizes n = check<Y>(op, x, taps, offset, "grad", grad, stride);
  const int64_t parts = n.P / kConvChannels;
  HUBERT_ECG_CHECK(sums.is<double>() && sums.contiguous() && sums.ndim() == 3 && sums.size(0) == n.B &&
                       sums.size(1) == n.k + 1 && sums.size(2) == n.P,
                   op, ": sums must be contiguous float64 [B, k + 1, P], got ", sums);
  HUBERT_ECG_CHECK(windows.is<T>() && windows.contiguous() && windows.ndim() == 4 &&
                       (windows.size(0) == 0 || (windows.size(0) == parts && windows.size(1) == n.B &&
                                                 windows.size(2) == n.F && windows.size(3) == n.k)),
                   op, ": windows must be contiguous [P / 64, B, F, k] of the type of x or empty, got ", windows);
  const auto kernel = HUBERT_ECG_BEST(conv_backward<Y>);
#pragma omp parallel for collapse(2) if (n.B * n.F * n.C > 65536)
  for (int64_t b = 0; b < n.B; ++b) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t c = part * kConvChannels;
      kernel(grad.data<Y>() + b * n.F * n.C + c, n.C, std::min(kConvChannels, n.C - c), x.data<T>() + b * n.S, stride,
             n.F, n.k, taps.data<T>() + b * n.k * n.P + c, offset.data<T>() + b * n.P + c, n.P,
             sums.data<double>() + b * (n.k + 1) * n.P + c,
             windows.size(0) ? windows.data<T>() + (part * n.B + b) * n.F * n.k : nullptr);
    }
  }
}

}  // namespace

void conv_norm_gelu_cpu(Tensor x, Tensor taps, Tensor offset, Tensor y, int64_t stride) {
  of_type(y, [&](auto one) { forward<decltype(one)>(x, taps, offset, y, stride); });
}

void conv_norm_gelu_backward_cpu(Tensor grad, Tensor x, Tensor taps, Tensor offset, Tensor sums, Tensor windows,
                                 int64_t stride) {
  of_type(grad, [&](auto one) { backward<decltype(one)>(grad, x, taps, offset, sums, windows, stride); });
}

}  // namespace hubert_ecg
