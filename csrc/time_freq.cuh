// Statistics of a frame on the GPU, by a thread and by a warp: for time_freq.cu and label.cu.
#pragma once
#include <cfloat>

#include "frames.cuh"
#include "time_freq.h"

namespace hubert_ecg {
namespace {

// What is summed over the samples of a frame, and then over its bins.
template <class T>
struct Moments {
  T low, high, mean, mean_square, scale, second, third, fourth, not_finite;
};
template <class T>
struct Spectrum {
  T top, total, spread;
};

template <class T>
__device__ __forceinline__ void write_features(const Moments<T>& m, const Spectrum<T>& s, T n,
                                               T (&feature)[kTimeFreqFeatures]) {
  const T rms = sqrt(m.mean_square), scaled_variance = m.second / n, scaled_deviation = sqrt(scaled_variance),
          deviation = scaled_deviation / m.scale, peak = m.high > -m.low ? m.high : -m.low;
  const bool flat = deviation <= kFlat<T> * peak;
  feature[0] = m.low;
  feature[1] = m.high;
  feature[2] = m.mean;
  feature[3] = rms;
  feature[4] = deviation * deviation;
  feature[5] = deviation;
  feature[6] = m.mean_square;
  feature[7] = peak;
  feature[8] = m.high - m.low;
  feature[9] = peak / (rms + T(kCrestEpsilon));
  feature[10] = flat ? T(0) : m.third / n / (scaled_variance * scaled_deviation);
  feature[11] = flat ? T(0) : m.fourth / n / (scaled_variance * scaled_variance) - T(3);
  feature[12] = s.top;
  feature[13] = s.total;
  feature[14] = s.total / n;
  feature[15] = s.spread / n;
#pragma unroll
  for (int d = 0; d < kTimeFreqFeatures; ++d) feature[d] += m.not_finite;
}

// In units of the farthest sample's distance from the mean, powers up to the fourth neither vanish nor overflow.
template <class T>
__device__ __forceinline__ T unit_scale(T low, T high, T base, T offset) {
  const T above = high - base - offset, below = offset - (low - base), farthest = above > below ? above : below;
  return farthest >= T(sizeof(T) == sizeof(float) ? FLT_MIN : DBL_MIN) ? T(1) / farthest : T(1);
}

// The features of a frame of S = N samples in the registers of one thread, in the order of the transform (overwritten).
template <int N>
__device__ __forceinline__ void time_freq_of_thread(float (&x)[N], float (&feature)[kTimeFreqFeatures]) {
  constexpr float n = N;
  // The first sample is taken off before the mean is formed, so that a constant frame has no variance at any level.
  const float base = x[0];
  Moments<float> m = {};
  m.low = m.high = base;
  float sum[4] = {}, squares[4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float v = x[i];
    m.low = v < m.low ? v : m.low;
    m.high = v > m.high ? v : m.high;
    m.not_finite += v - v;
    squares[i % 4] += v * v;
    x[i] = v - base;
    sum[i % 4] += x[i];
  }
  m.mean_square = ((squares[0] + squares[1]) + (squares[2] + squares[3])) / n;
  const float offset = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / n;
  m.mean = base + offset;
  m.scale = unit_scale(m.low, m.high, base, offset);
  // Four sums of each: one would round off every small sample against a spike.
  float seconds[4] = {}, thirds[4] = {}, fourths[4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] -= offset;
    const float v = x[i] * m.scale, v2 = v * v;
    seconds[i % 4] += v2;
    thirds[i % 4] += v2 * v;
    fourths[i % 4] += v2 * v2;
  }
  m.second = (seconds[0] + seconds[1]) + (seconds[2] + seconds[3]);
  m.third = (thirds[0] + thirds[1]) + (thirds[2] + thirds[3]);
  m.fourth = (fourths[0] + fourths[1]) + (fourths[2] + fourths[3]);

  fft_registers<N>(x);
  // Bins 0 and N / 2 stand alone; every other bin has a mirror image of the same power.
  const float constant = n * m.mean * m.mean, middle = x[N / 2] * x[N / 2] / n;
  Spectrum<float> s = {};
  s.top = constant > middle ? constant : middle;
#pragma unroll
  for (int k = 1; k < N / 2; ++k) {
    x[k] = (x[k] * x[k] + x[N - k] * x[N - k]) * (1 / n);
    s.top = x[k] > s.top ? x[k] : s.top;
    s.total += x[k];
  }
  s.total = 2 * s.total + constant + middle;
  const float mean = s.total / n;
#pragma unroll
  for (int k = 1; k < N / 2; ++k) s.spread += (x[k] - mean) * (x[k] - mean);
  s.spread = 2 * s.spread + (constant - mean) * (constant - mean) + (middle - mean) * (middle - mean);
  write_features(m, s, n, feature);
}

// The features of the frame x(0 .. S - 1) by a warp; every lane gets them.
//   y [2 S]: scratch; circle [S, 2], of any type
template <class T, class W, class Read>
__device__ void time_freq_of_warp(int S, const W* circle, T* y, const Read& x, T (&feature)[kTimeFreqFeatures],
                                  int lane) {
  const WarpFft fft(S);
  const T n = T(S), base = x(0);
  T* const X = y + S;
  Moments<T> m = {};
  m.low = m.high = base;
  T sum = 0;
  for (int i = lane; i < S; i += kWarp) {
    const T v = x(i);
    m.low = v < m.low ? v : m.low;
    m.high = v > m.high ? v : m.high;
    m.not_finite += v - v;
    m.mean_square += v * v;
    sum += v - base;
  }
  m.low = -warp_max(-m.low);
  m.high = warp_max(m.high);
  m.not_finite = warp_sum(m.not_finite);
  m.mean_square = warp_sum(m.mean_square) / n;
  const T offset = warp_sum(sum) / n;
  m.mean = base + offset;
  m.scale = unit_scale(m.low, m.high, base, offset);
  // Without an odd factor, samples go straight to where the transform wants them.
  for (int i = lane; i < S; i += kWarp) {
    const T centred = (T(x(i)) - base) - offset, v = centred * m.scale, v2 = v * v;
    if (fft.odd == 1)
      X[first_sample(fft.stages, i)] = centred;
    else
      y[i] = centred;
    m.second += v2;
    m.third += v2 * v;
    m.fourth += v2 * v2;
  }
  m.second = warp_sum(m.second);
  m.third = warp_sum(m.third);
  m.fourth = warp_sum(m.fourth);
  __syncwarp();
  if (fft.odd > 1) odd_warp(fft, y, X, circle, lane);
  join_warp(fft, X, circle, lane);

  const auto power = [&](int k) {
    if (k == 0) return n * m.mean * m.mean;
    return (X[k] * X[k] + (2 * k == S ? T(0) : X[S - k] * X[S - k])) / n;
  };
  Spectrum<T> s = {};
  for (int k = lane; 2 * k <= S; k += kWarp) {
    const T p = power(k);
    s.top = p > s.top ? p : s.top;
    s.total += k == 0 || 2 * k == S ? p : 2 * p;
  }
  s.top = warp_max(s.top);
  s.total = warp_sum(s.total);
  for (int k = lane; 2 * k <= S; k += kWarp) {
    const T off = power(k) - s.total / n;
    s.spread += (k == 0 || 2 * k == S ? T(1) : T(2)) * off * off;
  }
  s.spread = warp_sum(s.spread);
  __syncwarp();
  write_features(m, s, n, feature);
}

}  // namespace
}  // namespace hubert_ecg
