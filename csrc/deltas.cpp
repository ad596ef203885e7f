#include "deltas.h"

#include <algorithm>

namespace hubert_ecg {
namespace {

template <class T>
void difference(const T* later, const T* earlier, T weight, int64_t D, T* sum) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) sum[d] += weight * (later[d] - earlier[d]);
}

// One lead of `frames` frames.
template <class T>
void lead(const T* x, int64_t frames, int64_t D, int64_t reach, T* out) {
  const double scale = delta_scale(reach);
  for (int64_t f = 0; f < frames; ++f) {
    std::fill(out + f * D, out + (f + 1) * D, T(0));
    for (int64_t k = 1; k <= reach; ++k) {
      const int64_t later = std::min(f + k, frames - 1), earlier = std::max<int64_t>(f - k, 0);
      difference(x + later * D, x + earlier * D, static_cast<T>(k / scale), D, out + f * D);
    }
  }
}

template <class T>
void run(const Tensor& x, const Tensor& ends, const Tensor& out, int64_t window) {
  check_deltas<T>(x, ends, out, window);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(2), L = ends.size(0);
  const int64_t* end = ends.data<int64_t>();
#pragma omp parallel for if (B * F * D > 65536)
  for (int64_t b = 0; b < B; ++b) {
    int64_t begin = 0;
    for (int64_t l = 0; l < L; ++l) {
      // A lead that does not lie in the frames is empty, whatever the caller says.
      const int64_t stop = std::clamp(end[l], begin, F), at = (b * F + begin) * D;
      lead(x.data<T>() + at, stop - begin, D, (window - 1) / 2, out.data<T>() + at);
      begin = stop;
    }
  }
}

}  // namespace

void deltas_cpu(Tensor x, Tensor ends, Tensor out, int64_t window) {
  x.is<double>() ? run<double>(x, ends, out, window) : run<float>(x, ends, out, window);
}

}  // namespace hubert_ecg
