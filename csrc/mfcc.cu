#include <algorithm>

#include "launch.h"
#include "mfcc.h"

namespace hubert_ecg {
namespace {

constexpr int kWarp = 32;
constexpr int kSharedBytes = 48 << 10;

// One warp to a frame; blockDim.x / 32 frames to a block at a time. The spectrum is a sum per bin: N is small.
// In float64 throughout: a smooth frame, whose filters hold a millionth of its energy, has no third digit in float32.
// Shared memory holds, for each frame, y [N], power [N / 2] and log_mel [M].
template <class T>
__global__ void mfcc_kernel(const T* frames, const double* window, const double* circle, const double* bank,
                            const double* dct, T* out, int64_t F, int S, int N, int M, int C) {
  HUBERT_ECG_SHARED(double, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  double* const y = shared + warp * (N + N / 2 + M);
  double* const power = y + N;
  double* const log_mel = power + N / 2;

  for (int64_t first = int64_t(blockIdx.x) * warps; first < F; first += int64_t(gridDim.x) * warps) {
    // Every thread takes every barrier: warps beyond the last frame compute it once more and write nothing.
    const bool inside = first + warp < F;
    const T* const x = frames + (inside ? first + warp : F - 1) * S;

    // As on the CPU: the mean is formed less the first sample, and pre-emphasis written as a difference of neighbours.
    const double base = x[0];
    double sum = 0;
    for (int i = lane; i < S; i += kWarp) sum += x[i] - base;
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const double mean = base + sum / S;
    for (int i = lane; i < N; i += kWarp) {
      const double before = i < S ? x[i ? i - 1 : 0] : mean;
      y[i] = i < S ? window[i] * ((x[i] - before) + (1 - kPreemphasis) * (before - mean)) : 0;
    }
    __syncthreads();

    for (int k = lane; k < N / 2; k += kWarp) {
      double re = 0, im = 0;
      for (int i = 0; i < S; ++i) {
        const int angle = (k * i) & (N - 1);
        re += y[i] * circle[2 * angle];
        im += y[i] * circle[2 * angle + 1];
      }
      power[k] = re * re + im * im;
    }
    __syncthreads();

    for (int m = lane; m < M; m += kWarp) {
      double energy = 0;
      for (int k = 0; k < N / 2; ++k) energy += bank[m * (N / 2) + k] * power[k];
      log_mel[m] = log(energy < kEnergyFloor ? kEnergyFloor : energy);
    }
    __syncthreads();

    for (int c = lane; c < C; c += kWarp) {
      double coefficient = 0;
      for (int m = 0; m < M; ++m) coefficient += dct[m * C + c] * log_mel[m];
      if (inside) out[(first + warp) * C + c] = static_cast<T>(coefficient);
    }
    __syncthreads();
  }
}

template <class T>
void run(const Tensor& frames, const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct,
         const Tensor& out, intptr_t stream) {
  check_mfcc<T>(frames, window, circle, bank, dct, out);
  const int64_t F = frames.size(0), N = circle.size(0), M = bank.size(0);
  if (F == 0) return;
  const int64_t bytes = (N + N / 2 + M) * static_cast<int64_t>(sizeof(double)),
                warps = std::min<int64_t>(4, kSharedBytes / bytes);
  HUBERT_ECG_CHECK(warps > 0, "mfcc: frames must fit the shared memory of a block, ", kSharedBytes, " bytes, got ",
                   frames, ", which take ", bytes, "; compute them on the CPU");
  const int64_t blocks = std::min<int64_t>((F + warps - 1) / warps, 1 << 16);
  HUBERT_ECG_LAUNCH(mfcc_kernel<T>, static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp),
                    static_cast<unsigned>(warps * bytes), stream, frames.data<T>(), window.data<double>(),
                    circle.data<double>(), bank.data<double>(), dct.data<double>(), out.data<T>(), F,
                    static_cast<int>(frames.size(1)), static_cast<int>(N), static_cast<int>(M),
                    static_cast<int>(dct.size(1)));
  check_cuda("mfcc", cudaGetLastError());
}

}  // namespace

void mfcc_cuda(Tensor frames, Tensor window, Tensor circle, Tensor bank, Tensor dct, Tensor out, intptr_t stream) {
  frames.is<double>() ? run<double>(frames, window, circle, bank, dct, out, stream)
                      : run<float>(frames, window, circle, bank, dct, out, stream);
}

}  // namespace hubert_ecg
