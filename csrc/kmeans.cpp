#include "kmeans.h"

#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "isa.h"

namespace hubert_ecg {
namespace {

// The inner loops for one instruction set: kmeans_simd.h.
struct Kernels {
  int rows;          // centroids in a register tile
  int lanes;         // points in a float tile
  int double_lanes;  // points in a double tile
  void (*pack)(const float* points, int64_t count, int64_t dim, const float* shift, float* x, float* squares);
  void (*score)(const float* x, int64_t dim, const float* c, const float* half, int64_t first_k, int64_t num_k,
                float* best, float* second, int32_t* arg);
  void (*nearest)(const double* x, int64_t dim, const double* c, int64_t num_k, int64_t* arg);
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

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// [K, D] -> [K / rows][D][rows], less `shift`; centroids that fill up the last tile are all `fill`.
template <class To, class From>
std::vector<To> pack_centroids(const From* c, int64_t num_k, int64_t dim, int rows, const float* shift, To fill) {
  std::vector<To> packed(round_up(num_k, rows) * dim, fill);
  for (int64_t k = 0; k < num_k; ++k)
    for (int64_t d = 0; d < dim; ++d)
      packed[(k / rows * dim + d) * rows + k % rows] = To(c[k * dim + d]) - (shift ? To(shift[d]) : To(0));
  return packed;
}

// Labels of the points listed in `which`, in float64.
template <class T>
void assign_exactly(const Kernels& isa, const T* x, int64_t dim, const int64_t* which, int64_t count,
                    const std::vector<double>& packed, int64_t num_k, double* tile, int64_t* labels) {
  const int lanes = isa.double_lanes;
  int64_t arg[16];
  for (int64_t first = 0; first < count; first += lanes) {
    const int64_t n = std::min<int64_t>(lanes, count - first);
    std::fill(tile, tile + dim * lanes, 0.0);
    for (int64_t l = 0; l < n; ++l) {
      const T* row = x + which[first + l] * dim;
      for (int64_t d = 0; d < dim; ++d) tile[d * lanes + l] = double(row[d]);
    }
    isa.nearest(tile, dim, packed.data(), num_k, arg);
    for (int64_t l = 0; l < n; ++l) labels[which[first + l]] = arg[l];
  }
}

// Points that share a pass over the centroids: as many as fit in the second-level cache, within reason.
int64_t group_size(int64_t dim, int lanes) {
  const int64_t tiles = (256 << 10) / (dim * lanes * int64_t(sizeof(float)) + 1);
  return lanes * std::clamp<int64_t>(tiles, 1, 128 / lanes);
}

void assign_double(const Kernels& isa, const double* x, const double* centroids, int64_t n, int64_t num_k, int64_t dim,
                   int64_t* labels) {
  const std::vector<double> packed = pack_centroids<double>(centroids, num_k, dim, isa.rows, nullptr, double(INFINITY));
  const int64_t lanes = isa.double_lanes, tiles = (n + lanes - 1) / lanes;
  const int num_threads = int(std::min<int64_t>(omp_get_max_threads(), std::max<int64_t>(tiles, 1)));
  std::vector<double> scratch(num_threads * dim * lanes);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    int64_t which[16];
    const int64_t first = tile * lanes, count = std::min(lanes, n - first);
    for (int64_t l = 0; l < count; ++l) which[l] = first + l;
    assign_exactly(isa, x, dim, which, count, packed, int64_t(packed.size() / std::max<int64_t>(dim, 1)),
                   scratch.data() + omp_get_thread_num() * dim * lanes, labels);
  }
}

// Scores in float32, then float64 for the points whose two lowest scores lie within the rounding error of a score.
void assign_float(const Kernels& isa, const float* x, const float* centroids, int64_t n, int64_t num_k, int64_t dim,
                  int64_t* labels) {
  // Distances do not change when everything moves by the centroids' mean, and scores then lose the least to
  // cancellation.
  std::vector<float> shift(dim);
  for (int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (int64_t k = 0; k < num_k; ++k) sum += centroids[k * dim + d];
    shift[d] = float(sum / double(num_k));
  }
  const std::vector<float> packed = pack_centroids<float>(centroids, num_k, dim, isa.rows, shift.data(), 0.0f);
  const std::vector<double> exact = pack_centroids<double>(centroids, num_k, dim, isa.rows, nullptr, double(INFINITY));
  const int64_t padded_k = round_up(num_k, isa.rows);
  std::vector<float> half(padded_k, INFINITY);
  double longest = 0;
  for (int64_t k = 0; k < num_k; ++k) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double c = packed[(k / isa.rows * dim + d) * isa.rows + k % isa.rows];
      sum += c * c;
    }
    half[k] = float(sum / 2);
    longest = std::max(longest, std::sqrt(sum));
  }
  // Rounding error of a score by Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: each of the D
  // steps of the sum and the roundings of x, c and |c|^2 / 2 cost at most u (|x| |c| + |c|^2 / 2). Two scores may each
  // be off.
  const float slack = float(1.01 * 2 * (FLT_EPSILON / 2) * double(dim + 8) * longest);
  const float half_longest = float(longest / 2);

