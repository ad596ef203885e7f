// The inner loops of conv_norm_gelu.cpp for one instruction set (every_isa.h).
#include "halves_simd.h"
#include "vectors_simd.h"

#define HUBERT_ECG_INLINE HUBERT_ECG_TARGET static inline __attribute__((always_inline))

namespace HUBERT_ECG_ISA {

// exp(y) for y <= 0: 2^n p(r), |r| <= ln(2) / 2.
HUBERT_ECG_INLINE V<float> exponential(V<float> y) {
  y = y < -87.0f ? V<float>{} - 87.0f : y;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
  const V<float> shifted = y * 1.44269504f + kRound, n = shifted - kRound;
  const V<float> r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  V<float> p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I<float> bits = (I<float>)(shifted) << 23;
  return p * (V<float>)(bits + (127 << 23));
}

// The normal distribution at x, and its density times sqrt(2 pi).
HUBERT_ECG_INLINE void normal(V<float> x, V<float>& below, V<float>& density) {
  const V<float> t = x < 0.0f ? -x : x, u = 1.0f / (0.23f * t + 1.0f);
  density = exponential(t * t * -0.5f);
  // Fitted to exp(t^2 / 2) Phi(-t) / u; absolute error of Phi 1.4e-8 before rounding.
  V<float> p = u * -0.07377116861751037f + 0.2675927748303647f;
  p = p * u - 0.23118244141167826f;
  p = p * u + 0.24828842587238398f;
  p = p * u + 0.0032237672561506864f;
  p = p * u + 0.1044898546814973f;
  p = p * u + 0.08947897531233193f;
  p = p * u + 0.09187980513916698f;
  const V<float> tail = p * u * density;
  below = x < 0.0f ? tail : 1.0f - tail;
}

HUBERT_ECG_INLINE void normal(V<double> x, V<double>& below, V<double>& density) {
  for (int lane = 0; lane < Simd<double>::width; ++lane) {
    below[lane] = 0.5 * std::erfc(-x[lane] * 0.70710678118654752440);
    density[lane] = std::exp(-0.5 * x[lane] * x[lane]);
  }
}

// The first `count` numbers in memory, then zeros.
template <class Y, class T = Wide<Y>>
HUBERT_ECG_INLINE V<T> load_some(const Y* from, int64_t count) {
  constexpr int W = Simd<T>::width;
  Y some[W] = {};
  if (count < W) {
    if (count > 0) __builtin_memcpy(some, from, count * sizeof(Y));
    from = some;
  }
  if constexpr (std::is_same_v<Y, T>) {
    return load<V<T>>(from);
  } else {
    T wide[W];
#pragma omp simd
    for (int i = 0; i < W; ++i) wide[i] = widen_to(from[i], T());
    return load<V<T>>(wide);
  }
}

template <class Y, class T = Wide<Y>>
HUBERT_ECG_INLINE void store_some(Y* to, V<T> v, int64_t count) {
  constexpr int W = Simd<T>::width;
  T wide[W];
  Y some[W];
  store(wide, v);
  Y* const at = count < W ? some : to;
#pragma omp simd
  for (int i = 0; i < W; ++i) narrow(wide[i], at[i]);
  if (count > 0 && count < W) __builtin_memcpy(to, some, count * sizeof(Y));
}

// n of R frames and two vectors of channels.
template <class T, int R>
HUBERT_ECG_INLINE void convolve(const T* x, int64_t stride, int64_t k, const T* taps, const T* offset, int64_t P,
                                V<T> (&n)[R][2]) {
  constexpr int W = Simd<T>::width;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    n[r][0] = load<V<T>>(offset);
    n[r][1] = load<V<T>>(offset + W);
  }
  for (int64_t j = 0; j < k; ++j, taps += P) {
    const V<T> first = load<V<T>>(taps), second = load<V<T>>(taps + W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T value = x[r * stride + j];
      n[r][0] += first * value;
      n[r][1] += second * value;
    }
  }
}

template <class Y, int R, class T = Wide<Y>>
HUBERT_ECG_INLINE void forward_frames(const T* x, int64_t stride, int64_t k, const T* taps, const T* offset, int64_t P,
                                      int64_t C, Y* y) {
  constexpr int W = Simd<T>::width;
  for (int64_t c = 0; c < C; c += 2 * W) {
    V<T> n[R][2];
    convolve<T, R>(x, stride, k, taps + c, offset + c, P, n);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 2; ++i) {
        V<T> below, density;
        normal(n[r][i], below, density);
        store_some(y + r * C + c + i * W, n[r][i] * below, C - c - i * W);
      }
    }
  }
}

