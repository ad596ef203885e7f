#include <cfloat>

#include "kmeans.h"
#include "launch.h"

namespace hubert_ecg {
namespace {

constexpr int kPoints = 128;    // points of a block, one to a thread
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

// Distances in T; a float32 point whose two lowest distances lie within their rounding error is looked at in float64.
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

// One chunk of the points to a block, one column of x to a thread: nothing is shared, so nothing depends on the order.
template <class T>
__global__ void add(const T* x, const int64_t* labels, double* sums, int64_t* counts, int64_t n, int64_t num_k,
                    int64_t dim, int64_t chunk) {
  double* const sum = sums + blockIdx.x * num_k * dim;
  int64_t* const count = counts + blockIdx.x * num_k;
  const int64_t first = int64_t(blockIdx.x) * chunk, last = first + chunk < n ? first + chunk : n;
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
    for (int64_t k = 0; k < num_k; ++k) sum[k * dim + d] = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t k = labels[i];
      if (k >= 0 && k < num_k) sum[k * dim + d] += double(x[i * dim + d]);
    }
  }
  if (threadIdx.x == blockDim.x - 1) {
    for (int64_t k = 0; k < num_k; ++k) count[k] = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t k = labels[i];
      if (k >= 0 && k < num_k) ++count[k];
    }
  }
}

// out[j] = partial[0][j] + partial[1][j] + ...
template <class T>
__global__ void add_up(const T* partial, T* out, int64_t num_chunks, int64_t size) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= size) return;
  T sum = 0;
  for (int64_t p = 0; p < num_chunks; ++p) sum += partial[p * size + j];
  out[j] = sum;
}

template <class T>
void run_assign(Tensor x, Tensor centroids, Tensor labels, intptr_t stream) {
  const int64_t n = x.size(0);
  if (n == 0) return;
  const size_t bytes = (kPoints * (kDims + 1) + kDims * kCentroids) * sizeof(T);
  HUBERT_ECG_LAUNCH(assign<T>, (n + kPoints - 1) / kPoints, kPoints, bytes, stream, x.data<T>(), centroids.data<T>(),
                    labels.data<int64_t>(), n, centroids.size(0), x.size(1));
  check_cuda("kmeans_assign", cudaGetLastError());
}

template <class T>
void run_accumulate(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums, Tensor partial_counts,
                    intptr_t stream) {
  const int64_t n = x.size(0), dim = x.size(1), num_k = sums.size(0), num_chunks = partial_sums.size(0);
  const int64_t chunk = (n + num_chunks - 1) / num_chunks;
  const int threads = int(dim < 256 ? (dim + 31) / 32 * 32 + 32 : 256);
  HUBERT_ECG_LAUNCH(add<T>, num_chunks, threads, 0, stream, x.data<T>(), labels.data<int64_t>(),
                    partial_sums.data<double>(), partial_counts.data<int64_t>(), n, num_k, dim, chunk);
  check_cuda("kmeans_accumulate", cudaGetLastError());
  if (num_k * dim > 0) {
    HUBERT_ECG_LAUNCH(add_up<double>, (num_k * dim + 255) / 256, 256, 0, stream, partial_sums.data<double>(),
                      sums.data<double>(), num_chunks, num_k * dim);
    check_cuda("kmeans_accumulate", cudaGetLastError());
  }
  if (num_k > 0) {
    HUBERT_ECG_LAUNCH(add_up<int64_t>, (num_k + 255) / 256, 256, 0, stream, partial_counts.data<int64_t>(),
                      counts.data<int64_t>(), num_chunks, num_k);
    check_cuda("kmeans_accumulate", cudaGetLastError());
  }
}

}  // namespace

void kmeans_assign_cuda(Tensor x, Tensor centroids, Tensor labels, intptr_t stream) {
  check_kmeans_assign(x, centroids, labels);
  x.is<float>() ? run_assign<float>(x, centroids, labels, stream) : run_assign<double>(x, centroids, labels, stream);
}

void kmeans_accumulate_cuda(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums,
                            Tensor partial_counts, intptr_t stream) {
  check_kmeans_accumulate(x, labels, sums, counts, partial_sums, partial_counts);
  if (x.is<float>())
    run_accumulate<float>(x, labels, sums, counts, partial_sums, partial_counts, stream);
  else
    run_accumulate<double>(x, labels, sums, counts, partial_sums, partial_counts, stream);
}

}  // namespace hubert_ecg
