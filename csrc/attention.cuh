// What a warp of attention.cu multiplies: tiles of 16 x 16 numbers of matrices in shared memory, summed in float32.
// Half precision goes through tensor cores, float32 through plain fused multiply-adds.
#pragma once
#include <type_traits>

#include "attention.h"
#include "launch.h"

namespace hubert_ecg {

template <>
inline bool Tensor::is<__half>() const {
  return is<Float16>();
}
template <>
inline bool Tensor::is<__nv_bfloat16>() const {
  return is<BFloat16>();
}

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kRoomPitch = 20;  // numbers from row to row of a warp's room for one tile

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ void narrow(float from, __half& to) { to = __float2half_rn(from); }
__device__ __forceinline__ void narrow(float from, __nv_bfloat16& to) { to = __float2bfloat16_rn(from); }
__device__ __forceinline__ void narrow(float from, float& to) { to = from; }
__device__ __forceinline__ void narrow(double from, double& to) { to = from; }

template <class Sum>
__device__ __forceinline__ Sum sum_of_warp(Sum x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// NaN is passed over.
template <class Sum>
__device__ __forceinline__ Sum most_of_warp(Sum x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Sum other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// The sums of a tile, eight to a lane.
template <class T>
struct Tile {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum;
};
// Of lane l: column l % 16 of rows 8 (l / 16) and on.
template <>
struct Tile<float> {
  float sum[8];
};

template <class T, int kTiles>
__device__ __forceinline__ void clear(Tile<T> (&tiles)[kTiles]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < 8; ++i) tiles[j].sum[i] = 0;
    } else {
      nvcuda::wmma::fill_fragment(tiles[j].sum, 0.0f);
    }
  }
}

// Adds a [16, 16 steps] b [16 steps, 16 tiles] to the first `tiles` of sums. kTurnA: a is stored as [16 steps, 16],
// kTurnB: b as [16 tiles, 16 steps].
template <bool kTurnA, bool kTurnB, class T, int kTiles>
__device__ __forceinline__ void add_products(const T* a, int pitch_a, const T* b, int pitch_b, int steps, int tiles,
                                             Tile<T> (&sums)[kTiles]) {
  if constexpr (std::is_same_v<T, float>) {
    const int lane = threadIdx.x % 32, column = lane % 16, row = lane / 16 * 8;
    const int step_a = kTurnA ? pitch_a : 1, row_a = kTurnA ? 1 : pitch_a;
    const int step_b = kTurnB ? 1 : pitch_b, column_b = kTurnB ? pitch_b : 1;
    a += row * row_a;
    b += column * column_b;
#pragma unroll 2
    for (int k = 0; k < 16 * steps; ++k, a += step_a, b += step_b) {
      float left[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i] = a[i * row_a];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j >= tiles) break;
        const float right = b[j * 16 * column_b];
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[j].sum[i] += left[i] * right;
      }
    }
  } else {
    using namespace nvcuda::wmma;
    using A = fragment<matrix_a, 16, 16, 16, T, std::conditional_t<kTurnA, col_major, row_major>>;
    using B = fragment<matrix_b, 16, 16, 16, T, std::conditional_t<kTurnB, col_major, row_major>>;
    for (int step = 0; step < steps; ++step) {
      A left;
      load_matrix_sync(left, a + step * 16 * (kTurnA ? pitch_a : 1), pitch_a);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j >= tiles) break;
        B right;
        load_matrix_sync(right, b + step * 16 * (kTurnB ? 1 : pitch_b) + j * 16 * (kTurnB ? pitch_b : 1), pitch_b);
        mma_sync(sums[j].sum, left, right, sums[j].sum);
      }
    }
  }
}

__device__ __forceinline__ void store_tile(const Tile<float>& tile, float* to, int pitch) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) to[(lane / 16 * 8 + i) * pitch + lane % 16] = tile.sum[i];
}
template <class T>
__device__ __forceinline__ void store_tile(const Tile<T>& tile, float* to, int pitch) {
  nvcuda::wmma::store_matrix_sync(to, tile.sum, pitch, nvcuda::wmma::mem_row_major);
}

// put(i, row, column, number) for the numbers of a tile, i from 0 to 7 in each lane; room [16][kRoomPitch] of the warp.
template <class T, class Put>
__device__ __forceinline__ void each_number(const Tile<T>& tile, float* room, const Put& put) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  store_tile(tile, room, kRoomPitch);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = 2 * i + lane / 16, column = lane % 16;
    put(i, row, column, room[row * kRoomPitch + column]);
  }
}

// to [rows][pitch] = tokens from(row) of a head, zeros where that is negative, and from D to `depth`. By `threads`
// threads, of which this is `thread`. wide: 16 bytes at a time.
template <class T, class From>
__device__ __forceinline__ void load_rows(const Heads<const T>& x, int64_t b, int64_t h, int rows, int D, int depth,
                                          bool wide, int thread, int threads, const From& from, T* to, int pitch) {
  if (sizeof(T) == 2 && wide) {
    for (int at = thread; at < rows * (depth / 8); at += threads) {
      const int row = at / (depth / 8), d = at % (depth / 8) * 8;
      const int64_t token = from(row);
      uint4 eight = {0, 0, 0, 0};
      if (token >= 0 && d < D) eight = *reinterpret_cast<const uint4*>(x.row(b, token, h) + d);
      *reinterpret_cast<uint4*>(to + row * pitch + d) = eight;
    }
    return;
  }
  for (int at = thread; at < rows * depth; at += threads) {
    const int row = at / depth, d = at % depth;
    const int64_t token = from(row);
    T one;
    narrow(0.0f, one);
    if (token >= 0 && d < D) one = x.row(b, token, h)[d];
    to[row * pitch + d] = one;
  }
}

}  // namespace
}  // namespace hubert_ecg
