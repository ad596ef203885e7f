// The nearest of K centroids to 128 float32 points by a block, on tensor cores: for kmeans.cu and label.cu.
//
// A number less a shift is split into two bfloat16, hi + lo, to 2^-18 of itself. Three products, hi hi + hi lo + lo hi,
// give x.c to about the digits of float32. Scores |c|^2 / 2 - x.c order centroids as distances do; where the lowest
// lie within what such a score may be off, distances in float64 decide.
#pragma once
#include "launch.h"

namespace hubert_ecg {
namespace {

using Bfloat16 = __nv_bfloat16;

constexpr int kPoints = 128;  // points of a block, 32 to a warp
constexpr int kColumns = 64;  // centroids of a warp at a time
constexpr int kDepth = 48;    // dimensions in shared memory at a time, 16 to a product
constexpr int kPitch = 56;    // numbers from row to row: eight rows of 16 bytes meet all banks
constexpr int kScorePitch = 20;
constexpr int kMostDim = 4096;

struct Split {
  Bfloat16 *hi, *lo;  // [rows][kPitch]
};

// The lowest three scores of a point, and whose the lowest two are.
struct Lowest {
  float best, second, third;
  int arg, next;
};

__device__ __forceinline__ Lowest nothing_yet() { return {INFINITY, INFINITY, INFINITY, 0, 0}; }

// NaN is never lower.
__device__ __forceinline__ void take(Lowest& low, float score, int k) {
  if (!(score < low.third)) return;
  if (score < low.second) {
    low.third = low.second;
    const bool best = score < low.best;
    low.second = best ? low.best : score;
    low.next = best ? low.arg : k;
    low.best = best ? score : low.best;
    low.arg = best ? k : low.arg;
  } else {
    low.third = score;
  }
}

// The shared memory of a block of kGroups x 4 warps: warp w takes points [32 (w % 4), + 32) and centroids
// [64 (w / 4), + 64) of a tile.
template <int kGroups>
struct NearestMemory {
  static constexpr int kThreads = 128 * kGroups, kTile = kColumns * kGroups;
  Split points, centroids;  // [kPoints], [kTile]
  float* scores;            // [warps][32][kScorePitch], at other times one Lowest for each thread
  float* half;              // [kTile]: |c|^2 / 2
  float* half_x;            // [kPoints]: |x|^2 / 2
  float* longest;           // [4], the first used: the greatest |c|^2 / 2
  float* shift;             // [dim]

