#include <algorithm>

#include "mfcc.cuh"

namespace hubert_ecg {
namespace {

constexpr int kWarps = 4;

// 32 frames to a warp at a time, each transformed in the registers of one lane. A frame that float32 is not trusted
// with is computed again by the whole warp: of prepared ECGs, less than one in a hundred.
// Shared memory: the tables, and for each warp a tile of 32 frames, where its 32 cepstra lie in the end.
template <int N, bool kFull>
__global__ void __launch_bounds__(kWarps* kWarp, 4)
    mfcc_small(const float* frames, MfccView t, float* out, int64_t F, int tile_floats) {
  HUBERT_ECG_SHARED(unsigned char, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, pitch = row_pitch(kFull ? N : t.S);
  float* const tile = reinterpret_cast<float*>(shared) + warp * tile_floats;
  const SmallMfcc tables = small_mfcc(shared + kWarps * tile_floats * sizeof(float), N, t.M);
  double* const exact = tables.exact + warp * (N + t.M);
  fill_small_mfcc(t, tables);
  __syncthreads();

  const int64_t step = int64_t(gridDim.x) * kWarps * kWarp;
  for (int64_t first = (int64_t(blockIdx.x) * kWarps + warp) * kWarp; first < F; first += step) {
    const int count = int(F - first < kWarp ? F - first : kWarp);
    copy_rows(frames + first * t.S, count, kFull ? N : t.S, tile, pitch, lane);
    copy_wait();
    __syncwarp();
    // Lanes beyond the last frame compute what nobody reads.
    float cepstrum[kMostCepstra];
    const float margin = cepstrum_of_thread<N, kFull>(t, tables, tile + lane * pitch, cepstrum);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kMostCepstra; ++c)
      if (c < t.C) tile[lane * t.C + c] = cepstrum[c];
    unsigned doubtful = __ballot_sync(kAllLanes, lane < count && !(margin >= 0));
    __syncwarp();
    for (; doubtful; doubtful &= doubtful - 1) {
      const int row = __ffs(doubtful) - 1;
      const float* const x = frames + (first + row) * t.S;
      cepstrum_of_warp<double>(
          t, t.window, t.circle, tables.bands, exact, [&](int i) { return x[i]; },
          [&](int c, double coefficient) { tile[row * t.C + c] = float(coefficient); }, lane);
    }
    write_numbers(tile, count * t.C, out + first * t.C, lane);
    __syncwarp();
  }
}

// A frame to a warp, of any length: in T, and a doubtful one again in float64.
// Shared memory: bands [M], window [S] and circle [N, 2] in T, and for each warp N + M of float64.
template <class T>
__global__ void mfcc_any(const T* frames, MfccView t, T* out, int64_t F) {
  HUBERT_ECG_SHARED(double, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  double* const exact = shared + warp * (t.N + t.M);
  T* const circle = reinterpret_cast<T*>(shared + warps * (t.N + t.M));
  T* const window = circle + 2 * t.N;
  Band* const bands = reinterpret_cast<Band*>(window + t.S);
  for (int i = threadIdx.x; i < 2 * t.N; i += blockDim.x) circle[i] = T(t.circle[i]);
  for (int i = threadIdx.x; i < t.S; i += blockDim.x) window[i] = T(t.window[i]);
  find_bands(t, bands, warp, warps, lane);
  __syncthreads();

  for (int64_t f = int64_t(blockIdx.x) * warps + warp; f < F; f += int64_t(gridDim.x) * warps) {
    const T* const frame = frames + f * t.S;
    const auto x = [&](int i) { return frame[i]; };
    const auto write = [&](int c, auto coefficient) { out[f * t.C + c] = T(coefficient); };
    const bool trusted = cepstrum_of_warp<T>(t, window, circle, bands, reinterpret_cast<T*>(exact), x, write, lane);
    if (sizeof(T) < sizeof(double) && !trusted)
      cepstrum_of_warp<double>(t, t.window, t.circle, bands, exact, x, write, lane);
  }
}

template <int N, bool kFull>
void run_small(const Tensor& frames, const MfccView& t, const Tensor& out, intptr_t stream) {
  const int64_t F = frames.size(0), tiles = (F + kWarp - 1) / kWarp;
  const int tile = kWarp * row_pitch(t.S), tile_floats = (std::max(tile, kWarp * t.C) + 3) / 4 * 4;
  const size_t bytes = kWarps * tile_floats * sizeof(float) + small_mfcc_bytes(N, t.M, kWarps);
  const int64_t blocks = std::min<int64_t>((tiles + kWarps - 1) / kWarps, 4 * num_multiprocessors());
  const auto kernel = mfcc_small<N, kFull>;
  allow_shared("mfcc", kernel, bytes);
  HUBERT_ECG_LAUNCH(kernel, static_cast<unsigned>(blocks), kWarps * kWarp, bytes, stream, frames.data<float>(), t,
                    out.data<float>(), F, tile_floats);
  check_cuda("mfcc", cudaGetLastError());
}

template <class T>
void run_any(const Tensor& frames, const MfccView& t, const Tensor& out, intptr_t stream) {
  const int64_t F = frames.size(0), each = (t.N + t.M) * int64_t(sizeof(double)), most = most_shared_bytes(),
                tables = (2 * t.N + t.S + 1) * int64_t(sizeof(T)) + t.M * int64_t(sizeof(Band)),
                warps = std::min<int64_t>(kWarps, (most - tables) / each);
  HUBERT_ECG_CHECK(tables < most && warps > 0, "mfcc: frames must fit the shared memory of a block, ", most,
                   " bytes, got ", frames, ", which take ", tables + each, "; compute them on the CPU");
  const int64_t bytes = tables + warps * each,
                blocks = std::min<int64_t>((F + warps - 1) / warps, 16 * num_multiprocessors());
  const auto kernel = mfcc_any<T>;
  allow_shared("mfcc", kernel, bytes);
  HUBERT_ECG_LAUNCH(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp),
                    static_cast<size_t>(bytes), stream, frames.data<T>(), t, out.data<T>(), F);
  check_cuda("mfcc", cudaGetLastError());
}

}  // namespace

void mfcc_cuda(Tensor frames, Tensor window, Tensor circle, Tensor bank, Tensor dct, Tensor out, intptr_t stream) {
  const bool in_double = frames.is<double>();
  if (in_double)
    check_mfcc<double>(frames, window, circle, bank, dct, out);
  else
    check_mfcc<float>(frames, window, circle, bank, dct, out);
  if (frames.size(0) == 0) return;
  const MfccView t = mfcc_view(window, circle, bank, dct);
  // A thread has room for 16 coefficients and a block for the tables of 64 filters.
  const bool small = !in_double && t.C <= kMostCepstra && t.M <= 64;
  if (small && t.N == 64)
    t.S == 64 ? run_small<64, true>(frames, t, out, stream) : run_small<64, false>(frames, t, out, stream);
  else if (small && t.N == 32)
    t.S == 32 ? run_small<32, true>(frames, t, out, stream) : run_small<32, false>(frames, t, out, stream);
  else
    in_double ? run_any<double>(frames, t, out, stream) : run_any<float>(frames, t, out, stream);
}

}  // namespace hubert_ecg
