#include <algorithm>
#include <cfloat>

#include "kmeans.h"
#include "nearest.cuh"

namespace hubert_ecg {
namespace {

constexpr int kCentroids = 32;  // centroids whose distances a thread holds in registers
constexpr int kDims = 16;       // dimensions in shared memory at a time

// The nearest centroid to one point in float64, as on the CPU.
template <class T>
__device__ int64_t nearest(const T* x, const T* centroids, int64_t num_k, int64_t dim) {
  double best = INFINITY;
  int64_t arg = 0;
  for (int64_t k = 0; k < num_k; ++k) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double delta = double(x[d]) - double(centroids[k * dim + d]);
      sum += delta * delta;
    }
    if (sum < best) {
      best = sum;
      arg = k;
    }
  }
  return arg;
}

// Without tensor cores: a point to a thread, distances in T; a float32 point whose two lowest distances lie within
// their rounding error is looked at in float64.
template <class T>
__global__ void assign(const T* x, const T* centroids, int64_t* labels, int64_t n, int64_t num_k, int64_t dim) {
  // One column more than there are, so that the threads of a warp read different banks.
  HUBERT_ECG_SHARED(T, shared);
  T* const points = shared;                        // [kPoints][kDims + 1]
  T* const tile = shared + kPoints * (kDims + 1);  // [kDims][kCentroids]
  const int64_t first = int64_t(blockIdx.x) * kPoints, i = first + threadIdx.x;
  T best = INFINITY, second = INFINITY;
  int64_t arg = 0;
  bool any_nan = false;
  for (int64_t k0 = 0; k0 < num_k; k0 += kCentroids) {
    T sums[kCentroids];
#pragma unroll
    for (int k = 0; k < kCentroids; ++k) sums[k] = 0;
    for (int64_t d0 = 0; d0 < dim; d0 += kDims) {
      __syncthreads();
      for (int j = threadIdx.x; j < kPoints * kDims; j += kPoints) {
        const int64_t row = first + j / kDims, d = d0 + j % kDims;
        points[j / kDims * (kDims + 1) + j % kDims] = row < n && d < dim ? x[row * dim + d] : T(0);
      }
      for (int j = threadIdx.x; j < kDims * kCentroids; j += kPoints) {
        const int64_t k = k0 + j / kDims, d = d0 + j % kDims;
        tile[j % kDims * kCentroids + j / kDims] = k < num_k && d < dim ? centroids[k * dim + d] : T(0);
      }
      __syncthreads();
      for (int d = 0; d < kDims; ++d) {
        const T value = points[threadIdx.x * (kDims + 1) + d];
#pragma unroll
        for (int k = 0; k < kCentroids; ++k) {
          const T delta = value - tile[d * kCentroids + k];
          sums[k] += delta * delta;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kCentroids; ++k) {
      if (k0 + k >= num_k) break;
      any_nan |= !(sums[k] == sums[k]);
      if (sums[k] < best) {
        second = best;
        best = sums[k];
        arg = k0 + k;
      } else if (sums[k] < second) {
        second = sums[k];
      }
    }
  }
  if (i >= n) return;
  // Every term of the sum is positive, so a distance is off by (D + 3) u of itself at most.
  if (sizeof(T) == sizeof(float)) {
    const T bound = T(1.01) * T(FLT_EPSILON) * T(dim + 4) * second + T(FLT_MIN) * T(dim + 1);
    if (num_k > 1 && (any_nan || !(second - best > bound))) arg = nearest(x + i * dim, centroids, num_k, dim);
  }
  labels[i] = arg;
}

// Labels of float32 points, 128 to a block at a time (nearest.cuh). Two blocks to a multiprocessor: one splits numbers
// while the other multiplies.
constexpr int kGroups = 2;
using Memory = NearestMemory<kGroups>;

template <bool kSmall>
__global__ void __launch_bounds__(Memory::kThreads, 2)
    assign_split(const float* x, const float* centroids, int64_t* labels, int64_t n, int num_k, int dim) {
  HUBERT_ECG_SHARED(unsigned char, shared);
  const Memory mem(shared);
  find_shift(centroids, num_k, dim, mem.shift);
  __syncthreads();
  bool fresh = true;
  for (int64_t first = int64_t(blockIdx.x) * kPoints; first < n; first += int64_t(gridDim.x) * kPoints) {
    const int rows = int(n - first < kPoints ? n - first : kPoints);
    nearest_of_block<kSmall>(mem, x + first * dim, rows, centroids, num_k, dim, fresh,
                             [&](int row, int k) { labels[first + row] = k; });
    fresh = false;
  }
}

// The sums and counts of one block, in shared memory where they fit, and where they go in the end.
struct Partial {
  double *sums, *out_sums;
  int64_t *counts, *out_counts;
  int64_t num_k, dim;
  int columns;
  bool near;

  __host__ __device__ static size_t bytes(int64_t num_k, int columns) { return num_k * (columns + 1) * sizeof(double); }
  __device__ Partial(double* shared, double* all_sums, int64_t* all_counts, int64_t num_k, int64_t dim, int64_t from,
                     int columns, bool near)
      : out_sums(all_sums + blockIdx.x * num_k * dim + from),
        out_counts(from ? nullptr : all_counts + blockIdx.x * num_k),
        num_k(num_k),
        dim(dim),
        columns(columns),
        near(near) {
    sums = near ? shared : out_sums;
    counts = out_counts && near ? reinterpret_cast<int64_t*>(shared + num_k * columns) : out_counts;
    for (int64_t j = threadIdx.x; j < num_k * columns; j += blockDim.x) sums[j / columns * pitch() + j % columns] = 0;
    if (counts)
      for (int64_t k = threadIdx.x; k < num_k; k += blockDim.x) counts[k] = 0;
    __syncthreads();
  }
  __device__ int64_t pitch() const { return near ? columns : dim; }
  __device__ void write() const {
    if (!near) return;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < num_k * columns; j += blockDim.x)
      out_sums[j / columns * dim + j % columns] = sums[j];
    if (counts)
      for (int64_t k = threadIdx.x; k < num_k; k += blockDim.x) out_counts[k] = counts[k];
  }
};

// Adds the first columns of x [rows, dim] to the sums of their clusters: warp w those of the clusters w, w + warps,
// ..., in order, so that nothing is shared and nothing depends on which warp is faster. label(row): -1 for none. With
// `centroids`, a lane also adds the squared distances that it sees to `spread`.
template <class T, class Label>
__device__ void add_rows(const T* x, int64_t dim, int rows, const Label& label, const Partial& to, const T* centroids,
                         double& spread) {
  constexpr int kAhead = 4;  // rows that are read before the first is added
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int first = 0; first < rows; first += 32) {
    const int64_t mine = first + lane < rows ? label(first + lane) : -1;
    unsigned left = __ballot_sync(0xffffffffu, mine >= 0 && mine % warps == warp);
    while (left) {
      int row[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        row[i] = left ? __ffs(left) - 1 : -1;
        left &= left - 1;
      }
      int64_t k[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) k[i] = __shfl_sync(0xffffffffu, mine, row[i] < 0 ? 0 : row[i]);
      for (int d = lane; d < to.columns; d += 32) {
        T v[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) v[i] = row[i] < 0 ? T(0) : x[(first + row[i]) * dim + d];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (row[i] >= 0) to.sums[k[i] * to.pitch() + d] += double(v[i]);
        if (centroids) {
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            const double delta = row[i] < 0 ? 0.0 : double(v[i]) - double(centroids[k[i] * dim + d]);
            spread += delta * delta;
          }
        }
      }
      if (to.counts && lane == 0) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (row[i] >= 0) ++to.counts[k[i]];
      }
      __syncwarp();
    }
  }
}