  __host__ __device__ static constexpr size_t bytes(int dim) {
    return 2 * (kPoints + kTile) * kPitch * sizeof(Bfloat16) +
           (kThreads * kScorePitch + kTile + kPoints + 4 + (dim + 3) / 4 * 4) * sizeof(float);
  }
  // The first part, points and scores, is free for other use between calls.
  static constexpr size_t kFree = 2 * kPoints * kPitch * sizeof(Bfloat16) + kThreads * kScorePitch * sizeof(float);
  __device__ explicit NearestMemory(unsigned char* at) {
    Bfloat16* const split = reinterpret_cast<Bfloat16*>(at);
    points = {split, split + kPoints * kPitch};
    scores = reinterpret_cast<float*>(split + 2 * kPoints * kPitch);
    Bfloat16* const kept = reinterpret_cast<Bfloat16*>(at + kFree);
    centroids = {kept, kept + kTile * kPitch};
    half = reinterpret_cast<float*>(kept + 2 * kTile * kPitch);
    half_x = half + kTile;
    longest = half_x + kPoints;
    shift = longest + 4;
  }
};

// The mean of some centroids. Distances do not change when everything moves by it, and scores then lose the least to
// cancellation; any shift is right. By all threads; a barrier must follow.
__device__ inline void find_shift(const float* centroids, int num_k, int dim, float* shift) {
  constexpr int kSome = 16;
  const int some = num_k < kSome ? num_k : kSome;
  for (int d = threadIdx.x; d < dim; d += blockDim.x) {
    float sum = 0;
    for (int i = 0; i < some; ++i) {
      const float c = centroids[int64_t(i) * num_k / some * dim + d];
      sum += fabsf(c) < 1e15f ? c / float(some) : 0.0f;
    }
    shift[d] = sum;
  }
}

// Splits dimensions [from, from + kDepth) of kRows rows, of which `rows` exist, 16 lanes to a row. half[row] becomes
// |row|^2 / 2 of the dimensions so far, `missing` for rows that do not exist. kAhead: rows that are read before the
// first is written.
template <int kRows, int kThreads, int kAhead>
__device__ __forceinline__ void split_rows(const float* x, int rows, int dim, int from, const float* shift,
                                           const Split& to, float missing, float* half) {
  const int sub = threadIdx.x % 16;
#pragma unroll kAhead
  for (int row = threadIdx.x / 16; row < kRows; row += kThreads / 16) {
    float squares = 0;
#pragma unroll
    for (int part = 0; part < kDepth / 16; ++part) {
      const int d = from + 16 * part + sub;
      const float v = d < dim && row < rows ? x[row * dim + d] - shift[d] : 0.0f;
      const Bfloat16 hi = __float2bfloat16_rn(v);
      to.hi[row * kPitch + 16 * part + sub] = hi;
      to.lo[row * kPitch + 16 * part + sub] = __float2bfloat16_rn(v - __bfloat162float(hi));
      squares += v * v;
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    if (sub == 0) half[row] = row < rows ? (from ? half[row] : 0.0f) + squares / 2 : missing;
  }
}

using Products = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;

// Adds the products of 32 points and 64 centroids over 16 `steps` dimensions.
__device__ __forceinline__ void add_products(const Split& points, const Split& centroids, int steps,
                                             Products (&sum)[2][4]) {
  using namespace nvcuda::wmma;
  using A = fragment<matrix_a, 16, 16, 16, Bfloat16, row_major>;
  using B = fragment<matrix_b, 16, 16, 16, Bfloat16, col_major>;
  for (int step = 0; step < steps; ++step) {
    A hi[2], lo[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrix_sync(hi[i], points.hi + i * 16 * kPitch + step * 16, kPitch);
      load_matrix_sync(lo[i], points.lo + i * 16 * kPitch + step * 16, kPitch);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      B c_hi, c_lo;
      load_matrix_sync(c_hi, centroids.hi + j * 16 * kPitch + step * 16, kPitch);
      load_matrix_sync(c_lo, centroids.lo + j * 16 * kPitch + step * 16, kPitch);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_sync(sum[i][j], lo[i], c_hi, sum[i][j]);
        mma_sync(sum[i][j], hi[i], c_lo, sum[i][j]);
        mma_sync(sum[i][j], hi[i], c_hi, sum[i][j]);
      }
    }
  }
}

// Each lane takes the scores of its own point out of those of 32 points and 64 centroids from k on.
//   scores [32][kScorePitch]: shared memory of the warp; half [64]
__device__ __forceinline__ void take_scores(const Products (&sum)[2][4], const float* half, int k, float* scores,
                                            Lowest& low) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      nvcuda::wmma::store_matrix_sync(scores + i * 16 * kScorePitch, sum[i][j], kScorePitch,
                                      nvcuda::wmma::mem_row_major);
    __syncwarp();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 product = *reinterpret_cast<const float4*>(scores + lane * kScorePitch + 4 * q);
      const float4 c = *reinterpret_cast<const float4*>(half + 16 * j + 4 * q);
      take(low, c.x - product.x, k + 16 * j + 4 * q);
      take(low, c.y - product.y, k + 16 * j + 4 * q + 1);
      take(low, c.z - product.z, k + 16 * j + 4 * q + 2);
      take(low, c.w - product.w, k + 16 * j + 4 * q + 3);
    }
    __syncwarp();
  }
}

// How far apart two scores must be to be told from each other, for a point whose |x|^2 / 2 is `half_x` and centroids
// whose greatest |c|^2 / 2 is `longest`.
//
// Split and dropped products: 3 * 2^-18 of |x| |c|. Each product of 16 dimensions adds twice nine numbers, aligned to
// the largest and cut off: 9 * 2^-24 at most. Lengths: (D / 16 + 8) u of themselves. Both scores may be off.
__device__ inline float least_gap(float half_x, float longest, int dim) {
  const float most = 1e30f;  // beyond it products might overflow
  if (!(half_x < most && longest < most)) return INFINITY;
  const int steps = 3 * ((dim + 15) / 16);
  const float per_product = 3.3f / (1 << 18) + float(18 * steps + 8) / (1 << 24);
  const float per_length = float(dim / 16 + 8) / (1 << 24);
  return 2.04f * (per_product * 2 * sqrtf(half_x) * sqrtf(longest) + per_length * longest) + 1e-30f;
}

