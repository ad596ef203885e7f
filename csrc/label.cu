#include <algorithm>

#include "label.h"
#include "mfcc.cuh"
#include "nearest.cuh"
#include "time_freq.cuh"

namespace hubert_ecg {
namespace {

constexpr int kWarps = 4;
using Memory = NearestMemory<1>;

enum SampleType { kFloat, kDouble, kHalf, kBrain, kShort };

// The samples of all records, and the units of int16.
struct Signal {
  const void* ecg;
  SampleType type;
  const float* scale;
  int64_t n, lead_length;
  int num_leads;
};

__device__ inline float as_float(float v) { return v; }
__device__ inline float as_float(double v) { return float(v); }
__device__ inline float as_float(__half v) { return __half2float(v); }
__device__ inline float as_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float as_float(int16_t v) { return float(v); }

// read(pointer to the samples of the record, in their own type)
template <class Read>
__device__ __forceinline__ void with_type(const Signal& s, int64_t record, const Read& read) {
  const int64_t at = record * s.n;
  switch (s.type) {
    case kFloat:
      return read(static_cast<const float*>(s.ecg) + at);
    case kDouble:
      return read(static_cast<const double*>(s.ecg) + at);
    case kHalf:
      return read(static_cast<const __half*>(s.ecg) + at);
    case kBrain:
      return read(static_cast<const __nv_bfloat16*>(s.ecg) + at);
    case kShort:
      return read(static_cast<const int16_t*>(s.ecg) + at);
  }
}

__device__ inline float units_at(const Signal& s, int64_t record, int64_t i) {
  return s.type == kShort ? s.scale[record * s.num_leads + i / s.lead_length] : 1.0f;
}

// Sample i of a record.
__device__ inline float sample(const Signal& s, int64_t record, int64_t i) {
  float v = 0;
  with_type(s, record, [&](auto* x) { v = as_float(x[i]); });
  return v * units_at(s, record, i);
}

// Samples [begin, begin + count * S) of a record into the rows of a tile, 16 bytes to a lane at a time.
__device__ __forceinline__ void read_rows(const Signal& s, int64_t record, int64_t begin, int count, int S, float* tile,
                                          int pitch, int lane) {
  with_type(s, record, [&](auto* x) {
    using Sample = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    constexpr int kWide = 16 / sizeof(Sample);
    struct alignas(16) Wide {
      Sample at[kWide];
    };
    x += begin;
    const int size = count * S, ahead = int(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(Sample));
    for (int first = kWide * lane - ahead; first < size; first += kWide * kWarp) {
      // The ends are read one by one: nothing beyond them may be.
      const bool whole = first >= 0 && first + kWide <= size;
      Wide v = {};
      if (whole) v = *reinterpret_cast<const Wide*>(x + first);
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const int i = first + j;
        if (i < 0 || i >= size) continue;
        const float value = as_float(whole ? v.at[j] : x[i]);
        tile[i / S * pitch + i % S] = s.type == kShort ? value * units_at(s, record, begin + i) : value;
      }
    }
  });
}

// What a launch computes.
struct Plan {
  Signal signal;
  MfccView mfcc;
  const double* circle;  // [S, 2]
  const float* centroids;
  const int64_t* ends;
  int64_t* labels;  // [B, num_frames]
  int64_t B, num_frames, start;
  int num_k, num_ends, kind, S, width, halo, work_floats;
  bool normalize;
};

// Frames of a block: those whose labels it writes, and up to `halo` on either side that their slopes reach.
struct Group {
  int64_t record, first, from;
  int count, rows;
};

__device__ inline Group group_of(const Plan& p, int64_t g) {
  const bool alone = p.num_frames <= kPoints;
  const int halo = alone ? 0 : p.halo, most = kPoints - 2 * halo;
  const int64_t groups = (p.num_frames + most - 1) / most, first = g % groups * most;
  const int64_t last = first + most < p.num_frames ? first + most : p.num_frames;
  const int64_t from = first > halo ? first - halo : 0, to = last + halo < p.num_frames ? last + halo : p.num_frames;
  return {g / groups, first, from, int(last - first), int(to - from)};
}

inline int64_t num_groups(const Plan& p) {
  const int64_t most = p.num_frames <= kPoints ? kPoints : kPoints - 2 * p.halo;
  return p.B * ((p.num_frames + most - 1) / most);
}

// Features of one frame by a thread that has it in its row of a tile.
template <int N>
__device__ __forceinline__ float features_of_thread(const Plan& p, const SmallMfcc& tables, float* row, float* out) {
  if (p.kind != kMfcc) {
    float x[N], feature[kTimeFreqFeatures];
    load_row<N, true>(row, N, x);
    time_freq_of_thread<N>(x, feature);
#pragma unroll
    for (int d = 0; d < kTimeFreqFeatures; ++d) out[d] = feature[d];
    if (p.kind == kTimeFreq) return 0;
    out += kTimeFreqFeatures;
  }
  float cepstrum[kMostCepstra];
  const float margin = cepstrum_of_thread<N, true>(p.mfcc, tables, row, cepstrum);
#pragma unroll
  for (int c = 0; c < kNumMfcc; ++c) out[c] = cepstrum[c];
  return margin;
}

// Features of frame t of a record by a warp; with `again`, its cepstrum only, in float64.
__device__ inline void features_of_warp(const Plan& p, const Band* bands, double* work, int64_t record, int64_t t,
                                        float* out, bool again, int lane) {
  const int64_t begin = p.start + t * p.S;
  const auto x = [&](int i) { return sample(p.signal, record, begin + i); };
  if (p.kind != kMfcc) {
    if (!again) {
      float feature[kTimeFreqFeatures];
      time_freq_of_warp<float>(p.S, p.circle, reinterpret_cast<float*>(work), x, feature, lane);
#pragma unroll
      for (int d = 0; d < kTimeFreqFeatures; ++d)
        if (lane == d) out[d] = feature[d];
      __syncwarp();
    }
    if (p.kind == kTimeFreq) return;
    out += kTimeFreqFeatures;
  }
  const auto write = [&](int c, auto coefficient) { out[c] = float(coefficient); };
  const bool trusted = !again && cepstrum_of_warp<float>(p.mfcc, p.mfcc.window, p.mfcc.circle, bands,
                                                         reinterpret_cast<float*>(work), x, write, lane);
  if (!trusted) cepstrum_of_warp<double>(p.mfcc, p.mfcc.window, p.mfcc.circle, bands, work, x, write, lane);
}

// Slopes of columns [from, from + 13) of x [rows, width] by a thread to a frame, to the 13 columns that follow. Where
// the neighbours of a frame are not at hand, nobody reads its slope.
__device__ inline void slopes(const Plan& p, const Group& g, float* x, int from) {
  const int row = threadIdx.x;
  if (row >= g.rows) return;
  int64_t begin = 0, end = p.num_frames;
  for (int l = 0; l < p.num_ends; ++l) {
    if (p.ends[l] <= g.from + row) {
      begin = p.ends[l];
    } else {
      end = p.ends[l] < end ? p.ends[l] : end;
      break;
    }
  }
  const int low = int(begin > g.from ? begin - g.from : 0), high = int(end - g.from < g.rows ? end - g.from : g.rows);
  for (int c = from; c < from + kNumMfcc; ++c) {
    float sum = 0;
    for (int k = 1; k <= kDeltaReach; ++k) {
      const int later = row + k < high ? row + k : high - 1, earlier = row - k > low ? row - k : low;
      sum += float(k) * (x[later * p.width + c] - x[earlier * p.width + c]);
    }
    x[row * p.width + c + kNumMfcc] = sum / 10;  // 2 (1^2 + 2^2)
  }
}

// A group of frames of one record to a block. N: samples of a frame that a thread holds, or 0: a frame to a warp.
// Shared memory: that of nearest_of_block, whose free part holds the tiles of the frames first; features [128][width];
// tables of the cepstra; room for each warp's frames in float64.
template <int N>
__global__ void __launch_bounds__(kWarps* kWarp, 3) label_kernel(Plan p, int64_t groups) {
  HUBERT_ECG_SHARED(unsigned char, shared);
  const Memory mem(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* const x = reinterpret_cast<float*>(shared + (Memory::bytes(p.width) + 15) / 16 * 16);
  double* const works = reinterpret_cast<double*>(x + kPoints * p.width);
  double* const work = works + warp * (p.work_floats / 2);
  unsigned char* const rest = reinterpret_cast<unsigned char*>(works + kWarps * (p.work_floats / 2));
  SmallMfcc tables = {};
  tables.bands = reinterpret_cast<Band*>(rest);
  if constexpr (N > 0) tables = small_mfcc(rest, N, p.mfcc.M);
  if (p.kind != kTimeFreq) {
    if constexpr (N > 0)
      fill_small_mfcc(p.mfcc, tables);
    else
      find_bands(p.mfcc, tables.bands, warp, kWarps, lane);
  }
  find_shift(p.centroids, p.num_k, p.width, mem.shift);
  __syncthreads();

  for (int64_t i = blockIdx.x; i < groups; i += gridDim.x) {
    const Group g = group_of(p, i);
    if constexpr (N > 0) {
      constexpr int kTilePitch = N + 4;
      float* const tile = reinterpret_cast<float*>(shared) + warp * kWarp * kTilePitch;
      const int first = warp * kWarp, count = g.rows - first < kWarp ? g.rows - first : kWarp;
      if (count > 0) {
        read_rows(p.signal, g.record, p.start + (g.from + first) * N, count, N, tile, kTilePitch, lane);
        __syncwarp();
        float* const out = x + (first + lane) * p.width;
        const float margin = features_of_thread<N>(p, tables, tile + lane * kTilePitch, out);
        unsigned doubtful = __ballot_sync(kAllLanes, lane < count && !(margin >= 0));
        __syncwarp();
        for (; doubtful; doubtful &= doubtful - 1) {
          const int row = first + __ffs(doubtful) - 1;
          features_of_warp(p, tables.bands, work, g.record, g.from + row, x + row * p.width, true, lane);
        }
      }
    } else {
      for (int row = warp; row < g.rows; row += kWarps)
        features_of_warp(p, tables.bands, work, g.record, g.from + row, x + row * p.width, false, lane);
    }
    __syncthreads();
    if (p.kind == kMfcc) {
      if (p.num_ends) {
        slopes(p, g, x, 0);
        __syncthreads();
        slopes(p, g, x, kNumMfcc);
      } else if (int(threadIdx.x) < g.rows) {
        for (int d = kNumMfcc; d < p.width; ++d) x[threadIdx.x * p.width + d] = 0;
      }
      __syncthreads();
    }
    if (p.normalize) {
      if (int(threadIdx.x) < g.rows) {
        float* const row = x + threadIdx.x * p.width;
        double squares = 0;
        for (int d = 0; d < p.width; ++d) squares += double(row[d]) * row[d];
        const double length = sqrt(squares);
        if (length > 0)
          for (int d = 0; d < p.width; ++d) row[d] = float(double(row[d]) / length);
      }
      __syncthreads();
    }
    int64_t* const labels = p.labels + g.record * p.num_frames + g.first;
    nearest_of_block<true>(mem, x + (g.first - g.from) * p.width, g.count, p.centroids, p.num_k, p.width,
                           i == int64_t(blockIdx.x), [&](int row, int k) { labels[row] = k; });
  }
}

template <int N>
void run(const Plan& p, intptr_t stream) {
  const char* const op = "frame_assign";
  const int64_t groups = num_groups(p);
  const size_t tables = N > 0 ? small_mfcc_bytes(N, p.mfcc.M, 0) : p.mfcc.M * sizeof(Band);
  const size_t bytes = (Memory::bytes(p.width) + 15) / 16 * 16 + kPoints * p.width * sizeof(float) +
                       kWarps * p.work_floats * sizeof(float) + tables;
  static_assert(kWarps * kWarp * (N + 4) * sizeof(float) <= Memory::kFree);
  HUBERT_ECG_CHECK(bytes <= size_t(most_shared_bytes()), op, ": frames of ", p.S,
                   " samples must fit the shared memory of a block, ", most_shared_bytes(), " bytes, got ", bytes,
                   "; compute them on the CPU");
  const int64_t blocks = std::min<int64_t>(groups, 2 * num_multiprocessors());
  const auto kernel = label_kernel<N>;
  allow_shared(op, kernel, bytes);
  HUBERT_ECG_LAUNCH(kernel, static_cast<unsigned>(blocks), kWarps * kWarp, bytes, stream, p, groups);
  check_cuda(op, cudaGetLastError());
}

SampleType sample_type(const Tensor& ecg) {
  return ecg.is<float>()      ? kFloat
         : ecg.is<double>()   ? kDouble
         : ecg.is<Float16>()  ? kHalf
         : ecg.is<BFloat16>() ? kBrain
                              : kShort;
}

}  // namespace

void frame_assign_cuda(Tensor ecg, Tensor scale, Tensor centroids, Tensor window, Tensor circle, Tensor bank,
                       Tensor dct, Tensor frame_circle, Tensor ends, Tensor labels, int64_t kind, int64_t start,
                       int64_t frame_length, bool normalize, intptr_t stream) {
  check_frame_assign(ecg, scale, centroids, window, circle, bank, dct, frame_circle, ends, labels, kind, start,
                     frame_length);
  if (labels.size(0) == 0 || labels.size(1) == 0) return;
  Plan p = {};
  const bool stored = ecg.is<int16_t>();
  const int64_t leads = stored ? scale.size(1) : 1;
  p.signal = {ecg.data<void>(), sample_type(ecg),    stored ? scale.data<float>() : nullptr,
              ecg.size(1),      ecg.size(1) / leads, int(leads)};
  if (kind != kTimeFreq) p.mfcc = mfcc_view(window, circle, bank, dct);
  p.circle = frame_circle.data<double>();
  p.centroids = centroids.data<float>();
  p.ends = ends.data<int64_t>();
  p.labels = labels.data<int64_t>();
  p.B = labels.size(0);
  p.num_frames = labels.size(1);
  p.start = start;
  p.num_k = int(centroids.size(0));
  p.num_ends = kind == kMfcc ? int(ends.size(0)) : 0;
  p.kind = int(kind);
  p.S = int(frame_length);
  p.width = int(kWidths[kind]);
  p.halo = p.num_ends ? int(2 * kDeltaReach) : 0;
  p.work_floats = std::max(2 * (p.mfcc.N + p.mfcc.M), kind != kMfcc ? (2 * p.S + 1) / 2 * 2 : 0);
  p.normalize = normalize;
  // A thread has room for the tables of 64 filters, as in mfcc.cu.
  const bool small = p.mfcc.M <= 64;
  if (small && p.S == 64)
    run<64>(p, stream);
  else if (small && p.S == 32)
    run<32>(p, stream);
  else
    run<0>(p, stream);
}

}  // namespace hubert_ecg
