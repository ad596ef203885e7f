// Frames on the GPU: what mfcc.cu, time_freq.cu and label.cu share.
//
// A frame of up to kMostInRegisters samples belongs to one thread, which transforms it in registers; a warp brings 32
// frames into shared memory in wide reads first. Any other frame, and one that needs float64, belongs to a warp.
#pragma once
#include "launch.h"

namespace hubert_ecg {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMostInRegisters = 64;

template <class T>
__device__ T warp_sum(T v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

template <class T>
__device__ T warp_max(T v) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, v, step);
    v = other > v ? other : v;
  }
  return v;
}

// Floats from one row of a tile of frames to the next. Lanes that read the same column of their rows then meet
// different banks: 16 bytes at a time where rows are multiples of 4 long, else one number at a time.
__host__ __device__ inline int row_pitch(int S) { return S % 4 == 0 ? S + 4 - S % 8 : S | 1; }

// Begins to copy `count` rows of length S, which lie end to end, into a tile; copy_wait() and __syncwarp() end it.
__device__ inline void copy_rows(const float* from, int count, int S, float* tile, int pitch, int lane) {
  const int size = count * S;
  if (S % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    for (int at = 4 * lane; at < size; at += 4 * kWarp)
      __pipeline_memcpy_async(tile + at / S * pitch + at % S, from + at, 16);
  } else {
    for (int at = lane; at < size; at += kWarp) __pipeline_memcpy_async(tile + at / S * pitch + at % S, from + at, 4);
  }
  __pipeline_commit();
}
__device__ inline void copy_wait() { __pipeline_wait_prior(0); }

// Writes n numbers that lie end to end in shared memory.
__device__ inline void write_numbers(const float* from, int n, float* to, int lane) {
  int done = 0;
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    done = n / 4 * 4;
    for (int at = 4 * lane; at < done; at += 4 * kWarp)
      *reinterpret_cast<float4*>(to + at) = *reinterpret_cast<const float4*>(from + at);
  }
  for (int at = done + lane; at < n; at += kWarp) to[at] = from[at];
}

// The place of sample i in a transform that begins with samples whose numbers have reversed bits.
template <int N>
__host__ __device__ constexpr int reversed(int i) {
  int r = 0;
  for (int bit = 1, back = N / 2; bit < N; bit *= 2, back /= 2) r += i & bit ? back : 0;
  return r;
}

// A frame of S samples into the order of the transform; kFull: S is N, and the row begins at 16 bytes.
template <int N, bool kFull>
__device__ __forceinline__ void load_row(const float* row, int S, float (&x)[N]) {
  if constexpr (kFull) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(row + i);
      x[reversed<N>(i)] = v.x;
      x[reversed<N>(i + 1)] = v.y;
      x[reversed<N>(i + 2)] = v.z;
      x[reversed<N>(i + 3)] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[reversed<N>(i)] = i < S ? row[i] : 0.0f;
  }
}

// cos(2 pi j / 64) for j <= 16.
template <int N>
__device__ __forceinline__ float quarter_wave(int j) {
  constexpr float wave[17] = {1.0f,        0.99518473f, 0.98078528f, 0.95694034f, 0.92387953f, 0.88192126f,
                              0.83146961f, 0.77301045f, 0.70710678f, 0.63439328f, 0.55557023f, 0.47139674f,
                              0.38268343f, 0.29028468f, 0.19509032f, 0.09801714f, 0.0f};
  return wave[j * (64 / N)];
}