// |x - c|^2 in float64 by a warp; every lane gets it.
__device__ inline double exact_distance(const float* x, const float* c, int dim) {
  double sum = 0;
  for (int d = threadIdx.x % 32; d < dim; d += 32) {
    const double delta = double(x[d]) - double(c[d]);
    sum += delta * delta;
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// The label of a point by a warp, from its lowest scores. The lowest k wins a tie; a distance that is NaN never wins.
__device__ inline int settle(const Lowest& low, float gap, const float* x, const float* centroids, int num_k, int dim) {
  if (low.second - low.best > gap) return low.arg;
  if (low.third - low.best > gap) {
    const double a = exact_distance(x, centroids + int64_t(low.arg) * dim, dim),
                 b = exact_distance(x, centroids + int64_t(low.next) * dim, dim);
    return b < a || (b == a && low.next < low.arg) ? low.next : low.arg;
  }
  double best = INFINITY;
  int arg = 0;
  for (int k = 0; k < num_k; ++k) {
    const double distance = exact_distance(x, centroids + int64_t(k) * dim, dim);
    if (distance < best) {
      best = distance;
      arg = k;
    }
  }
  return arg;
}

// Labels of `rows` <= 128 points x [rows, dim] by a block of kGroups x 4 warps: label(row, k) is called once for each,
// by one lane. kSmall: dim <= kDepth. `fresh`: the memory holds no centroids yet. All threads take part, and a barrier
// ends it.
template <bool kSmall, int kGroups, class Label>
__device__ void nearest_of_block(const NearestMemory<kGroups>& mem, const float* x, int rows, const float* centroids,
                                 int num_k, int dim, bool fresh, const Label& label) {
  using Memory = NearestMemory<kGroups>;
  constexpr int kThreads = Memory::kThreads, kTile = Memory::kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const Split my_points = {mem.points.hi + warp % 4 * 32 * kPitch, mem.points.lo + warp % 4 * 32 * kPitch},
              my_centroids = {mem.centroids.hi + group * kColumns * kPitch,
                              mem.centroids.lo + group * kColumns * kPitch};
  // Centroids that all fit stay for the next points.
  const bool move = !kSmall || fresh || num_k > kTile;
  Lowest low = nothing_yet();
  float longest = move ? 0 : *mem.longest;
  if constexpr (kSmall) split_rows<kPoints, kThreads, 4>(x, rows, dim, 0, mem.shift, mem.points, 0.0f, mem.half_x);
  for (int k0 = 0; k0 < num_k; k0 += kTile) {
    const float* const next = centroids + int64_t(k0) * dim;
    if (kSmall && move)
      split_rows<kTile, kThreads, 4>(next, num_k - k0, dim, 0, mem.shift, mem.centroids, INFINITY, mem.half);
    Products sum[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) nvcuda::wmma::fill_fragment(sum[i][j], 0.0f);
    if constexpr (kSmall) {
      __syncthreads();
      add_products(my_points, my_centroids, (dim + 15) / 16, sum);
    } else {
      // Few rows ahead: the sums take most registers.
      for (int from = 0; from < dim; from += kDepth) {
        split_rows<kPoints, kThreads, 2>(x, rows, dim, from, mem.shift, mem.points, 0.0f, mem.half_x);
        split_rows<kTile, kThreads, 2>(next, num_k - k0, dim, from, mem.shift, mem.centroids, INFINITY, mem.half);
        __syncthreads();
        add_products(my_points, my_centroids, ((dim - from < kDepth ? dim - from : kDepth) + 15) / 16, sum);
        __syncthreads();
      }
    }
    if (move)
      for (int k = lane; k < kTile && k0 + k < num_k; k += 32) longest = mem.half[k] > longest ? mem.half[k] : longest;
    take_scores(sum, mem.half + group * kColumns, k0 + group * kColumns, mem.scores + warp * 32 * kScorePitch, low);
    __syncthreads();
  }
  Lowest* const lows = reinterpret_cast<Lowest*>(mem.scores);
  lows[threadIdx.x] = low;
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, longest, step);
    longest = other > longest ? other : longest;
  }
  if (threadIdx.x == 0) *mem.longest = longest;
  __syncthreads();
  for (int row = warp * (kPoints / 4 / kGroups), end = row + kPoints / 4 / kGroups; row < end && row < rows; ++row) {
    low = lows[row];
    for (int other = 1; other < kGroups; ++other) {
      const Lowest& more = lows[other * kPoints + row];
      take(low, more.best, more.arg);
      take(low, more.second, more.next);
      if (more.third < low.third) low.third = more.third;
    }
    const int k = settle(low, least_gap(mem.half_x[row], longest, dim), x + int64_t(row) * dim, centroids, num_k, dim);
    if (lane == 0) label(row, k);
  }
  __syncthreads();
}

}  // namespace
}  // namespace hubert_ecg
