#include <algorithm>

#include "time_freq.cuh"

namespace hubert_ecg {
namespace {

constexpr int kWarps = 4;

// 32 frames to a warp at a time, each in the registers of one lane.
// Shared memory: for each warp a tile of 32 frames, where their features lie in the end.
template <int N>
__global__ void __launch_bounds__(kWarps* kWarp, 4) time_freq_small(const float* frames, float* out, int64_t F) {
  constexpr int kPitch = N + 4;
  HUBERT_ECG_SHARED(float, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* const tile = shared + warp * kWarp * kPitch;
  const int64_t step = int64_t(gridDim.x) * kWarps * kWarp;
  for (int64_t first = (int64_t(blockIdx.x) * kWarps + warp) * kWarp; first < F; first += step) {
    const int count = int(F - first < kWarp ? F - first : kWarp);
    copy_rows(frames + first * N, count, N, tile, kPitch, lane);
    copy_wait();
    __syncwarp();
    float x[N], feature[kTimeFreqFeatures];
    load_row<N, true>(tile + lane * kPitch, N, x);
    time_freq_of_thread<N>(x, feature);
    __syncwarp();
#pragma unroll
    for (int d = 0; d < kTimeFreqFeatures; ++d) tile[lane * (kTimeFreqFeatures + 1) + d] = feature[d];
    __syncwarp();
    float* const to = out + first * kTimeFreqFeatures;
    for (int at = lane; at < count * kTimeFreqFeatures; at += kWarp)
      to[at] = tile[at / kTimeFreqFeatures * (kTimeFreqFeatures + 1) + at % kTimeFreqFeatures];
    __syncwarp();
  }
}

// A frame to a warp, of any length. Shared memory: circle [S, 2], and for each warp 2 S numbers.
template <class T>
__global__ void time_freq_any(const T* frames, const T* circle, T* out, int64_t F, int S) {
  HUBERT_ECG_SHARED(T, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  T* const near = shared + warps * 2 * S;
  for (int i = threadIdx.x; i < 2 * S; i += blockDim.x) near[i] = circle[i];
  __syncthreads();
  for (int64_t f = int64_t(blockIdx.x) * warps + warp; f < F; f += int64_t(gridDim.x) * warps) {
    const T* const frame = frames + f * S;
    T feature[kTimeFreqFeatures];
    time_freq_of_warp<T>(S, near, shared + warp * 2 * S, [&](int i) { return frame[i]; }, feature, lane);
#pragma unroll
    for (int d = 0; d < kTimeFreqFeatures; ++d)
      if (lane == d) out[f * kTimeFreqFeatures + d] = feature[d];
  }
}

template <int N>
void run_small(const Tensor& frames, const Tensor& out, intptr_t stream) {
  const int64_t F = frames.size(0), each = kWarps * kWarp;
  const int64_t blocks = std::min<int64_t>((F + each - 1) / each, 4 * num_multiprocessors());
  HUBERT_ECG_LAUNCH(time_freq_small<N>, static_cast<unsigned>(blocks), kWarps * kWarp,
                    kWarps * kWarp * (N + 4) * sizeof(float), stream, frames.data<float>(), out.data<float>(), F);
  check_cuda("time_freq", cudaGetLastError());
}

template <class T>
void run_any(const Tensor& frames, const Tensor& circle, const Tensor& out, intptr_t stream) {
  const int64_t F = frames.size(0), S = frames.size(1), each = 2 * S * int64_t(sizeof(T)), most = most_shared_bytes(),
                warps = std::min<int64_t>(kWarps, most / each - 1);
  HUBERT_ECG_CHECK(warps > 0, "time_freq: frames must fit the shared memory of a block, ", most, " bytes, got ", frames,
                   ", which take ", 2 * each, "; compute them on the CPU");
  const int64_t bytes = (warps + 1) * each,
                blocks = std::min<int64_t>((F + warps - 1) / warps, 16 * num_multiprocessors());
  const auto kernel = time_freq_any<T>;
  allow_shared("time_freq", kernel, bytes);
  HUBERT_ECG_LAUNCH(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp),
                    static_cast<size_t>(bytes), stream, frames.data<T>(), circle.data<T>(), out.data<T>(), F,
                    static_cast<int>(S));
  check_cuda("time_freq", cudaGetLastError());
}

}  // namespace

void time_freq_cuda(Tensor frames, Tensor circle, Tensor out, intptr_t stream) {
  const bool in_double = frames.is<double>();
  in_double ? check_time_freq<double>(frames, circle, out) : check_time_freq<float>(frames, circle, out);
  if (frames.size(0) == 0) return;
  if (in_double)
    run_any<double>(frames, circle, out, stream);
  else if (frames.size(1) == 64)
    run_small<64>(frames, out, stream);
  else if (frames.size(1) == 32)
    run_small<32>(frames, out, stream);
  else
    run_any<float>(frames, circle, out, stream);
}

}  // namespace hubert_ecg