// Two transforms of length kHalf to one, for all of them in x, then on to the whole. In the order of frames_simd.h: Re
// X_k at k for k <= n / 2, Im X_k at n - k, so that each butterfly writes where it read.
template <int N, int kHalf>
__device__ __forceinline__ void join_registers(float (&x)[N]) {
#pragma unroll
  for (int at = 0; at < N; at += 2 * kHalf) {
    const float even = x[at], odd = x[at + kHalf];
    x[at] = even + odd;
    x[at + kHalf] = even - odd;
    if constexpr (kHalf >= 2) x[at + kHalf + kHalf / 2] = -x[at + kHalf + kHalf / 2];
#pragma unroll
    for (int k = 1; k < kHalf / 2; ++k) {
      // A turn has 2 kHalf parts; the sine of k of them is the cosine of what is missing to a quarter.
      const float c = quarter_wave<2 * kHalf>(k), s = quarter_wave<2 * kHalf>(kHalf / 2 - k);
      const float er = x[at + k], ei = x[at + kHalf - k], re = x[at + kHalf + k], im = x[at + 2 * kHalf - k];
      const float tr = c * re + s * im, ti = c * im - s * re;
      x[at + k] = er + tr;
      x[at + kHalf - k] = er - tr;
      x[at + kHalf + k] = ti - ei;
      x[at + 2 * kHalf - k] = ti + ei;
    }
  }
  if constexpr (2 * kHalf < N) join_registers<N, 2 * kHalf>(x);
}

// The transform of N real samples, of which sample i stands at reversed<N>(i).
template <int N>
__device__ __forceinline__ void fft_registers(float (&x)[N]) {
  static_assert(N <= kMostInRegisters);
  join_registers<N, 1>(x);
}

// How a warp transforms n = odd * 2^stages samples, as frames.h does.
struct WarpFft {
  int n, odd, stages;
  __host__ __device__ explicit WarpFft(int64_t length) : n(int(length)), odd(int(length)), stages(0) {
    for (; odd > 1 && odd % 2 == 0; odd /= 2) ++stages;
  }
};

// The first sample of transform b of odd length.
__device__ inline int first_sample(int stages, int b) { return stages ? int(__brev(unsigned(b)) >> (32 - stages)) : 0; }

// Joins the transforms of odd length in X to one of n. circle [n, 2]: cos and sin of 2 pi j / n.
template <class T, class W>
__device__ void join_warp(const WarpFft& fft, T* X, const W* circle, int lane) {
  for (int half = fft.odd, joins = fft.n / fft.odd / 2; joins > 0; half *= 2, joins /= 2) {
    const int tasks = (half + 1) / 2;
    for (int task = lane; task < joins * tasks; task += kWarp) {
      T* const x = X + task / tasks * 2 * half;
      const int k = task % tasks;
      if (k == 0) {
        const T even = x[0], odd = x[half];
        x[0] = even + odd;
        x[half] = even - odd;
        if (half % 2 == 0) x[half + half / 2] = -x[half + half / 2];
      } else {
        const T c = T(circle[2 * k * joins]), s = T(circle[2 * k * joins + 1]);
        const T er = x[k], ei = x[half - k], re = x[half + k], im = x[2 * half - k];
        const T tr = c * re + s * im, ti = c * im - s * re;
        x[k] = er + tr;
        x[half - k] = er - tr;
        x[half + k] = ti - ei;
        x[2 * half - k] = ti + ei;
      }
    }
    __syncwarp();
  }
}

// The transforms of odd length: x [n] in their own order is overwritten, X [n] written. Sums x_j + x_{m-j} meet the
// cosines, differences the sines.
template <class T, class W>
__device__ void odd_warp(const WarpFft& fft, T* x, T* X, const W* circle, int lane) {
  const int m = fft.odd, half = m / 2, turn = fft.n / m;
  for (int task = lane; task < turn * half; task += kWarp) {
    T* const row = x + first_sample(fft.stages, task / half);
    const int j = task % half + 1;
    const T a = row[j * turn], b = row[(m - j) * turn];
    row[j * turn] = a + b;
    row[(m - j) * turn] = a - b;
  }
  __syncwarp();
  for (int task = lane; task < turn * (half + 1); task += kWarp) {
    const int b = task / (half + 1), k = task % (half + 1);
    const T* const row = x + first_sample(fft.stages, b);
    T re = row[0], im = 0;
    for (int j = 1, angle = 0; j <= half; ++j) {
      angle += k;
      angle -= angle >= m ? m : 0;
      re += T(circle[2 * angle * turn]) * row[j * turn];
      im -= T(circle[2 * angle * turn + 1]) * row[(m - j) * turn];
    }
    X[b * m + k] = re;
    if (k) X[b * m + m - k] = im;
  }
  __syncwarp();
}

}  // namespace
}  // namespace hubert_ecg
