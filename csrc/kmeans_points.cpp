#include "kmeans_points.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"

namespace hubert_ecg {
namespace {

// The inner loops for one instruction set: kmeans_points_simd.h.
template <class T>
struct Kernels {
  int rows;   // centroids in a register tile
  int lanes;  // points in a register tile
  void (*pack)(const T* points, int64_t stride, int64_t count, int64_t dim, const T* offset, T* x, T* squares);
  void (*score)(const T* x, int64_t dim, const T* c, const T* half, int64_t num_k, T* scores, T* lowest,
                const char* next, int64_t ahead);
  void (*select)(const T* scores, int64_t num_k, const T* squares, const T* lowest, T slack, T half_longest, T* limit,
                 Index<T>* count, Index<T>* arg);
  double (*distance)(const T* a, const T* b, int64_t dim);
};

#define HUBERT_ECG_SIMD_FILE "kmeans_points_simd.h"
#include "every_isa.h"

template <class T>
const Kernels<T>& isa() {
  static const Kernels<T>& chosen = HUBERT_ECG_BEST(kernels<T>);
  return chosen;
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

template <class T>
Codebook<T>::Codebook(const T* centroids, int64_t num_k, int64_t dim)
    : centroids_(centroids), num_k_(num_k), dim_(dim), offset_(dim) {
  const int64_t rows = isa<T>().rows, lanes = isa<T>().lanes, element = sizeof(T);
  padded_k_ = round_up(num_k, rows);
  // 16 KiB of points stay in the first-level cache, 128 KiB of centroids in the second.
  const int64_t num_blocks = (dim * lanes * element - 1) / (16 << 10) + 1;
  block_ = (dim - 1) / num_blocks + 1;
  block_k_ = round_up((128 << 10) / (block_ * element), rows);
  points_ = std::clamp<int64_t>((1 << 17) / padded_k_ / lanes * lanes, lanes, kPoints);

  // Distances do not change when everything moves by the centroids' mean, and scores then lose the least to
  // cancellation.
  for (int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (int64_t k = 0; k < num_k; ++k) sum += double(centroids[k * dim + d]);
    const T mean = T(sum / double(num_k));
    offset_[d] = std::isfinite(mean) ? -mean : T(0);
  }
  // [dim / block][K / rows][block][rows]
  packed_.resize(padded_k_ * dim);
  T* to = packed_.data();
  for (int64_t first = 0; first < dim; first += block_)
    for (int64_t k = 0; k < padded_k_; k += rows)
      for (int64_t d = first; d < std::min(dim, first + block_); ++d)
        for (int64_t r = k; r < k + rows; ++r) *to++ = r < num_k ? centroids[r * dim + d] + offset_[d] : T(0);
  half_.assign(padded_k_, std::numeric_limits<T>::infinity());
  double longest = 0;
  for (int64_t k = 0; k < num_k; ++k) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double c = double(T(centroids[k * dim + d] + offset_[d]));
      sum += c * c;
    }
    half_[k] = T(sum / 2);
    longest = std::max(longest, std::sqrt(sum));
  }
  // Rounding error of a score by Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: each step of the
  // longest chain of additions and the roundings of x, c and |c|^2 / 2 cost at most u (|x| |c| + |c|^2 / 2). Two scores
  // may each be off.
  slack_ = T(1.01 * 2 * (std::numeric_limits<T>::epsilon() / 2) * double(block_ + num_blocks + 8) * longest);
  half_longest_ = T(longest / 2);
  // Half of it all may overflow on the way.
  if (!(longest * longest < std::numeric_limits<T>::max() / 16)) slack_ = std::numeric_limits<T>::quiet_NaN();
}

template <class T>
void Codebook<T>::label(const T* x, int64_t n, int64_t* labels, T* scratch, int64_t ahead) const {
  const Kernels<T>& run = isa<T>();
  const int64_t lanes = run.lanes, row_bytes = dim_ * int64_t(sizeof(T));
  T squares[kPoints], lowest[kPoints], limit[kPoints];
  Index<T> count[kPoints], arg[kPoints];
  // Whole cache lines, for loads that do not straddle two of them.
  T* const tiles = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  T* const scores = tiles + points_ * block_;
  for (; n > 0; n -= points_, x += points_ * dim_, labels += points_) {
    const int64_t num_points = std::min(n, points_);
    std::fill_n(squares, kPoints, T(0));
    std::fill_n(lowest, kPoints, std::numeric_limits<T>::infinity());
    for (int64_t first = 0; first < dim_; first += block_) {
      const int64_t size = std::min(block_, dim_ - first);
      const bool last = first + size == dim_;
      for (int64_t i = 0; i < num_points; i += lanes)
        run.pack(x + i * dim_ + first, dim_, std::min(lanes, num_points - i), size, offset_.data() + first,
                 tiles + i * size, squares + i);
      for (int64_t k = 0; k < padded_k_; k += block_k_) {
        for (int64_t i = 0; i < num_points; i += lanes) {
          // Rows of many coordinates take so long that the processor fetches them in time by itself.
          const bool fetch = k == 0 && block_ == dim_;
          const int64_t fetched = fetch ? std::clamp<int64_t>(n + ahead - points_ - i, 0, lanes) * row_bytes : 0;
          run.score(tiles + i * size, size, packed_.data() + first * padded_k_ + k * size,
                    first == 0 ? half_.data() + k : nullptr, std::min(block_k_, padded_k_ - k),
                    scores + i * padded_k_ + k * lanes, last ? lowest + i : nullptr,
                    reinterpret_cast<const char*>(x) + (points_ + i) * row_bytes, fetched);
        }
      }
    }
    for (int64_t i = 0; i < num_points; i += lanes) {
      const T* const tile = scores + i * padded_k_;
      run.select(tile, num_k_, squares + i, lowest + i, slack_, half_longest_, limit + i, count + i, arg + i);
      for (int64_t l = 0; l < std::min(lanes, num_points - i); ++l)
        labels[i + l] = count[i + l] == 1 ? arg[i + l] : recheck(x + (i + l) * dim_, tile + l, limit[i + l]);
    }
  }
}

// The nearest among the centroids whose scores do not lie above `limit`; among all where that is no number.
template <class T>
int64_t Codebook<T>::recheck(const T* point, const T* scores, T limit) const {
  const Kernels<T>& run = isa<T>();
  const bool trusted = std::isfinite(limit);
  double best = INFINITY;
  int64_t arg = 0;
  for (int64_t k = 0; k < num_k_; ++k) {
    if (trusted && !(scores[k * run.lanes] <= limit)) continue;
    const double distance = run.distance(point, centroids_ + k * dim_, dim_);
    if (distance < best) best = distance, arg = k;
  }
  return arg;
}

template class Codebook<float>;
template class Codebook<double>;

}  // namespace hubert_ecg
