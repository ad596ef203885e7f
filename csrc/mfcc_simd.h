// The inner loops of mfcc.cpp for one instruction set (every_isa.h).
#include "frames_simd.h"

namespace HUBERT_ECG_ISA {

// x_i becomes y_i = w_i (x_i - 0.97 x_{i-1}) of the frame less its mean. Written as a difference of neighbours, which
// in a smooth signal is small and exact, plus 0.03 of the sample before, counted from the first sample as the mean
// (`offset`) is: the rounding is that of y, not that of x, and not that of the level that the signal lies at.
template <class T>
HUBERT_ECG_INLINE void emphasise(T window, V<T> base, V<T> offset, V<T>& x, V<T>& before, V<T>& energy) {
  const V<T> here = x;
  x = window * ((here - before) + T(1 - kPreemphasis) * ((before - base) - offset));
  energy += x * x;
  before = here;
}

// Emphasises a tile and fills it with zeros. The mean is formed less the first sample, so that a constant frame is
// exactly zero at any level. Returns the sum of y_i^2.
template <class T>
HUBERT_ECG_INLINE V<T> condition(const MfccTables<T>& t, V<T>* x) {
  constexpr int kSums = 4;  // at a time, because one would wait for itself
  const V<T> base = x[0];
  V<T> sum[kSums] = {}, energy[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= t.S; i += kSums) {
#pragma GCC unroll 4
    for (int r = 0; r < kSums; ++r) sum[r] += x[i + r] - base;
  }
  for (; i < t.S; ++i) sum[0] += x[i] - base;
  const V<T> offset = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<T>(t.S);
  V<T> before = base;
  for (i = 0; i + kSums <= t.S; i += kSums) {
#pragma GCC unroll 4
    for (int r = 0; r < kSums; ++r) emphasise<T>(t.window[i + r], base, offset, x[i + r], before, energy[r]);
  }
  for (; i < t.S; ++i) emphasise<T>(t.window[i], base, offset, x[i], before, energy[0]);
  for (; i < t.N; ++i) x[i] = V<T>{};
  return (energy[0] + energy[1]) + (energy[2] + energy[3]);
}

template <class T>
HUBERT_ECG_INLINE void power(const MfccTables<T>& t, const V<T>* X, V<T>* p) {
  if (t.first_bin == 0) p[0] = X[0] * X[0];
  for (int64_t k = std::max<int64_t>(t.first_bin, 1); k < t.last_bin; ++k) p[k] = X[k] * X[k] + X[t.N - k] * X[t.N - k];
}

// Returns how far the filters' energies are above what is trusted of a frame of energy `total`: below 0, or NaN, where
// one is not.
template <class T, class Out>
HUBERT_ECG_INLINE V<T> log_mel(const MfccTables<T>& t, const V<T>* p, V<T> total, V<T>* out) {
  const V<T> floor = V<T>{} + T(kEnergyFloor);
  V<T> margin = T(kMostEnergy) - total;
  const T* weight = t.bank.data();
  for (int64_t m = 0; m < t.M; ++m) {
    const Band<T> band = t.bands[m];
    V<T> energy = {};
    for (int64_t k = band.first; k < band.last; ++k) energy += *weight++ * p[k];
    const V<T> above = energy - band.least * total;
    margin = above < margin ? above : margin;
    out[m] = energy;
  }
  for (int64_t m = 0; m < t.M; ++m) out[m] = logarithm<T, Out>(floor > out[m] ? floor : out[m]);
  return margin;
}

// Coefficients from c on, kColumns at a time, then half as many, at last one by one.
template <class T, int kColumns>
HUBERT_ECG_INLINE void cosines(const MfccTables<T>& t, const V<T>* log_mel, int64_t c, V<T>* out) {
  for (; c + kColumns <= t.C; c += kColumns) {
    V<T> sum[kColumns] = {};
    const T* weight = t.dct.data() + c;
    for (int64_t m = 0; m < t.M; ++m, weight += t.C) {
      const V<T> log = log_mel[m];
#pragma GCC unroll 16
      for (int r = 0; r < kColumns; ++r) sum[r] += weight[r] * log;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kColumns; ++r) out[c + r] = sum[r];
  }
  if constexpr (kColumns > 1) cosines<T, kColumns / 2>(t, log_mel, c, out);
}

// x [N] holds a tile of frames; behind it lies room for N + M + C more. Writes cepstrum [C], which lies at the end of
// that room, to the precision of Out, and returns the margin of log_mel.
template <class T, class Out = T>
HUBERT_ECG_INLINE V<T> cepstra(const MfccTables<T>& t, V<T>* x, V<T>*& cepstrum, Ahead ahead) {
  V<T>*const X = x + t.N, *const mel = X + t.N;
  cepstrum = mel + t.M;
  ahead.fetch();
  const V<T> total = condition<T>(t, x);
  ahead.fetch();
  real_fft<T>(t.fft, x, X, t.circle.data());
  ahead.fetch();
  power<T>(t, X, x);
  const V<T> margin = log_mel<T, Out>(t, x, total, mel);
  ahead.fetch();
  cosines<T, 13>(t, mel, 0, cepstrum);
  return margin;
}

// The frames listed in `which`, at most a tile of them, in float64.
HUBERT_ECG_TARGET static void mfcc_again(const MfccTables<double>& t, const float* frames, const int64_t* which,
                                         int count, void* scratch, float* out) {
  constexpr int W = Simd<double>::width;
  V<double>*const x = static_cast<V<double>*>(scratch), *cepstrum;
  const float* row[W];
  for (int lane = 0; lane < W; ++lane) row[lane] = frames + which[std::min(lane, count - 1)] * t.S;
  load_rows<double>(row, t.S, x);
  cepstra<double, float>(t, x, cepstrum, Ahead(x, 0, 1));
  for (int lane = 0; lane < count; ++lane)
    for (int64_t c = 0; c < t.C; ++c) out[which[lane] * t.C + c] = static_cast<float>(cepstrum[c][lane]);
}

// Frames [begin, end), a tile of lanes at a time.
template <class T>
HUBERT_ECG_TARGET static void mfcc(const MfccTables<T>& t, const MfccTables<double>& exact, const T* frames,
                                   int64_t begin, int64_t end, void* scratch, T* out) {
  constexpr int kAgain = Simd<double>::width;
  int64_t doubtful[Simd<T>::width + kAgain];
  int num_doubtful = 0;
  V<T>* const x = static_cast<V<T>*>(scratch);
  V<T>* cepstrum;
  for (int64_t f = begin; f < end; f += Simd<T>::width) {
    const int64_t count = std::min<int64_t>(Simd<T>::width, end - f);
    load_tile<T>(frames + f * t.S, t.S, count, x);
    const V<T> margin = cepstra<T>(t, x, cepstrum, Ahead(frames + (f + count) * t.S, count * t.S * sizeof(T), 4));
    store_tile<T>(cepstrum, t.C, count, out + f * t.C);
    if constexpr (sizeof(T) < sizeof(double)) {
      for (int64_t lane = 0; lane < count; ++lane) {
        doubtful[num_doubtful] = f + lane;
        num_doubtful += !(margin[lane] >= 0);
      }
      for (; num_doubtful >= kAgain; num_doubtful -= kAgain)
        mfcc_again(exact, frames, doubtful + num_doubtful - kAgain, kAgain, scratch, out);
    }
  }
  if constexpr (sizeof(T) < sizeof(double)) {
    if (num_doubtful) mfcc_again(exact, frames, doubtful, num_doubtful, scratch, out);
  }
}

}  // namespace HUBERT_ECG_ISA