// A chunk of the points and a slab of the columns to a block: partial [chunk][K][dim].
template <class T>
__global__ void add(const T* x, const int64_t* labels, double* sums, int64_t* counts, int64_t n, int64_t num_k,
                    int64_t dim, int64_t chunk, int slab, bool near) {
  HUBERT_ECG_SHARED(double, shared);
  const int64_t from = int64_t(blockIdx.y) * slab;
  const Partial partial(shared, sums, counts, num_k, dim, from, int(dim - from < slab ? dim - from : slab), near);
  const int64_t begin = int64_t(blockIdx.x) * chunk, end = begin + chunk < n ? begin + chunk : n;
  double unused = 0;
  for (int64_t first = begin; first < end; first += kPoints) {
    const auto label = [&](int row) {
      const int64_t k = labels[first + row];
      return k < num_k ? k : int64_t(-1);
    };
    add_rows(x + first * dim + from, dim, int(end - first < kPoints ? end - first : kPoints), label, partial,
             static_cast<const T*>(nullptr), unused);
  }
  partial.write();
}

// The sum of `value` over the block, in a fixed order. warps [blockDim / 32]: shared memory; thread 0 gets it.
__device__ inline double block_sum(double value, double* warps) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; threadIdx.x == 0 && w < int(blockDim.x / 32); ++w) sum += warps[w];
  return sum;
}

