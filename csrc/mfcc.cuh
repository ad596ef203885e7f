// Cepstra on the GPU, by a thread and by a warp: for mfcc.cu and label.cu.
#pragma once
#include "frames.cuh"
#include "mfcc.h"

namespace hubert_ecg {
namespace {

// Coefficients that a thread keeps in registers.
constexpr int kMostCepstra = 16;

// The tables of the op, in global memory, and their sizes.
struct MfccView {
  const double *window, *circle, *bank, *dct;
  int S, N, M, C;
};

inline MfccView mfcc_view(const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct) {
  return {window.data<double>(), circle.data<double>(), bank.data<double>(), dct.data<double>(),
          int(window.size(0)),   int(circle.size(0)),   int(bank.size(0)),   int(dct.size(1))};
}

// The bins under a mel filter, and the share of a frame's energy that it must hold to be trusted in float32.
struct Band {
  int first, last;
  float least;
};

// What a block keeps in shared memory for cepstra in registers.
struct SmallMfcc {
  float* dct;     // [M][kMostCepstra]
  float* bank;    // [M][N / 2]
  float* window;  // [N], zeros from S on
  Band* bands;    // [M]
  double* exact;  // [warps][N + M], for frames in float64
};

__host__ __device__ inline size_t small_mfcc_bytes(int N, int M, int warps) {
  return (size_t(M) * kMostCepstra + M * (N / 2) + N) * sizeof(float) + M * sizeof(Band) + 8 +
         size_t(warps) * (N + M) * sizeof(double);
}

__device__ inline SmallMfcc small_mfcc(unsigned char* at, int N, int M) {
  SmallMfcc s;
  s.dct = reinterpret_cast<float*>(at);
  s.bank = s.dct + M * kMostCepstra;
  s.window = s.bank + M * (N / 2);
  s.bands = reinterpret_cast<Band*>(s.window + N);
  s.exact = reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(s.bands + M) + 7) / 8 * 8);
  return s;
}

// A warp to a filter.
__device__ inline void find_bands(const MfccView& t, Band* bands, int warp, int warps, int lane) {
  for (int m = warp; m < t.M; m += warps) {
    int first = t.N / 2, last = 0;
    float heaviest = 0;
    for (int k = lane; k < t.N / 2; k += kWarp) {
      const float weight = float(t.bank[m * (t.N / 2) + k]);
      if (weight == 0) continue;
      first = k < first ? k : first;
      last = k + 1;
      heaviest = weight > heaviest ? weight : heaviest;
    }
    first = -warp_max(-first);
    last = warp_max(last);
    heaviest = warp_max(heaviest);
    if (lane == 0) bands[m] = {first, last, float(kTrusted) * heaviest};
  }
}

// By all threads of the block; a barrier must follow.
__device__ inline void fill_small_mfcc(const MfccView& t, const SmallMfcc& s) {
  for (int i = threadIdx.x; i < t.M * kMostCepstra; i += blockDim.x) {
    const int c = i % kMostCepstra;
    s.dct[i] = c < t.C ? float(t.dct[i / kMostCepstra * t.C + c]) : 0.0f;
  }
  for (int i = threadIdx.x; i < t.M * (t.N / 2); i += blockDim.x) s.bank[i] = float(t.bank[i]);
  for (int i = threadIdx.x; i < t.N; i += blockDim.x) s.window[i] = i < t.S ? float(t.window[i]) : 0.0f;
  find_bands(t, s.bands, threadIdx.x / kWarp, blockDim.x / kWarp, threadIdx.x % kWarp);
}

// The cepstrum of one frame, by one thread. `row` is shared memory of its own, at least N / 2 + 1 long, and is
// overwritten. Returns how far the filters' energies are above what float32 is trusted with: below 0, or NaN, where one
// is not.
template <int N, bool kFull>
__device__ __forceinline__ float cepstrum_of_thread(const MfccView& t, const SmallMfcc& s, float* row,
                                                    float (&cepstrum)[kMostCepstra]) {
  float x[N];
  load_row<N, kFull>(row, t.S, x);
  // As on the CPU: samples are counted from the first one, so that a constant frame is exactly zero at any level, and
  // pre-emphasis is a difference of neighbours, small in a smooth signal.
  const float base = x[0];
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float& v = x[reversed<N>(i)];
    v -= base;
    if (kFull || i < t.S) sum[i % 4] += v;
  }
  const float offset = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(t.S);
  float before = 0, energy[4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float& v = x[reversed<N>(i)];
    const float here = v;
    v = kFull || i < t.S ? s.window[i] * ((here - before) + float(1 - kPreemphasis) * (before - offset)) : 0.0f;
    energy[i % 4] += v * v;
    before = here;
  }
  const float total = (energy[0] + energy[1]) + (energy[2] + energy[3]);
  fft_registers<N>(x);
  row[0] = x[0] * x[0];
