// The inner loops of add_norm.cpp for one instruction set (every_isa.h).
#include "dropped_rows_simd.h"
#include "halves_simd.h"

namespace HUBERT_ECG_ISA {

template <class X, bool kDropout, class T = Wide<X>>
HUBERT_ECG_TARGET static void normalise(const X* x, const T* residual, const T* weight, const T* bias, int64_t D, T eps,
                                        Dropout<T> kept, T* y, T* mean, T* rstd) {
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int32_t d = 0; d < int32_t(D); ++d) {
    const T added = widen_to(x[d], T()), total = residual[d] + (kDropout ? added * kept(d) : added);
    y[d] = total;
    sum += total;
  }
  const T middle = sum / D;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < D; ++d) squares += (y[d] - middle) * (y[d] - middle);
  const T scale = 1 / std::sqrt(squares / D + eps);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) y[d] = (y[d] - middle) * scale * weight[d] + bias[d];
  *mean = middle;
  *rstd = scale;
}

// sums [2][D]: of grad * normed, and of grad.
template <class X, bool kDropout, class T = Wide<X>>
HUBERT_ECG_TARGET static void differentiate(const T* grad, const X* x, const T* residual, const T* weight, T mean,
                                            T rstd, int64_t D, Dropout<T> kept, X* to_x, T* to_residual, T* sums) {
  T plain = 0, along = 0;
#pragma omp simd reduction(+ : plain, along)
  for (int32_t d = 0; d < int32_t(D); ++d) {
    const T factor = kDropout ? kept(d) : T(1);
    const T normed = (residual[d] + widen_to(x[d], T()) * factor - mean) * rstd, weighted = grad[d] * weight[d];
    to_residual[d] = normed;
    if (kDropout) narrow(factor, to_x[d]);
    sums[d] += grad[d] * normed;
    sums[D + d] += grad[d];
    plain += weighted;
    along += weighted * normed;
  }
  plain /= D;
  along /= D;
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) {
    const T to_total = (grad[d] * weight[d] - plain - along * to_residual[d]) * rstd;
    to_residual[d] = to_total;
    // Half precision may have rounded the factor, but not to zero.
    narrow(kDropout ? to_total * (widen_to(to_x[d], T()) != 0 ? kept.scale : T(0)) : to_total, to_x[d]);
  }
}

template <class X, class T = Wide<X>>
HUBERT_ECG_TARGET static void forward_rows(const X* x, const T* residual, const T* weight, const T* bias, int64_t N,
                                           int64_t D, T eps, double p, const int64_t* seed, T* y, T* mean, T* rstd) {
  const auto run = p > 0 ? normalise<X, true> : normalise<X, false>;
#pragma omp parallel for if (N * D > 16384)
  for (int64_t n = 0; n < N; ++n) {
    Dropout<T> kept(p, seed);
    kept.at(n * D);
    run(x + n * D, residual + n * D, weight, bias, D, eps, kept, y + n * D, mean + n, rstd + n);
  }
}

template <class X, class T = Wide<X>>
HUBERT_ECG_TARGET static void backward_rows(const T* grad, const X* x, const T* residual, const T* weight,
                                            const T* mean, const T* rstd, int64_t first, int64_t last, int64_t D,
                                            double p, const int64_t* seed, X* to_x, T* to_residual, T* sums) {
  const auto run = p > 0 ? differentiate<X, true> : differentiate<X, false>;
  Dropout<T> kept(p, seed);
  for (int64_t n = first; n < last; ++n) {
    kept.at(n * D);
    run(grad + n * D, x + n * D, residual + n * D, weight, mean[n], rstd[n], D, kept, to_x + n * D, to_residual + n * D,
        sums);
  }
}

}  // namespace HUBERT_ECG_ISA
