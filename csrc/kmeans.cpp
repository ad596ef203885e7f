#include "kmeans.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "isa.h"
#include "kmeans_points.h"

namespace hubert_ecg {
namespace {

// The inner loops for one instruction set: kmeans_simd.h.
struct Kernels {
  void (*add_float)(const float* x, const int64_t* labels, int64_t n, int64_t dim, int64_t num_k, double* sums,
                    int64_t* counts);
  void (*add_double)(const double* x, const int64_t* labels, int64_t n, int64_t dim, int64_t num_k, double* sums,
                     int64_t* counts);
};

#define HUBERT_ECG_SIMD_FILE "kmeans_simd.h"
#include "every_isa.h"

const Kernels& kernels() {
  static const Kernels& chosen = HUBERT_ECG_BEST(kernels);
  return chosen;
}

template <class T>
void assign(const T* x, const T* centroids, int64_t n, int64_t num_k, int64_t dim, int64_t* labels) {
  constexpr int64_t points = Codebook<T>::kPoints;
  const Codebook<T> codebook(centroids, num_k, dim);
  const int64_t num_groups = (n + points - 1) / points, scratch = codebook.scratch_size();
  const int num_threads = int(std::min<int64_t>(omp_get_max_threads(), std::max<int64_t>(num_groups, 1)));
  std::vector<T> memory(num_threads * scratch);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t first = g * points;
    codebook.label(x + first * dim, std::min(points, n - first), labels + first,
                   memory.data() + omp_get_thread_num() * scratch);
  }
}

}  // namespace

void kmeans_assign_cpu(Tensor x, Tensor centroids, Tensor labels) {
  check_kmeans_assign(x, centroids, labels);
  const int64_t n = x.size(0), dim = x.size(1), num_k = centroids.size(0);
  if (dim == 0) {
    std::fill_n(labels.data<int64_t>(), n, int64_t(0));
  } else if (x.is<float>()) {
    assign(x.data<float>(), centroids.data<float>(), n, num_k, dim, labels.data<int64_t>());
  } else {
    assign(x.data<double>(), centroids.data<double>(), n, num_k, dim, labels.data<int64_t>());
  }
}

void kmeans_accumulate_cpu(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums,
                           Tensor partial_counts) {
  check_kmeans_accumulate(x, labels, sums, counts, partial_sums, partial_counts);
  const int64_t n = x.size(0), dim = x.size(1), num_k = sums.size(0), num_chunks = partial_sums.size(0);
  const int64_t chunk = (n + num_chunks - 1) / num_chunks;
  const Kernels& isa = kernels();
#pragma omp parallel for schedule(dynamic)
  for (int64_t p = 0; p < num_chunks; ++p) {
    double* const sum = partial_sums.data<double>() + p * num_k * dim;
    int64_t* const count = partial_counts.data<int64_t>() + p * num_k;
    std::fill_n(sum, num_k * dim, 0.0);
    std::fill_n(count, num_k, int64_t(0));
    const int64_t first = std::min(n, p * chunk), size = std::min(n, first + chunk) - first;
    const int64_t* const mine = labels.data<int64_t>() + first;
    if (x.is<float>())
      isa.add_float(x.data<float>() + first * dim, mine, size, dim, num_k, sum, count);
    else
      isa.add_double(x.data<double>() + first * dim, mine, size, dim, num_k, sum, count);
  }
#pragma omp parallel for
  for (int64_t k = 0; k < num_k; ++k) {
    double* const sum = sums.data<double>() + k * dim;
    std::fill_n(sum, dim, 0.0);
    int64_t total = 0;
    for (int64_t p = 0; p < num_chunks; ++p) {
      const double* const part = partial_sums.data<double>() + (p * num_k + k) * dim;
      for (int64_t d = 0; d < dim; ++d) sum[d] += part[d];
      total += partial_counts.data<int64_t>()[p * num_k + k];
    }
    counts.data<int64_t>()[k] = total;
  }
}

}  // namespace hubert_ecg