#pragma unroll
  for (int k = 1; k < N / 2; ++k) row[k] = x[k] * x[k] + x[N - k] * x[N - k];

#pragma unroll
  for (int c = 0; c < kMostCepstra; ++c) cepstrum[c] = 0;
  float margin = float(kMostEnergy) - total;
  for (int m = 0; m < t.M; ++m) {
    const Band band = s.bands[m];
    const float* const weight = s.bank + m * (N / 2);
    float mel = 0;
    for (int k = band.first; k < band.last; ++k) mel += weight[k] * row[k];
    mel = mel < float(kEnergyFloor) ? float(kEnergyFloor) : mel;
    const float above = mel - band.least * total;
    margin = above < margin ? above : margin;
    const float level = logf(mel);
    const float4* const dct = reinterpret_cast<const float4*>(s.dct + m * kMostCepstra);
#pragma unroll
    for (int c = 0; c < kMostCepstra / 4; ++c) {
      const float4 w = dct[c];
      cepstrum[4 * c] += w.x * level;
      cepstrum[4 * c + 1] += w.y * level;
      cepstrum[4 * c + 2] += w.z * level;
      cepstrum[4 * c + 3] += w.w * level;
    }
  }
  return margin;
}

// The cepstrum of the frame x by a warp, in T. W: the type of window and circle, which may lie in shared memory.
//   y [N + M]: scratch; out(c, coefficient) is called by one lane for each c. Returns whether T is to be trusted.
template <class T, class W, class Read, class Write>
__device__ bool cepstrum_of_warp(const MfccView& t, const W* window, const W* circle, const Band* bands, T* y,
                                 const Read& x, const Write& out, int lane) {
  T* const levels = y + t.N;
  const WarpFft fft = WarpFft(t.N);
  const T base = x(0);
  T sum = 0;
  for (int i = lane; i < t.S; i += kWarp) sum += T(x(i)) - base;
  const T offset = warp_sum(sum) / T(t.S);
  T total = 0;
  for (int i = lane; i < t.N; i += kWarp) {
    T v = 0;
    if (i < t.S) {
      const T before = x(i ? i - 1 : 0);
      v = T(window[i]) * ((T(x(i)) - before) + T(1 - kPreemphasis) * ((before - base) - offset));
    }
    total += v * v;
    y[first_sample(fft.stages, i)] = v;
  }
  total = warp_sum(total);
  __syncwarp();
  join_warp(fft, y, circle, lane);
  for (int k = lane; k < t.N / 2; k += kWarp) y[k] = y[k] * y[k] + (k ? y[t.N - k] * y[t.N - k] : T(0));
  __syncwarp();
  T margin = T(kMostEnergy) - total;
  for (int m = lane; m < t.M; m += kWarp) {
    T mel = 0;
    for (int k = bands[m].first; k < bands[m].last; ++k) mel += T(t.bank[m * (t.N / 2) + k]) * y[k];
    mel = mel < T(kEnergyFloor) ? T(kEnergyFloor) : mel;
    const T above = mel - T(bands[m].least) * total;
    margin = above < margin || above != above ? above : margin;
    levels[m] = log(mel);
  }
  __syncwarp();
  for (int c = lane; c < t.C; c += kWarp) {
    T coefficient = 0;
    for (int m = 0; m < t.M; ++m) coefficient += T(t.dct[m * t.C + c]) * levels[m];
    out(c, coefficient);
  }
  __syncwarp();
  // A lane whose margin is NaN makes it NaN: no comparison with it holds.
  return __ballot_sync(kAllLanes, !(margin >= 0)) == 0;
}

}  // namespace
}  // namespace hubert_ecg
