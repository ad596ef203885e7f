// The inner loops of mfcc.cpp for one instruction set (every_isa.h).
#include "frames_simd.h"

namespace HUBERT_ECG_ISA {

// y_i = w_i (x_i - 0.97 x_{i-1}) of the frame less its mean, then zeros. Written as a difference of neighbours, which
// in a smooth signal is small and exact, plus 0.03 of the sample before: the rounding is that of y, not that of x. The
// mean is formed less the first sample, so that a constant frame is exactly zero at any level.
template <class T>
HUBERT_ECG_INLINE void condition(const MfccTables<T>& t, V<T>* x) {
  const V<T> base = x[0];
  V<T> sum[4] = {};
  for (int64_t i = 0; i < t.S; ++i) sum[i % 4] += x[i] - base;
  const V<T> mean = base + ((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<T>(t.S);
  V<T> before = base;
  for (int64_t i = 0; i < t.S; ++i) {
    const V<T> here = x[i];
    x[i] = t.window[i] * ((here - before) + T(1 - kPreemphasis) * (before - mean));
    before = here;
  }
  for (int64_t i = t.S; i < t.N; ++i) x[i] = V<T>{};
}

template <class T>
HUBERT_ECG_INLINE void power(const MfccTables<T>& t, const V<T>* X, V<T>* p) {
  if (t.first_bin == 0) p[0] = X[0] * X[0];
  for (int64_t k = std::max<int64_t>(t.first_bin, 1); k < t.last_bin; ++k) p[k] = X[k] * X[k] + X[t.N - k] * X[t.N - k];
}

template <class T>
HUBERT_ECG_INLINE void log_mel(const MfccTables<T>& t, const V<T>* p, V<T>* out) {
  const V<T> floor = V<T>{} + T(kEnergyFloor);
  for (int64_t m = 0; m < t.M; ++m) {
    const T* const weight = t.bank + m * (t.N / 2);
    V<T> energy = {};
    for (int64_t k = t.bands[m].first; k < t.bands[m].last; ++k) energy += weight[k] * p[k];
    out[m] = logarithm<T>(energy < floor ? floor : energy);
  }
}

template <class T>
HUBERT_ECG_INLINE void cosines(const MfccTables<T>& t, const V<T>* log_mel, V<T>* out) {
  constexpr int kColumns = 4;
  int64_t c = 0;
  for (; c + kColumns <= t.C; c += kColumns) {
    V<T> sum[kColumns] = {};
    for (int64_t m = 0; m < t.M; ++m) {
#pragma GCC unroll 4
      for (int r = 0; r < kColumns; ++r) sum[r] += t.dct[m * t.C + c + r] * log_mel[m];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kColumns; ++r) out[c + r] = sum[r];
  }
  for (; c < t.C; ++c) {
    V<T> sum = {};
    for (int64_t m = 0; m < t.M; ++m) sum += t.dct[m * t.C + c] * log_mel[m];
    out[c] = sum;
  }
}

// Frames [begin, end), a tile of lanes at a time.
template <class T>
HUBERT_ECG_TARGET static void mfcc(const MfccTables<T>& t, const T* frames, int64_t begin, int64_t end, void* scratch,
                                   T* out) {
  V<T>*const x = static_cast<V<T>*>(scratch), *const X = x + t.N, *const mel = X + t.N, *const cepstrum = mel + t.M;
  for (int64_t f = begin; f < end; f += Simd<T>::width) {
    const int64_t count = std::min<int64_t>(Simd<T>::width, end - f);
    load_tile<T>(frames + f * t.S, t.S, count, x);
    condition<T>(t, x);
    real_fft<T>(t.fft, x, X, t.circle);
    power<T>(t, X, x);
    log_mel<T>(t, x, mel);
    cosines<T>(t, mel, cepstrum);
    store_tile<T>(cepstrum, t.C, count, out + f * t.C);
  }
}

}  // namespace HUBERT_ECG_ISA
