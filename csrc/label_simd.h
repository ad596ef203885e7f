// The inner loops of label.cpp for one instruction set (every_isa.h).
#include "halves_simd.h"
#include "vectors_simd.h"

namespace HUBERT_ECG_ISA {

typedef float Quad __attribute__((vector_size(16)));

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

// The sum of squares of D numbers, in four parts.
template <int64_t D>
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) Quad squares(const float* x) {
  constexpr int W = Simd<float>::width;
  V<float> sums{};
  int64_t d = 0;
#pragma GCC unroll 16
  for (; d + W <= D; d += W) {
    const V<float> v = load<V<float>>(x + d);
    sums += v * v;
  }
  Quad parts[W / 4];
  std::memcpy(parts, &sums, sizeof sums);
#pragma GCC unroll 4
  for (; d + 4 <= D; d += 4) {
    const Quad v = load<Quad>(x + d);
    parts[0] += v * v;
  }
  for (int p = 1; p < W / 4; ++p) parts[0] += parts[p];
  if (d < D) {
    // The last four, less those that were counted.
    const Quad place = {0, 1, 2, 3}, v = place < float(d - (D - 4)) ? Quad{} : load<Quad>(x + D - 4);
    parts[0] += v * v;
  }
  return parts[0];
}

// Gives each row of D numbers the Euclidean length 1, but those of zeros.
template <int64_t D>
HUBERT_ECG_TARGET static void unit_rows(float* x, int64_t n) {
  constexpr int W = Simd<float>::width, kRows = 4;
  for (int64_t i = 0; i < n; i += kRows, x += kRows * D) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, n - i));
    Quad parts[kRows] = {};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) parts[r] = squares<D>(x + r * D);
    float factors[kRows];
    bool sound[kRows];
    for (int r = 0; r < kRows; ++r) {
      const float sum = (parts[r][0] + parts[r][1]) + (parts[r][2] + parts[r][3]);
      sound[r] = sum > kLeastSquare && sum < kMostSquare;
      factors[r] = 1 / std::sqrt(sum);
    }
    for (int r = 0; r < rows; ++r) {
      float* const row = x + r * D;
      if (!sound[r]) {
        // Squares of float32 neither vanish nor overflow in float64.
        double sum = 0;
        for (int64_t d = 0; d < D; ++d) sum += static_cast<double>(row[d]) * row[d];
        if (sum == 0) continue;
        const double scale = 1 / std::sqrt(sum);
        for (int64_t d = 0; d < D; ++d) row[d] = static_cast<float>(row[d] * scale);
        continue;
      }
      const float factor = factors[r];
      int64_t d = 0;
#pragma GCC unroll 16
      for (; d + W <= D; d += W) store(row + d, load<V<float>>(row + d) * factor);
#pragma GCC unroll 16
      for (; d < D; ++d) row[d] *= factor;
    }
  }
}

const Kernels kernels = {slopes, copy_columns, {unit_rows<kWidths[0]>, unit_rows<kWidths[1]>, unit_rows<kWidths[2]>}};

}  // namespace HUBERT_ECG_ISA