// Frames [0, F) of one record.
template <class Y, class T = Wide<Y>>
HUBERT_ECG_TARGET static void conv_forward(const T* x, int64_t stride, int64_t F, int64_t k, const T* taps,
                                           const T* offset, int64_t P, int64_t C, Y* y) {
  int64_t f = 0;
  for (; f + 4 <= F; f += 4) forward_frames<Y, 4>(x + f * stride, stride, k, taps, offset, P, C, y + f * C);
  for (; f < F; ++f) forward_frames<Y, 1>(x + f * stride, stride, k, taps, offset, P, C, y + f * C);
}

// g of R frames and kConvChannels channels, of which `channels` exist; adds its sum to `total`.
template <class Y, int R, class T = Wide<Y>>
HUBERT_ECG_INLINE void gradient_frames(const Y* grad, int64_t C, int64_t channels, const T* x, int64_t stride,
                                       int64_t k, const T* taps, const T* offset, int64_t P, T* g, T* total) {
  constexpr int W = Simd<T>::width;
  for (int64_t c = 0; c < kConvChannels; c += 2 * W) {
    V<T> n[R][2], sum[2] = {load<V<T>>(total + c), load<V<T>>(total + c + W)};
    convolve<T, R>(x, stride, k, taps + c, offset + c, P, n);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 2; ++i) {
        V<T> below, density;
        normal(n[r][i], below, density);
        const int64_t at = c + i * W;
        const V<T> slope = below + n[r][i] * density * T(0.39894228040143267794);
        // Channels that pad the last step must not turn a NaN into theirs.
        const V<T> value = at < channels ? load_some(grad + r * C + at, channels - at) * slope : V<T>{};
        store(g + r * kConvChannels + at, value);
        sum[i] += value;
      }
    }
    store(total + c, sum[0]);
    store(total + c + W, sum[1]);
  }
}

// Adds sum_f g x[stride f + j] for J taps from x on.
template <class T, int J>
HUBERT_ECG_INLINE void products(const T* x, int64_t stride, int64_t frames, const T* g, double* sums, int64_t P) {
  constexpr int W = Simd<T>::width;
  for (int64_t c = 0; c < kConvChannels; c += 2 * W) {
    V<T> sum[J][2] = {};
    for (int64_t f = 0; f < frames; ++f) {
      const V<T> first = load<V<T>>(g + f * kConvChannels + c), second = load<V<T>>(g + f * kConvChannels + c + W);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const T value = x[f * stride + j];
        sum[j][0] += first * value;
        sum[j][1] += second * value;
      }
    }
    for (int j = 0; j < J; ++j)
      for (int i = 0; i < 2; ++i)
        for (int lane = 0; lane < W; ++lane) sums[j * P + c + i * W + lane] += double(sum[j][i][lane]);
  }
}

// One record and kConvChannels channels. Sums run in T over 64 frames, then in double.
template <class Y, class T = Wide<Y>>
HUBERT_ECG_TARGET static void conv_backward(const Y* grad, int64_t C, int64_t channels, const T* x, int64_t stride,
                                            int64_t F, int64_t k, const T* taps, const T* offset, int64_t P,
                                            double* sums, T* windows) {
  constexpr int64_t kFrames = 64;
  alignas(64) T g[kFrames * kConvChannels];
  for (int64_t j = 0; j <= k; ++j)
    for (int64_t c = 0; c < kConvChannels; ++c) sums[j * P + c] = 0;
  for (int64_t begin = 0; begin < F; begin += kFrames) {
    const int64_t frames = std::min(kFrames, F - begin);
    const T* const own = x + begin * stride;
    alignas(64) T total[kConvChannels] = {};
    int64_t f = 0;
    for (; f + 4 <= frames; f += 4)
      gradient_frames<Y, 4>(grad + (begin + f) * C, C, channels, own + f * stride, stride, k, taps, offset, P,
                            g + f * kConvChannels, total);
    for (; f < frames; ++f)
      gradient_frames<Y, 1>(grad + (begin + f) * C, C, channels, own + f * stride, stride, k, taps, offset, P,
                            g + f * kConvChannels, total);
    for (int64_t c = 0; c < kConvChannels; ++c) sums[k * P + c] += double(total[c]);
    int64_t j = 0;
    for (; j + 5 <= k; j += 5) products<T, 5>(own + j, stride, frames, g, sums + j * P, P);
    for (; j < k; ++j) products<T, 1>(own + j, stride, frames, g, sums + j * P, P);
    for (f = 0; windows && f < frames; ++f) {
      for (j = 0; j < k; ++j) {
        V<T> sum{};
        for (int64_t c = 0; c < kConvChannels; c += Simd<T>::width)
          sum += load<V<T>>(g + f * kConvChannels + c) * load<V<T>>(taps + j * P + c);
        T all = 0;
        for (int lane = 0; lane < Simd<T>::width; ++lane) all += sum[lane];
        windows[(begin + f) * k + j] = all;
      }
    }
  }
}

}  // namespace HUBERT_ECG_ISA
