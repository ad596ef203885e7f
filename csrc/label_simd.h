// The inner loops of label.cpp for one instruction set (every_isa.h).
namespace HUBERT_ECG_ISA {

inline __attribute__((always_inline)) float bits_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline __attribute__((always_inline)) float widen(float x) { return x; }
inline __attribute__((always_inline)) float widen(double x) { return static_cast<float>(x); }
inline __attribute__((always_inline)) float widen(int16_t x) { return static_cast<float>(x); }
inline __attribute__((always_inline)) float widen(BFloat16 x) { return bits_as_float(uint32_t{x.bits} << 16); }
inline __attribute__((always_inline)) float widen(Float16 x) {
  // The exponent, moved into that of float32, is 112 too low; the highest one means infinity or NaN.
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13, sign = uint32_t{x.bits & 0x8000u} << 16;
  const float value = bits_as_float(magnitude) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits_as_float(bits | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | sign);
}

template <class Sample>
HUBERT_ECG_TARGET static void as_floats(const Sample* x, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]) * scale;
}

// out[f] = slope of x at frame f, for f in [first, last) of a lead that holds the frames [begin, end): that of
// deltas.h. Rows of kNumMfcc.
HUBERT_ECG_TARGET static void slopes(const float* x, int64_t begin, int64_t end, int64_t first, int64_t last,
                                     float* out) {
  static_assert(kDeltaReach == 2);
  for (int64_t f = first; f < last; ++f) {
    const float* const after = x + std::min(f + 1, end - 1) * kNumMfcc;
    const float* const before = x + std::max(f - 1, begin) * kNumMfcc;
    const float* const later = x + std::min(f + 2, end - 1) * kNumMfcc;
    const float* const earlier = x + std::max(f - 2, begin) * kNumMfcc;
    for (int64_t c = 0; c < kNumMfcc; ++c)
      out[f * kNumMfcc + c] = 0.1f * (after[c] - before[c]) + 0.2f * (later[c] - earlier[c]);
  }
}

// Gives each row the Euclidean length 1, but those of zeros. Squares of float32 neither overflow nor vanish in float64.
HUBERT_ECG_TARGET static void unit_rows(float* x, int64_t n, int64_t D) {
  for (int64_t i = 0; i < n; ++i, x += D) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += static_cast<double>(x[d]) * static_cast<double>(x[d]);
    if (sum == 0) continue;
    const double scale = 1 / std::sqrt(sum);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) x[d] = static_cast<float>(x[d] * scale);
  }
}

}  // namespace HUBERT_ECG_ISA
