// The inner loops of published.cpp for one instruction set (every_isa.h).
#include "vectors_simd.h"

namespace HUBERT_ECG_ISA {

// The lowest and the highest of n > 0 numbers; false, and neither, where one of them is not finite.
template <class T>
HUBERT_ECG_TARGET static bool extremes(const T* x, int64_t n, T* low, T* high) {
  constexpr int kLanes = 4 * Simd<T>::width;
  T lows[kLanes], highs[kLanes], odd[kLanes];
  for (int i = 0; i < kLanes; ++i) lows[i] = highs[i] = x[0], odd[i] = 0;
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const T v = x[t + i];
      lows[i] = v < lows[i] ? v : lows[i];
      highs[i] = v > highs[i] ? v : highs[i];
      // 0 of a finite number, else NaN.
      odd[i] += v - v;
    }
  for (int i = 0; t < n; ++t, ++i) {
    lows[i] = x[t] < lows[i] ? x[t] : lows[i];
    highs[i] = x[t] > highs[i] ? x[t] : highs[i];
    odd[i] += x[t] - x[t];
  }
  *low = lows[0], *high = highs[0];
  T odds = odd[0];
  for (int i = 1; i < kLanes; ++i) {
    *low = lows[i] < *low ? lows[i] : *low;
    *high = highs[i] > *high ? highs[i] : *high;
    odds += odd[i];
  }
  return odds == 0;
}

template <class T>
HUBERT_ECG_TARGET static void shifted(const T* x, int64_t n, double by, double scale, double* to) {
  for (int64_t t = 0; t < n; ++t) to[t] = (double(x[t]) - by) * scale;
}

HUBERT_ECG_TARGET static void scaled(const float* x, int64_t n, float by, float scale, float* to) {
  for (int64_t t = 0; t < n; ++t) to[t] = (x[t] - by) * scale - 1;
}

}  // namespace HUBERT_ECG_ISA
