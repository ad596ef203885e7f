#include "kmeans.h"

#include <omp.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "isa.h"
#include "kmeans_points.h"

namespace hubert_ecg {
namespace {

// Bytes that a thread has for itself in the caches of usual processors.
constexpr int64_t kSecondCache = 1 << 19, kThirdCache = 6 << 20;

// The inner loop for one instruction set: kmeans_simd.h.
template <class T>
struct Kernels {
  double (*add)(const T* x, const int64_t* labels, const int32_t* order, int64_t n, int64_t dim, int64_t num_k,
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
    const int64_t i = g * points, size = std::min(points, n - i);
    codebook.label(x.data<T>() + i * dim, size, labels.data<int64_t>() + i,
                   memory.data() + omp_get_thread_num() * scratch, std::min(points, n - i - size));
  }
}

double total(const std::vector<double>& parts) { return std::accumulate(parts.begin(), parts.end(), 0.0); }

// Sums, counts and inertia (0 where `centroids` is null) of labelled points, the clusters shared among the threads: for
// sums so large that there is memory for one copy only. Points are added in order, 2^16 of them at a time.
template <class T>
double accumulate_by_clusters(const T* x, const int64_t* labels, const T* centroids, int64_t n, int64_t dim,
                              int64_t num_k, double* sums, int64_t* counts, double* partial) {
  constexpr int64_t kTogether = 1 << 16;
  std::fill_n(counts, num_k, int64_t(0));
  for (int64_t i = 0; i < n; ++i)
    if (labels[i] >= 0 && labels[i] < num_k) ++counts[labels[i]];
  // Clusters begin[t] up to begin[t + 1] have about as many points for each thread t.
  const int num_threads = num_threads_for(std::min(num_k, n * std::max<int64_t>(dim, 1) / 4096));
  std::vector<int64_t> begin(num_threads + 1, num_k);
  const int64_t all = std::accumulate(counts, counts + num_k, int64_t(0));
  int64_t before = 0;
  begin[0] = 0;
  for (int64_t k = 0, t = 1; k < num_k; before += counts[k++])
    for (; t < num_threads && before >= all * t / num_threads; ++t) begin[t] = k;
  std::vector<double> inertia(num_k);
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int t = 0; t < num_threads; ++t) {
    const int64_t first = begin[t], last = begin[t + 1];
    std::fill(sums + first * dim, sums + last * dim, 0.0);
    std::fill(partial + first * dim, partial + last * dim, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = labels[i];
      if (k >= first && k < last)
        inertia[k] += isa<T>().add(x + i * dim, labels + i, nullptr, 1, dim, num_k, centroids, partial, nullptr);
      if ((i + 1) % kTogether != 0 && i + 1 < n) continue;
      for (int64_t j = first * dim; j < last * dim; ++j) {
        sums[j] += partial[j];
        partial[j] = 0;
      }
    }
  }
  return total(inertia);
}

// Where n points of each cluster 0..K-1 lie, one cluster after the other. Returns how many these are.
//   begin [K + 1] (scratch); order [n] (written)
int64_t sort_by_cluster(const int64_t* labels, int64_t n, int64_t num_k, int32_t* begin, int32_t* order) {
  const auto in = [&](int64_t k) { return k >= 0 && k < num_k; };
  std::fill_n(begin, num_k + 1, 0);
  for (int64_t i = 0; i < n; ++i)
    if (in(labels[i])) ++begin[labels[i] + 1];
  std::partial_sum(begin, begin + num_k + 1, begin);
  const int64_t all = begin[num_k];
  for (int64_t i = 0; i < n; ++i)
    if (in(labels[i])) order[begin[labels[i]]++] = int32_t(i);
  return all;
}

// The same, in P chunks with sums of their own, which are added in order. Where there are centroids, the points are
// labelled on the way.
template <class T>
double accumulate_by_chunks(const T* x, int64_t* labels, const T* centroids, bool with_inertia, int64_t n, int64_t dim,
                            int64_t num_k, int64_t num_chunks, double* sums, int64_t* counts, double* partial_sums,
                            int64_t* partial_counts) {
  constexpr int64_t points = Codebook<T>::kPoints;
  const int64_t chunk = (n + num_chunks - 1) / num_chunks;
  const int num_threads = num_threads_for(num_chunks);
  std::optional<Codebook<T>> codebook;
  std::vector<T> memory;
  if (centroids) {
    codebook.emplace(centroids, num_k, dim);
    memory.resize(num_threads * codebook->scratch_size());
  }
  // Sums that no second-level cache holds are read and written once for all points of a cluster that stay in the third.
  const bool sorted = num_k * dim * int64_t(sizeof(double)) > kSecondCache;
  const int64_t batch =
      sorted ? std::clamp(kThirdCache / (dim * int64_t(sizeof(T))), points, std::max(points, chunk)) : points;
  std::vector<int32_t> orders(sorted ? num_threads * (num_k + 1 + batch) : 0);
  std::vector<double> inertia(num_chunks);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t p = 0; p < num_chunks; ++p) {
    const int thread = omp_get_thread_num();
    double* const sum = partial_sums + p * num_k * dim;
    int64_t* const count = partial_counts + p * num_k;
    std::fill_n(sum, num_k * dim, 0.0);
    std::fill_n(count, num_k, int64_t(0));
    const int64_t end = std::min(n, (p + 1) * chunk);
    for (int64_t i = p * chunk; i < end; i += batch) {
      const int64_t size = std::min(batch, end - i);
      for (int64_t j = i; centroids && j < i + size; j += points) {
        const int64_t together = std::min(points, i + size - j);
        codebook->label(x + j * dim, together, labels + j, memory.data() + thread * codebook->scratch_size(),
                        std::min(points, end - j - together));
      }
      const T* const from = with_inertia ? centroids : nullptr;
      if (sorted) {
        int32_t *const begin = orders.data() + thread * (num_k + 1 + batch), *const order = begin + num_k + 1;
        const int64_t all = sort_by_cluster(labels + i, size, num_k, begin, order);
        inertia[p] += isa<T>().add(x + i * dim, labels + i, order, all, dim, num_k, from, sum, count);
      } else {
        inertia[p] += isa<T>().add(x + i * dim, labels + i, nullptr, size, dim, num_k, from, sum, count);
      }
    }
  }
#pragma omp parallel for num_threads(num_threads_for(num_chunks * num_k * dim >> 18))
  for (int64_t k = 0; k < num_k; ++k) {
    double* const sum = sums + k * dim;
    std::fill_n(sum, dim, 0.0);
    counts[k] = 0;
    for (int64_t p = 0; p < num_chunks; ++p) {
      for (int64_t d = 0; d < dim; ++d) sum[d] += partial_sums[(p * num_k + k) * dim + d];
      counts[k] += partial_counts[p * num_k + k];
    }
  }
  return total(inertia);
}

