#include "kmeans.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "isa.h"
#include "kmeans_points.h"

namespace hubert_ecg {
namespace {

// The inner loop for one instruction set: kmeans_simd.h.
template <class T>
struct Kernels {
  double (*add)(const T* x, int64_t stride, const int64_t* labels, int64_t n, int64_t width, int64_t num_k,
                const T* centroids, double* sums, int64_t* counts);
};

#define HUBERT_ECG_SIMD_FILE "kmeans_simd.h"
#include "every_isa.h"

template <class T>
const Kernels<T>& isa() {
  static const Kernels<T>& chosen = HUBERT_ECG_BEST(kernels<T>);
  return chosen;
}

int num_threads_for(int64_t pieces) { return int(std::clamp<int64_t>(pieces, 1, omp_get_max_threads())); }

template <class T>
void assign(Tensor x, Tensor centroids, Tensor labels) {
  const int64_t n = x.size(0), dim = x.size(1);
  if (dim == 0) {
    std::fill_n(labels.data<int64_t>(), n, int64_t(0));
    return;
  }
  constexpr int64_t points = Codebook<T>::kPoints;
  const Codebook<T> codebook(centroids.data<T>(), centroids.size(0), dim);
  const int64_t num_groups = (n + points - 1) / points, scratch = codebook.scratch_size();
  const int num_threads = num_threads_for(num_groups);
  std::vector<T> memory(num_threads * scratch);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t first = g * points;
    codebook.label(x.data<T>() + first * dim, std::min(points, n - first), labels.data<int64_t>() + first,
                   memory.data() + omp_get_thread_num() * scratch);
  }
}

// Sums, counts and inertia (where `centroids` is not null) of labelled points, the columns shared among the threads:
// for sums so large that there is memory for one copy only. Points are added in order, 2^16 of them at a time.
template <class T>
double accumulate_by_columns(const T* x, const int64_t* labels, const T* centroids, int64_t n, int64_t dim,
                             int64_t num_k, double* sums, int64_t* counts, double* partial) {
  constexpr int64_t kColumns = 64, kPoints = 1024, kTogether = 1 << 16;
  const int64_t num_blocks = std::max<int64_t>((dim + kColumns - 1) / kColumns, 1);
  const int num_threads = num_threads_for(num_blocks);
  std::fill_n(sums, num_k * dim, 0.0);
  std::fill_n(partial, num_k * dim, 0.0);
  std::fill_n(counts, num_k, int64_t(0));
  std::vector<double> inertia(num_blocks);
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = num_blocks * thread / threads, end = num_blocks * (thread + 1) / threads;
    for (int64_t i = 0; i < n; i += kPoints) {
      const int64_t size = std::min(kPoints, n - i);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t d = b * kColumns;
        inertia[b] += isa<T>().add(x + i * dim + d, dim, labels + i, size, std::min(kColumns, dim - d), num_k,
                                   centroids ? centroids + d : nullptr, partial + d, b ? nullptr : counts);
      }
      if ((i + kPoints) % kTogether != 0 && i + kPoints < n) continue;
      for (int64_t k = 0; k < num_k; ++k) {
        for (int64_t j = k * dim + begin * kColumns; j < k * dim + std::min(end * kColumns, dim); ++j) {
          sums[j] += partial[j];
          partial[j] = 0;
        }
      }
    }
  }
  double total = 0;
  for (const double part : inertia) total += part;
  return total;
}

