// The inner loops of label.cpp for one instruction set (every_isa.h).
#include "halves_simd.h"

namespace HUBERT_ECG_ISA {

template <class Sample>
HUBERT_ECG_TARGET static void as_floats(const Sample* x, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]) * scale;
}

// Rows of D numbers: columns `to` to `to` + kNumMfcc of the frames [first, last) of a lead become the slopes, as in
// deltas.h, of the kNumMfcc columns before. The lead holds the frames [begin, end).
HUBERT_ECG_TARGET static void slopes(float* x, int64_t D, int64_t to, int64_t begin, int64_t end, int64_t first,
                                     int64_t last) {
  static_assert(kDeltaReach == 2);
  float* const from = x + to - kNumMfcc;
  for (int64_t f = first; f < last; ++f) {
    const float* const after = from + std::min(f + 1, end - 1) * D;
    const float* const before = from + std::max(f - 1, begin) * D;
    const float* const later = from + std::min(f + 2, end - 1) * D;
    const float* const earlier = from + std::max(f - 2, begin) * D;
    float* const out = x + f * D + to;
#pragma omp simd
    for (int64_t c = 0; c < kNumMfcc; ++c) out[c] = 0.1f * (after[c] - before[c]) + 0.2f * (later[c] - earlier[c]);
  }
}

// Copies rows of `width` numbers into columns of rows of D.
HUBERT_ECG_TARGET static void copy_columns(const float* rows, int64_t n, int64_t width, int64_t D, float* x) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < width; ++c) x[i * D + c] = rows[i * width + c];
}

// Gives each row the Euclidean length 1, but those of zeros.
HUBERT_ECG_TARGET static void unit_rows(float* x, int64_t n, int64_t D) {
  for (int64_t i = 0; i < n; ++i, x += D) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += x[d] * x[d];
    double scale = 1 / std::sqrt(sum);
    if (!(sum > kLeastSquare && sum < kMostSquare)) {
      // Squares of float32 neither vanish nor overflow in float64.
      double squares = 0;
      for (int64_t d = 0; d < D; ++d) squares += static_cast<double>(x[d]) * x[d];
      if (squares == 0) continue;
      scale = 1 / std::sqrt(squares);
      for (int64_t d = 0; d < D; ++d) x[d] = static_cast<float>(x[d] * scale);
      continue;
    }
    const float factor = static_cast<float>(scale);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) x[d] *= factor;
  }
}

const Kernels kernels = {slopes, copy_columns, unit_rows};

}  // namespace HUBERT_ECG_ISA