// Labels, sums and squared distances of a chunk of the points to a block, 128 points at a time.
__global__ void __launch_bounds__(Memory::kThreads, 2)
    step_split(const float* x, const float* centroids, int64_t* labels, double* sums, int64_t* counts, double* spreads,
               int64_t n, int num_k, int dim, int64_t chunk) {
  HUBERT_ECG_SHARED(unsigned char, shared);
  const Memory mem(shared);
  double* const rest = reinterpret_cast<double*>(shared + (Memory::bytes(dim) + 7) / 8 * 8);
  double* const warps = rest + Partial::bytes(num_k, dim) / sizeof(double);
  int* const near_labels = reinterpret_cast<int*>(warps + Memory::kThreads / 32);
  const Partial partial(rest, sums, counts, num_k, dim, 0, dim, true);
  find_shift(centroids, num_k, dim, mem.shift);
  __syncthreads();
  double spread = 0;
  const int64_t begin = int64_t(blockIdx.x) * chunk, end = begin + chunk < n ? begin + chunk : n;
  for (int64_t first = begin; first < end; first += kPoints) {
    const int rows = int(end - first < kPoints ? end - first : kPoints);
    nearest_of_block<true>(mem, x + first * dim, rows, centroids, num_k, dim, first == begin, [&](int row, int k) {
      near_labels[row] = k;
      labels[first + row] = k;
    });
    add_rows(
        x + first * dim, dim, rows, [&](int row) { return int64_t(near_labels[row]); }, partial, centroids, spread);
    __syncthreads();
  }
  partial.write();
  spread = block_sum(spread, warps);
  if (threadIdx.x == 0) spreads[blockIdx.x] = spread;
}

// spreads[block] = the squared distances of a chunk of points to their centroids, a warp to a point.
template <class T>
__global__ void add_distances(const T* x, const T* centroids, const int64_t* labels, double* spreads, int64_t n,
                              int64_t dim, int64_t chunk) {
  HUBERT_ECG_SHARED(double, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t begin = int64_t(blockIdx.x) * chunk, end = begin + chunk < n ? begin + chunk : n;
  double spread = 0;
  for (int64_t i = begin + warp; i < end; i += warps) {
    const T *const point = x + i * dim, *const centroid = centroids + labels[i] * dim;
    for (int64_t d = lane; d < dim; d += 32) {
      const double delta = double(point[d]) - double(centroid[d]);
      spread += delta * delta;
    }
  }
  spread = block_sum(spread, shared);
  if (threadIdx.x == 0) spreads[blockIdx.x] = spread;
}

// out[j] = partial[0][j] + partial[1][j] + ...
template <class T>
__global__ void add_up(const T* partial, T* out, int64_t num_chunks, int64_t size) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= size) return;
  T sum = 0;