  const int64_t lanes = isa.lanes, group = group_size(dim, isa.lanes), num_groups = (n + group - 1) / group;
  // Centroids that share a pass over the points of a group: 16 KiB of them stay in the first-level cache.
  const int64_t block_k = round_up(std::max<int64_t>((16 << 10) / (dim * int64_t(sizeof(float)) + 1), 1), isa.rows);
  const int num_threads = int(std::min<int64_t>(omp_get_max_threads(), std::max<int64_t>(num_groups, 1)));
  std::vector<float> tiles(num_threads * dim * group);
  std::vector<double> double_tiles(num_threads * dim * isa.double_lanes);

#pragma omp parallel for num_threads(num_threads)
  for (int64_t g = 0; g < num_groups; ++g) {
    float* const tile = tiles.data() + omp_get_thread_num() * dim * group;
    float best[128], second[128], squares[128];
    int32_t arg[128];
    int64_t doubtful[128];
    const int64_t first = g * group, count = std::min(group, n - first), used = round_up(count, lanes);
    std::fill(best, best + used, INFINITY);
    std::fill(second, second + used, INFINITY);
    std::fill(arg, arg + used, 0);
    for (int64_t i = 0; i < count; i += lanes)
      isa.pack(x + (first + i) * dim, std::min(lanes, count - i), dim, shift.data(), tile + i * dim, squares + i);
    for (int64_t k = 0; k < padded_k; k += block_k)
      for (int64_t i = 0; i < used; i += lanes)
        isa.score(tile + i * dim, dim, packed.data() + k * dim, half.data() + k, k, std::min(block_k, padded_k - k),
                  best + i, second + i, arg + i);
    int64_t num_doubtful = 0;
    for (int64_t i = 0; i < count; ++i) {
      labels[first + i] = arg[i];
      // Not "gap <= bound": a score that is not finite is in doubt too.
      if (!(second[i] - best[i] > slack * (std::sqrt(squares[i]) + half_longest) + FLT_MIN))
        doubtful[num_doubtful++] = first + i;
    }
    assign_exactly(isa, x, dim, doubtful, num_doubtful, exact, padded_k,
                   double_tiles.data() + omp_get_thread_num() * dim * isa.double_lanes, labels);
  }
}

}  // namespace

void kmeans_assign_cpu(Tensor x, Tensor centroids, Tensor labels) {
  check_kmeans_assign(x, centroids, labels);
  const int64_t n = x.size(0), dim = x.size(1), num_k = centroids.size(0);
  if (dim == 0) {
    std::fill_n(labels.data<int64_t>(), n, int64_t(0));
  } else if (x.is<float>()) {
    assign_float(kernels(), x.data<float>(), centroids.data<float>(), n, num_k, dim, labels.data<int64_t>());
  } else {
    assign_double(kernels(), x.data<double>(), centroids.data<double>(), n, num_k, dim, labels.data<int64_t>());
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
