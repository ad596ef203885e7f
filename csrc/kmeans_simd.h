// The inner loop of kmeans.cpp for one instruction set; every_isa.h includes it once for each.
#include "vectors_simd.h"

namespace HUBERT_ECG_ISA {

template <class T, bool kInertia>
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) double add_rows(const T* points, const int64_t* labels,
                                                                               const int32_t* order, int64_t n,
                                                                               int64_t dim, int64_t num_k,
                                                                               const T* centroids, double* sums,
                                                                               int64_t* counts) {
  constexpr int W = Simd<double>::width;
  V<double> squares{};
  double rest = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = order ? order[j] : j, k = labels[i];
    if (k < 0 || k >= num_k) continue;
    const T* const x = points + i * dim;
    double* const sum = sums + k * dim;
    const T* const centroid = kInertia ? centroids + k * dim : nullptr;
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      const V<double> value = load_double(x + d);
      store(sum + d, load<V<double>>(sum + d) + value);
      if constexpr (kInertia) {
        const V<double> delta = value - load_double(centroid + d);
        squares += delta * delta;
      }
    }
    for (; d < dim; ++d) {
      const double value = double(x[d]);
      sum[d] += value;
      if constexpr (kInertia) rest += (value - double(centroid[d])) * (value - double(centroid[d]));
    }
    if (counts) ++counts[k];
  }
  for (int l = 0; l < W; ++l) rest += squares[l];
  return rest;
}

// Adds n points, in this order where it is not null, to the sums of their clusters, and to the counts where they are
// not null. Returns the sum of squared distances to their centroids, 0 where `centroids` is null.
template <class T>
HUBERT_ECG_TARGET static double add(const T* x, const int64_t* labels, const int32_t* order, int64_t n, int64_t dim,
                                    int64_t num_k, const T* centroids, double* sums, int64_t* counts) {
  return centroids ? add_rows<T, true>(x, labels, order, n, dim, num_k, centroids, sums, counts)
                   : add_rows<T, false>(x, labels, order, n, dim, num_k, centroids, sums, counts);
}

template <class T>
const Kernels<T> kernels = {add<T>};

}  // namespace HUBERT_ECG_ISA
