#include <algorithm>
#include <cfloat>

#include "launch.h"
#include "time_freq.h"

namespace hubert_ecg {
namespace {

constexpr int kWarp = 32;
constexpr int kSharedBytes = 48 << 10;

template <class T>
__device__ T warp_sum(T v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <class T>
__device__ T warp_max(T v) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, v, step);
    v = other > v ? other : v;
  }
  return v;
}

// One warp to a frame; blockDim.x / 32 frames to a block at a time. The spectrum is a sum per bin: S is small.
// Shared memory holds, for each frame, the frame less its mean [S] and the power of bins 0 .. S / 2.
template <class T>
__global__ void time_freq_kernel(const T* frames, const T* circle, T* out, int64_t F, int S) {
  HUBERT_ECG_SHARED(T, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, bins = S / 2 + 1;
  T* const y = shared + warp * (S + bins);
  T* const power = y + S;
  const T n = T(S);

  for (int64_t first = int64_t(blockIdx.x) * warps; first < F; first += int64_t(gridDim.x) * warps) {
    // Every thread takes every barrier: warps beyond the last frame compute it once more and write nothing.
    const bool inside = first + warp < F;
    const T* const x = frames + (inside ? first + warp : F - 1) * S;

    // The first sample is taken off before the mean is formed, so that a constant frame has no variance at any level.
    const T base = x[0];
    T low = base, high = base, sum = 0, squares = 0, not_finite = 0;
    for (int i = lane; i < S; i += kWarp) {
      const T v = x[i];
      low = v < low ? v : low;
      high = v > high ? v : high;
      sum += v - base;
      squares += v * v;
      not_finite += v - v;
    }
    low = -warp_max(-low);
    high = warp_max(high);
    not_finite = warp_sum(not_finite);
    const T offset = warp_sum(sum) / n, mean_square = warp_sum(squares) / n, mean = base + offset;
    // In units of the farthest sample's distance, powers up to the fourth neither vanish nor overflow.
    const T above = high - base - offset, below = offset - (low - base), farthest = above > below ? above : below;
    const T smallest = sizeof(T) == sizeof(float) ? T(FLT_MIN) : T(DBL_MIN);
    const T scale = farthest >= smallest ? T(1) / farthest : T(1);
    T second = 0, third = 0, fourth = 0;
    for (int i = lane; i < S; i += kWarp) {
      y[i] = (x[i] - base) - offset;
      const T v = y[i] * scale, v2 = v * v;
      second += v2;
      third += v2 * v;
      fourth += v2 * v2;
    }
    const T scaled_variance = warp_sum(second) / n, scaled_deviation = sqrt(scaled_variance),
            deviation = scaled_deviation / scale;
    third = warp_sum(third) / n;
    fourth = warp_sum(fourth) / n;
    __syncthreads();

    // Bins 0 and S / 2 stand alone; every other bin has a mirror image of the same power.
    T top = 0, total = 0;
    for (int k = lane; k < bins; k += kWarp) {
      T re = 0, im = 0;
      for (int i = 0, angle = 0; i < S; ++i) {
        re += y[i] * circle[2 * angle];
        im += y[i] * circle[2 * angle + 1];
        angle += k;
        angle = angle >= S ? angle - S : angle;
      }
      const T p = k ? (re * re + im * im) / n : n * mean * mean;
      power[k] = p;
      top = p > top ? p : top;
      total += k == 0 || 2 * k == S ? p : 2 * p;
    }
    top = warp_max(top);
    total = warp_sum(total);
    __syncthreads();
    T spread = 0;
    for (int k = lane; k < bins; k += kWarp) {
      const T off = power[k] - total / n;
      spread += (k == 0 || 2 * k == S ? T(1) : T(2)) * off * off;
    }
    spread = warp_sum(spread) / n;

    if (lane == 0 && inside) {
      const T rms = sqrt(mean_square), peak = high > -low ? high : -low;
      const bool flat = deviation <= kFlat<T> * peak;
      const T features[kTimeFreqFeatures] = {low,
                                             high,
                                             mean,
                                             rms,
                                             deviation * deviation,
                                             deviation,
                                             mean_square,
                                             peak,
                                             high - low,
                                             peak / (rms + T(kCrestEpsilon)),
                                             flat ? T(0) : third / (scaled_variance * scaled_deviation),
                                             flat ? T(0) : fourth / (scaled_variance * scaled_variance) - T(3),
                                             top,
                                             total,
                                             total / n,
                                             spread};
      for (int d = 0; d < kTimeFreqFeatures; ++d)
        out[(first + warp) * kTimeFreqFeatures + d] = features[d] + not_finite;
    }
    __syncthreads();
  }
}

template <class T>
void run(const Tensor& frames, const Tensor& circle, const Tensor& out, intptr_t stream) {
  check_time_freq<T>(frames, circle, out);
  const int64_t F = frames.size(0), S = frames.size(1);
  if (F == 0) return;
  const int64_t bytes = (S + S / 2 + 1) * static_cast<int64_t>(sizeof(T)),
                warps = std::min<int64_t>(4, kSharedBytes / bytes);
  HUBERT_ECG_CHECK(warps > 0, "time_freq: frames must fit the shared memory of a block, ", kSharedBytes, " bytes, got ",
                   frames, ", which take ", bytes, "; compute them on the CPU");
  const int64_t blocks = std::min<int64_t>((F + warps - 1) / warps, 1 << 16);
  HUBERT_ECG_LAUNCH(time_freq_kernel<T>, static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp),
                    static_cast<unsigned>(warps * bytes), stream, frames.data<T>(), circle.data<T>(), out.data<T>(), F,
                    static_cast<int>(S));
  check_cuda("time_freq", cudaGetLastError());
}

}  // namespace

void time_freq_cuda(Tensor frames, Tensor circle, Tensor out, intptr_t stream) {
  frames.is<double>() ? run<double>(frames, circle, out, stream) : run<float>(frames, circle, out, stream);
}

}  // namespace hubert_ecg