// The same, in P chunks with sums of their own, which are added in order. Where there are centroids, the points are
// labelled on the way.
template <class T>
double accumulate_by_chunks(const T* x, int64_t* labels, const T* centroids, int64_t n, int64_t dim, int64_t num_k,
                            int64_t num_chunks, double* sums, int64_t* counts, double* partial_sums,
                            int64_t* partial_counts) {
  constexpr int64_t points = Codebook<T>::kPoints;
  const int64_t chunk = (n + num_chunks - 1) / num_chunks;
  const int num_threads = num_threads_for(num_chunks);
  std::vector<Codebook<T>> codebook;
  std::vector<T> memory;
  if (centroids) {
    codebook.emplace_back(centroids, num_k, dim);
    memory.resize(num_threads * codebook[0].scratch_size());
  }
  std::vector<double> inertia(num_chunks);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t p = 0; p < num_chunks; ++p) {
    double* const sum = partial_sums + p * num_k * dim;
    int64_t* const count = partial_counts + p * num_k;
    std::fill_n(sum, num_k * dim, 0.0);
    std::fill_n(count, num_k, int64_t(0));
    const int64_t end = std::min(n, (p + 1) * chunk);
    for (int64_t i = p * chunk; i < end; i += points) {
      const int64_t size = std::min(points, end - i);
      if (centroids)
        codebook[0].label(x + i * dim, size, labels + i,
                          memory.data() + omp_get_thread_num() * codebook[0].scratch_size());
      inertia[p] += isa<T>().add(x + i * dim, dim, labels + i, size, dim, num_k, centroids, sum, count);
    }
  }
#pragma omp parallel for num_threads(num_threads_for(num_k))
  for (int64_t k = 0; k < num_k; ++k) {
    double* const sum = sums + k * dim;
    std::fill_n(sum, dim, 0.0);
    counts[k] = 0;
    for (int64_t p = 0; p < num_chunks; ++p) {
      for (int64_t d = 0; d < dim; ++d) sum[d] += partial_sums[(p * num_k + k) * dim + d];
      counts[k] += partial_counts[p * num_k + k];
    }
  }
  double total = 0;
  for (const double part : inertia) total += part;
  return total;
}

template <class T>
void accumulate(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums, Tensor partial_counts) {
  const int64_t n = x.size(0), dim = x.size(1), num_k = sums.size(0), num_chunks = partial_sums.size(0);
  if (num_chunks == 1)
    accumulate_by_columns<T>(x.data<T>(), labels.data<int64_t>(), nullptr, n, dim, num_k, sums.data<double>(),
                             counts.data<int64_t>(), partial_sums.data<double>());
  else
    accumulate_by_chunks<T>(x.data<T>(), labels.data<int64_t>(), nullptr, n, dim, num_k, num_chunks,
                            sums.data<double>(), counts.data<int64_t>(), partial_sums.data<double>(),
                            partial_counts.data<int64_t>());
}

template <class T>
void step(Tensor x, Tensor centroids, Tensor labels, Tensor sums, Tensor counts, Tensor inertia, Tensor partial_sums,
          Tensor partial_counts) {
  const int64_t n = x.size(0), dim = x.size(1), num_k = sums.size(0), num_chunks = partial_sums.size(0);
  if (num_chunks == 1 || dim == 0) {
    assign<T>(x, centroids, labels);
    *inertia.data<double>() =
        accumulate_by_columns<T>(x.data<T>(), labels.data<int64_t>(), centroids.data<T>(), n, dim, num_k,
                                 sums.data<double>(), counts.data<int64_t>(), partial_sums.data<double>());
  } else {
    *inertia.data<double>() = accumulate_by_chunks<T>(x.data<T>(), labels.data<int64_t>(), centroids.data<T>(), n, dim,
                                                      num_k, num_chunks, sums.data<double>(), counts.data<int64_t>(),
                                                      partial_sums.data<double>(), partial_counts.data<int64_t>());
  }
}

}  // namespace

void kmeans_assign_cpu(Tensor x, Tensor centroids, Tensor labels) {
  check_kmeans_assign(x, centroids, labels);
  x.is<float>() ? assign<float>(x, centroids, labels) : assign<double>(x, centroids, labels);
}

void kmeans_accumulate_cpu(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums,
                           Tensor partial_counts) {
  check_kmeans_accumulate(x, labels, sums, counts, partial_sums, partial_counts);
  x.is<float>() ? accumulate<float>(x, labels, sums, counts, partial_sums, partial_counts)
                : accumulate<double>(x, labels, sums, counts, partial_sums, partial_counts);
}

void kmeans_step_cpu(Tensor x, Tensor centroids, Tensor labels, Tensor sums, Tensor counts, Tensor inertia,
                     Tensor partial_sums, Tensor partial_counts) {
  check_kmeans_step(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts);
  x.is<float>() ? step<float>(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts)
                : step<double>(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts);
}

}  // namespace hubert_ecg
