// The inner loops of time_freq.cpp for one instruction set (every_isa.h).
#include "frames_simd.h"

namespace HUBERT_ECG_ISA {

template <class T>
HUBERT_ECG_INLINE V<T> square_root(V<T> x) {
  for (int lane = 0; lane < Simd<T>::width; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

template <class T>
HUBERT_ECG_INLINE void add_powers(V<T> offset, V<T> scale, V<T>& x, V<T>& second, V<T>& third, V<T>& fourth) {
  x -= offset;
  const V<T> v = x * scale, v2 = v * v;
  second += v2;
  third += v2 * v;
  fourth += v2 * v2;
}

// Features 0 to 11; leaves the frame less its mean in x. The first sample is taken off before the mean is formed, so
// that a constant frame has no variance at any level.
template <class T>
HUBERT_ECG_INLINE void moments(int64_t S, V<T>* x, V<T>* feature) {
  const T n = static_cast<T>(S);
  const V<T> base = x[0];
  V<T> low = base, high = base, sum = {}, squares = {}, not_finite = {};
  for (int64_t i = 0; i < S; ++i) {
    const V<T> v = x[i];
    low = v < low ? v : low;
    high = v > high ? v : high;
    squares += v * v;
    not_finite += v - v;
    x[i] = v - base;
    sum += x[i];
  }
  const V<T> offset = sum / n;
  // In units of the farthest sample's distance, powers up to the fourth neither vanish nor overflow.
  const V<T> above = high - base - offset, below = offset - (low - base), farthest = above > below ? above : below;
  const V<T> scale = farthest >= std::numeric_limits<T>::min() ? T(1) / farthest : V<T>{} + T(1);
  // Four sums of each: one would round off every small sample against a spike, and wait for itself.
  V<T> seconds[4] = {}, thirds[4] = {}, fourths[4] = {};
  int64_t i = 0;
  for (; i + 4 <= S; i += 4) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) add_powers<T>(offset, scale, x[i + r], seconds[r], thirds[r], fourths[r]);
  }
  for (; i < S; ++i) add_powers<T>(offset, scale, x[i], seconds[0], thirds[0], fourths[0]);
  const V<T> second = (seconds[0] + seconds[1]) + (seconds[2] + seconds[3]),
             third = (thirds[0] + thirds[1]) + (thirds[2] + thirds[3]),
             fourth = (fourths[0] + fourths[1]) + (fourths[2] + fourths[3]);
  const V<T> power = squares / n, rms = square_root<T>(power), scaled_variance = second / n,
             scaled_deviation = square_root<T>(scaled_variance), deviation = scaled_deviation / scale;
  const V<T> peak = high > -low ? high : -low;
  const auto flat = deviation <= kFlat<T> * peak;
  feature[0] = low + not_finite;
  feature[1] = high + not_finite;
  feature[2] = base + offset + not_finite;
  feature[3] = rms;
  feature[4] = deviation * deviation;
  feature[5] = deviation;
  feature[6] = power;
  feature[7] = peak + not_finite;
  feature[8] = high - low + not_finite;
  feature[9] = peak / (rms + T(kCrestEpsilon)) + not_finite;
  feature[10] = flat ? V<T>{} : third / n / (scaled_variance * scaled_deviation);
  feature[11] = flat ? V<T>{} : fourth / n / (scaled_variance * scaled_variance) - T(3);
  for (int d = 3; d < 12; ++d) feature[d] += not_finite;
}

// Features 12 to 15. Bins 0 and S / 2 stand alone; every other bin has a mirror image of the same power.
template <class T>
HUBERT_ECG_INLINE void spectrum(int64_t S, const V<T>* X, V<T>* p, V<T>* feature) {
  const T n = static_cast<T>(S);
  const int64_t pairs = (S - 1) / 2;
  const bool even = S % 2 == 0;
  const V<T> constant = n * feature[2] * feature[2], middle = even ? X[S / 2] * X[S / 2] / n : V<T>{};
  V<T> high = constant > middle ? constant : middle, sum = {};
  for (int64_t k = 1; k <= pairs; ++k) {
    p[k] = (X[k] * X[k] + X[S - k] * X[S - k]) * (T(1) / n);
    high = p[k] > high ? p[k] : high;
    sum += p[k];
  }
  sum = T(2) * sum + constant + middle;
  const V<T> mean = sum / n;
  V<T> squares = {};
  for (int64_t k = 1; k <= pairs; ++k) squares += (p[k] - mean) * (p[k] - mean);
  squares = T(2) * squares + (constant - mean) * (constant - mean);
  if (even) squares += (middle - mean) * (middle - mean);
  feature[12] = high + T(0) * feature[2];
  feature[13] = sum;
  feature[14] = mean;
  feature[15] = squares / n;
}

// Frames [begin, end), a tile of lanes at a time.
template <class T>
HUBERT_ECG_TARGET static void time_freq(const RealFft& fft, const T* circle, const T* frames, int64_t begin,
                                        int64_t end, void* scratch, T* out) {
  const int64_t S = fft.n;
  V<T>*const x = static_cast<V<T>*>(scratch), *const X = x + S, *const feature = X + S;
  for (int64_t f = begin; f < end; f += Simd<T>::width) {
    const int64_t count = std::min<int64_t>(Simd<T>::width, end - f);
    Ahead ahead(frames + (f + count) * S, count * S * sizeof(T), 4);
    load_tile<T>(frames + f * S, S, count, x);
    ahead.fetch();
    moments<T>(S, x, feature);
    ahead.fetch();
    real_fft<T>(fft, x, X, circle);
    ahead.fetch();
    spectrum<T>(S, X, x, feature);
    ahead.fetch();
    store_tile<T>(feature, kTimeFreqFeatures, count, out + f * kTimeFreqFeatures);
  }
}

}  // namespace HUBERT_ECG_ISA