#pragma unroll 8
  for (int64_t p = 0; p < num_chunks; ++p) sum += partial[p * size + j];
  out[j] = sum;
}

template <class T>
void run_assign(const char* op, Tensor x, Tensor centroids, Tensor labels, intptr_t stream) {
  const int64_t n = x.size(0);
  if (n == 0) return;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (x.size(1) > 0 && x.size(1) <= kMostDim && centroids.size(0) < (int64_t(1) << 30)) {
      const int dim = int(x.size(1));
      const int64_t blocks = std::min<int64_t>((n + kPoints - 1) / kPoints, 2 * num_multiprocessors());
      const auto kernel = dim <= kDepth ? assign_split<true> : assign_split<false>;
      allow_shared(op, kernel, Memory::bytes(dim));
      HUBERT_ECG_LAUNCH(kernel, static_cast<unsigned>(blocks), Memory::kThreads, Memory::bytes(dim), stream,
                        x.data<float>(), centroids.data<float>(), labels.data<int64_t>(), n, int(centroids.size(0)),
                        dim);
      check_cuda(op, cudaGetLastError());
      return;
    }
  }
  const size_t bytes = (kPoints * (kDims + 1) + kDims * kCentroids) * sizeof(T);
  HUBERT_ECG_LAUNCH(assign<T>, (n + kPoints - 1) / kPoints, kPoints, bytes, stream, x.data<T>(), centroids.data<T>(),
                    labels.data<int64_t>(), n, centroids.size(0), x.size(1));
  check_cuda(op, cudaGetLastError());
}

// out [size] = the sum of `count` partial ones, in order.
template <class T>
void run_add_up(const char* op, const T* partial, T* out, int64_t count, int64_t size, intptr_t stream) {
  if (size == 0) return;
  HUBERT_ECG_LAUNCH(add_up<T>, static_cast<unsigned>((size + 255) / 256), 256, 0, stream, partial, out, count, size);
  check_cuda(op, cudaGetLastError());
}

template <class T>
void run_accumulate(const char* op, Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums,
                    Tensor partial_counts, intptr_t stream) {
  const int64_t n = x.size(0), dim = x.size(1), num_k = sums.size(0), num_chunks = partial_sums.size(0);
  constexpr int kThreads = 256, kMostSlab = 64;
  const int slab = int(std::clamp<int64_t>(dim, 1, kMostSlab));
  const size_t bytes = Partial::bytes(num_k, slab);
  // Half of a multiprocessor's, so that two blocks share it.
  const bool near = bytes <= size_t(most_shared_bytes() / 2);
  const dim3 grid(static_cast<unsigned>(num_chunks),
                  static_cast<unsigned>(std::max<int64_t>(1, (dim + slab - 1) / slab)));
  const auto kernel = add<T>;
  if (near) allow_shared(op, kernel, bytes);
  HUBERT_ECG_LAUNCH(kernel, grid, kThreads, near ? bytes : 0, stream, x.data<T>(), labels.data<int64_t>(),
                    partial_sums.data<double>(), partial_counts.data<int64_t>(), n, num_k, dim,
                    (n + num_chunks - 1) / num_chunks, slab, near);
  check_cuda(op, cudaGetLastError());
  run_add_up(op, partial_sums.data<double>(), sums.data<double>(), num_chunks, num_k * dim, stream);
  run_add_up(op, partial_counts.data<int64_t>(), counts.data<int64_t>(), num_chunks, num_k, stream);
}