template <class T>
void accumulate(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums, Tensor partial_counts) {
  const int64_t n = x.size(0), dim = x.size(1), num_k = sums.size(0), num_chunks = partial_sums.size(0);
  if (num_chunks == 1)
    accumulate_by_clusters<T>(x.data<T>(), labels.data<int64_t>(), nullptr, n, dim, num_k, sums.data<double>(),
                              counts.data<int64_t>(), partial_sums.data<double>());
  else
    accumulate_by_chunks<T>(x.data<T>(), labels.data<int64_t>(), nullptr, false, n, dim, num_k, num_chunks,
                            sums.data<double>(), counts.data<int64_t>(), partial_sums.data<double>(),
                            partial_counts.data<int64_t>());
}

template <class T>
void step(Tensor x, Tensor centroids, Tensor labels, Tensor sums, Tensor counts, Tensor inertia, Tensor partial_sums,
          Tensor partial_counts, bool with_inertia) {
  const int64_t n = x.size(0), dim = x.size(1), num_k = sums.size(0), num_chunks = partial_sums.size(0);
  if (num_chunks == 1 || dim == 0) {
    assign<T>(x, centroids, labels);
    *inertia.data<double>() =
        accumulate_by_clusters<T>(x.data<T>(), labels.data<int64_t>(), with_inertia ? centroids.data<T>() : nullptr, n,
                                  dim, num_k, sums.data<double>(), counts.data<int64_t>(), partial_sums.data<double>());
  } else {
    *inertia.data<double>() = accumulate_by_chunks<T>(
        x.data<T>(), labels.data<int64_t>(), centroids.data<T>(), with_inertia, n, dim, num_k, num_chunks,
        sums.data<double>(), counts.data<int64_t>(), partial_sums.data<double>(), partial_counts.data<int64_t>());
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
                     Tensor partial_sums, Tensor partial_counts, bool with_inertia) {
  check_kmeans_step(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts);
  x.is<float>() ? step<float>(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts, with_inertia)
                : step<double>(x, centroids, labels, sums, counts, inertia, partial_sums, partial_counts, with_inertia);
}

}  // namespace hubert_ecg
