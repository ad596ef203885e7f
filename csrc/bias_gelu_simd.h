// The inner loops of bias_gelu.cpp for one instruction set (every_isa.h).
#include "dropped_rows_simd.h"
#include "halves_simd.h"

namespace HUBERT_ECG_ISA {

// exp(x) for x <= 0; 0 below the smallest normal number.
inline __attribute__((always_inline)) float decay(float x) {
  const float held = x > -87.0f ? x : -87.0f;
  // Adding 1.5 * 2^23 rounds to a whole number, which is then in the low bits of the mantissa.
  const float shifted = held * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
  const float r = (held - whole * 0.693359375f) + whole * 2.12194440e-4f;
  const float y = (((((r / 720 + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r + 1) * r + 1;
  uint32_t power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x > -87.0f ? y * scale : x != x ? x : 0.0f;
}
inline __attribute__((always_inline)) double decay(double x) { return std::exp(x); }

// The normal distribution's share below a; bell = exp(-a^2 / 2). Abramowitz and Stegun, 7.1.26: within 7.5e-8.
inline __attribute__((always_inline)) float below(float a, float bell) {
  const float t = 1 / (1 + 0.3275911f * 0.70710678f * std::fabs(a));
  const float y = (((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
  const float above = 0.5f * y * t * bell;
  return a > 0 ? 1 - above : above;
}
inline __attribute__((always_inline)) double below(double a, double) { return 0.5 * std::erfc(-a * std::sqrt(0.5)); }

template <class T, bool kDropout>
HUBERT_ECG_TARGET static void gelu_row(const T* x, const Wide<T>* bias, int64_t D, Dropout<Wide<T>> kept, T* y) {
  using Number = Wide<T>;
#pragma omp simd
  for (int32_t d = 0; d < int32_t(D); ++d) {
    const Number a = widen_to(x[d], Number()) + bias[d], value = a * below(a, decay(a * a * Number(-0.5)));
    narrow(kDropout ? value * kept(d) : value, y[d]);
  }
}

template <class T, bool kDropout>
HUBERT_ECG_TARGET static void gelu_row_backward(const T* grad, const T* x, const Wide<T>* bias, int64_t D,
                                                Dropout<Wide<T>> kept, T* to_x, Wide<T>* to_bias) {
  using Number = Wide<T>;
#pragma omp simd
  for (int32_t d = 0; d < int32_t(D); ++d) {
    const Number a = widen_to(x[d], Number()) + bias[d], bell = decay(a * a * Number(-0.5));
    const Number slope = below(a, bell) + a * bell * Number(0.3989422804014327), own = widen_to(grad[d], Number());
    const Number value = (kDropout ? own * kept(d) : own) * slope;
    narrow(value, to_x[d]);
    to_bias[d] += value;
  }
}

template <class T>
HUBERT_ECG_TARGET static void gelu_rows(const T* x, const Wide<T>* bias, int64_t N, int64_t D, double p,
                                        const int64_t* seed, T* y) {
  const auto run = p > 0 ? gelu_row<T, true> : gelu_row<T, false>;
#pragma omp parallel for if (N * D > 16384)
  for (int64_t n = 0; n < N; ++n) {
    Dropout<Wide<T>> kept(p, seed);
    kept.at(n * D);
    run(x + n * D, bias, D, kept, y + n * D);
  }
}

template <class T>
HUBERT_ECG_TARGET static void gelu_rows_backward(const T* grad, const T* x, const Wide<T>* bias, int64_t first,
                                                 int64_t last, int64_t D, double p, const int64_t* seed, T* to_x,
                                                 Wide<T>* to_bias) {
  const auto run = p > 0 ? gelu_row_backward<T, true> : gelu_row_backward<T, false>;
  Dropout<Wide<T>> kept(p, seed);
  for (int64_t n = first; n < last; ++n) {
    kept.at(n * D);
    run(grad + n * D, x + n * D, bias, D, kept, to_x + n * D, to_bias);
  }
}

}  // namespace HUBERT_ECG_ISA