template <class T>
void run_step(Tensor x, Tensor centroids, Tensor labels, Tensor sums, Tensor counts, Tensor inertia,
              Tensor partial_sums, Tensor partial_counts, bool with_inertia, intptr_t stream) {
  const char* const op = "kmeans_step";
  const int64_t n = x.size(0), dim = x.size(1), num_k = sums.size(0), room = num_k * dim;
  double* const scratch = partial_sums.data<double>();
  if constexpr (sizeof(T) == sizeof(float)) {
    const size_t bytes = (Memory::bytes(int(std::min<int64_t>(dim, kDepth))) + 7) / 8 * 8 +
                         Partial::bytes(num_k, int(std::min<int64_t>(dim, kDepth))) +
                         Memory::kThreads / 32 * sizeof(double) + kPoints * sizeof(int);
    // The squared distances of the chunks lie where the sums of the last chunks would.
    const int64_t given = partial_sums.size(0), num_chunks = given - (given + room) / (room + 1);
    if (n > 0 && dim > 0 && dim <= kDepth && num_chunks > 0 && bytes <= size_t(most_shared_bytes())) {
      double* const spreads = scratch + num_chunks * room;
      allow_shared(op, step_split, bytes);
      HUBERT_ECG_LAUNCH(step_split, static_cast<unsigned>(num_chunks), Memory::kThreads, bytes, stream, x.data<float>(),
                        centroids.data<float>(), labels.data<int64_t>(), scratch, partial_counts.data<int64_t>(),
                        spreads, n, int(num_k), int(dim), (n + num_chunks - 1) / num_chunks);
      check_cuda(op, cudaGetLastError());
      run_add_up(op, scratch, sums.data<double>(), num_chunks, room, stream);
      run_add_up(op, partial_counts.data<int64_t>(), counts.data<int64_t>(), num_chunks, num_k, stream);
      run_add_up(op, spreads, inertia.data<double>(), with_inertia ? num_chunks : 0, 1, stream);
      return;
    }
  }
  run_assign<T>(op, x, centroids, labels, stream);
  run_accumulate<T>(op, x, labels, sums, counts, partial_sums, partial_counts, stream);
  if (!with_inertia) {
    run_add_up(op, scratch, inertia.data<double>(), 0, 1, stream);
    return;
  }
  // The partial sums are used up by now; without dimensions there is nothing to add, and room for one number.
  constexpr int kThreads = 256, kMostBlocks = 1024;
  const int64_t most = partial_sums.size(0) * room, blocks = std::clamp<int64_t>(n / kThreads, 1, kMostBlocks);
  const bool direct = blocks == 1 || most < blocks;
  double* const spreads = direct ? inertia.data<double>() : scratch;
  const int64_t used = direct ? 1 : blocks;
  HUBERT_ECG_LAUNCH(add_distances<T>, static_cast<unsigned>(used), kThreads, kThreads / 32 * sizeof(double), stream,
                    x.data<T>(), centroids.data<T>(), labels.data<int64_t>(), spreads, n, dim, (n + used - 1) / used);
  check_cuda(op, cudaGetLastError());
  if (!direct) run_add_up(op, spreads, inertia.data<double>(), used, 1, stream);
}

}  // namespace

void kmeans_assign_cuda(Tensor x, Tensor centroids, Tensor labels, intptr_t stream) {
  check_kmeans_assign(x, centroids, labels);
  x.is<float>() ? run_assign<float>("kmeans_assign", x, centroids, labels, stream)
                : run_assign<double>("kmeans_assign", x, centroids, labels, stream);
}

void kmeans_accumulate_cuda(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums,
                            Tensor partial_counts, intptr_t stream) {
  check_kmeans_accumulate(x, labels, sums, counts, partial_sums, partial_counts);
  if (x.is<float>())
    run_accumulate<float>("kmeans_accumulate", x, labels, sums, counts, partial_sums, partial_counts, stream);
  else
    run_accumulate<double>("kmeans_accumulate", x, labels, sums, counts, partial_sums, partial_counts, stream);
}

void kmeans_step_cuda(Tensor x, Tensor centroids, Tensor labels, Tensor sums, Tensor counts, Tensor inertia,
                      Tensor partial_sums, Tensor partial_counts, bool with_inertia, intptr_t stream) {
  check_kmeans_step(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts);
  if (x.is<float>())
    run_step<float>(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts, with_inertia, stream);
  else
    run_step<double>(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts, with_inertia, stream);
}

}  // namespace hubert_ecg
