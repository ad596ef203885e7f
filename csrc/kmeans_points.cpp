#include "kmeans_points.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"

namespace hubert_ecg {
namespace {

// Added to squared lengths, and to what scores may miss: more than products that vanish in T can add up to.
template <class T>
constexpr T kTiny = std::numeric_limits<T>::min() * T(int64_t{1} << 31);

// Length of a block of coordinates in units of its 16 bits: products of two such add up to less than 2^31.
constexpr double kLength = 32700;

// The inner loops for one instruction set: kmeans_points_simd.h.
template <class T>
struct Kernels {
  int rows;   // centroids in a register tile
  int lanes;  // points in a register tile
  void (*pack)(const T* points, int64_t stride, int64_t count, int64_t dim, const T* offset, T* x, T* squares);
  void (*score)(const T* x, int64_t dim, const T* c, const T* half, int64_t num_k, T* scores, T* lowest,
                const char* next, int64_t ahead);
  void (*select)(const T* scores, int64_t num_k, const T* squares, const T* lowest, T least, T spread, T* limit,
                 Index<T>* count, Index<T>* arg);
  double (*distance)(const T* a, const T* b, int64_t dim);
  // Null where they do not pay.
  void (*round_pairs)(const T* x, int64_t dim, const T* squares, T* unit, int32_t* pairs);
  void (*score_pairs)(const int32_t* x, const T* unit, int64_t dim, const int32_t* c, T c_unit, const T* half,
                      int64_t num_k, T* scores, T* lowest, const char* next, int64_t ahead);
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
  std::vector<T> centred(padded_k_ * dim);
  for (int64_t k = 0; k < num_k; ++k)
    for (int64_t d = 0; d < dim; ++d) centred[k * dim + d] = centroids[k * dim + d] + offset_[d];
  // [dim / block][K / rows][block][rows]
  packed_.resize(padded_k_ * dim);
  T* to = packed_.data();
  for (int64_t first = 0; first < dim; first += block_)
    for (int64_t k = 0; k < padded_k_; k += rows)
      for (int64_t d = first; d < std::min(dim, first + block_); ++d)
        for (int64_t r = k; r < k + rows; ++r) *to++ = centred[r * dim + d];
  half_.assign(padded_k_, std::numeric_limits<T>::infinity());
  double longest = 0;
  for (int64_t k = 0; k < num_k; ++k) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double c = double(centred[k * dim + d]);
      sum += c * c;
    }
    half_[k] = T(sum / 2);
    longest = std::max(longest, std::sqrt(sum));
  }
  // Rounding error of a score by Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: each step of the
  // longest chain of additions and the roundings of x, c and |c|^2 / 2 cost at most u (|x| |c| + |c|^2 / 2). Two scores
  // may each be off.
  spread_ = T(1.01 * 2 * (std::numeric_limits<T>::epsilon() / 2) * double(block_ + num_blocks + 8) * longest);
  least_ = spread_ * T(longest / 2) + kTiny<T>;
  // Half of it all may overflow on the way.
  if (!(longest * longest < std::numeric_limits<T>::max() / 16)) spread_ = std::numeric_limits<T>::quiet_NaN();
  if (isa<T>().score_pairs && std::isfinite(spread_)) pack_pairs(centred);
}

// Each block of coordinates in units of its own, by which no centroid is longer than kLength.
template <class T>
void Codebook<T>::pack_pairs(const std::vector<T>& centred) {
  const int64_t rows = isa<T>().rows;
  std::vector<double> errors(num_k_);
  double longest_of_all = 0;
  for (int64_t first = 0; first < dim_; first += block_) {
    const int64_t size = std::min(block_, dim_ - first);
    double longest = 0;
    for (int64_t k = 0; k < num_k_; ++k) {
      double sum = 0;
      for (int64_t d = first; d < first + size; ++d)
        sum += double(centred[k * dim_ + d]) * double(centred[k * dim_ + d]);
      longest = std::max(longest, std::sqrt(sum));
    }
    longest_of_all += longest * longest;
    // Where the unit would vanish, all is zero.
    units_.push_back(std::max(T(longest / kLength), std::numeric_limits<T>::min()));
    const double unit = double(units_.back());
    const auto rounded = [&](int64_t k, int64_t d) -> int32_t {
      if (k >= num_k_ || d >= first + size || !std::isfinite(half_[k])) return 0;
      const double value = double(centred[k * dim_ + d]), whole = std::nearbyint(value / unit);
      errors[k] += (value - whole * unit) * (value - whole * unit);
      return int32_t(whole);
    };
    for (int64_t k = 0; k < padded_k_; k += rows)
      for (int64_t d = first; d < first + size; d += 2)
        for (int64_t r = k; r < k + rows; ++r) {
          const uint32_t low = uint32_t(rounded(r, d)) & 0xffffu, high = uint32_t(rounded(r, d + 1)) << 16;
          pairs_.push_back(int32_t(high | low));
        }
  }
  // |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'|, where a coordinate of x' is off by half a unit, |x| / kLength.
  const double error = std::sqrt(*std::max_element(errors.begin(), errors.end()));
  const double coarse = 0.51 * std::sqrt(double(block_)) / kLength * std::sqrt(longest_of_all) + error;
  pairs_spread_ = spread_ + T(1.01 * 2 * coarse);
}

template <class T>
void Codebook<T>::label(const T* x, int64_t n, int64_t* labels, T* scratch, int64_t ahead) const {
  constexpr int kPassesWithout = 64;
  // Whole cache lines, for loads that do not straddle two of them.
  T* const tiles = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  for (; n > 0; n -= points_, x += points_ * dim_, labels += points_) {
    if (!pairs_.empty()) {
      const int without = without_pairs_.load(std::memory_order_relaxed);
      if (without == 0 && label_together<true>(x, n, labels, tiles, ahead)) continue;
      without_pairs_.store(without == 0 ? kPassesWithout : without - 1, std::memory_order_relaxed);
    }
    label_together<false>(x, n, labels, tiles, ahead);
  }
}

// Labels of points_ points, or n where these are fewer. With pairs, false where too many of them were in doubt.
template <class T>
template <bool kPairs>
bool Codebook<T>::label_together(const T* x, int64_t n, int64_t* labels, T* tiles, int64_t ahead) const {
  const Kernels<T>& run = isa<T>();
  const int64_t lanes = run.lanes, row_bytes = dim_ * int64_t(sizeof(T)), num_points = std::min(n, points_);
  T squares[kPoints], lowest[kPoints], limit[kPoints], unit[kPoints];
  Index<T> count[kPoints], arg[kPoints];
  T* const scores = tiles + points_ * block_;
  T* const unrounded = scores + points_ * padded_k_;
  std::fill_n(squares, kPoints, T(0));
  std::fill_n(lowest, kPoints, std::numeric_limits<T>::infinity());
  for (int64_t first = 0, block = 0; first < dim_; first += block_, ++block) {
    const int64_t size = std::min(block_, dim_ - first), in_pairs = (size + 1) / 2;
    const bool last = first + size == dim_;
    for (int64_t i = 0; i < num_points; i += lanes) {
      const T* const from = x + i * dim_ + first;
      T part[kMostLanes];
      std::fill_n(part, lanes, kTiny<T>);
      T* const to = kPairs ? unrounded : tiles + i * size;
      run.pack(from, dim_, std::min(lanes, num_points - i), size, offset_.data() + first, to, part);
      if constexpr (kPairs) run.round_pairs(to, size, part, unit + i, reinterpret_cast<int32_t*>(tiles) + i * in_pairs);
      for (int64_t l = 0; l < lanes; ++l) squares[i + l] += part[l];
    }
    for (int64_t k = 0; k < padded_k_; k += block_k_) {
      for (int64_t i = 0; i < num_points; i += lanes) {
        // Rows of many coordinates take so long that the processor fetches them in time by itself.
        const bool fetch = k == 0 && block_ == dim_;
        const int64_t fetched = fetch ? std::clamp<int64_t>(n + ahead - points_ - i, 0, lanes) * row_bytes : 0;
        const T* const half = first == 0 ? half_.data() + k : nullptr;
        const int64_t num_k = std::min(block_k_, padded_k_ - k);
        T *const to = scores + i * padded_k_ + k * lanes, *const low = last ? lowest + i : nullptr;
        const char* const next = reinterpret_cast<const char*>(x) + (points_ + i) * row_bytes;
        if constexpr (kPairs)
          run.score_pairs(reinterpret_cast<const int32_t*>(tiles) + i * in_pairs, unit + i, in_pairs,
                          pairs_.data() + block * ((block_ + 1) / 2) * padded_k_ + k * in_pairs, units_[block], half,
                          num_k, to, low, next, fetched);
        else
          run.score(tiles + i * size, size, packed_.data() + first * padded_k_ + k * size, half, num_k, to, low, next,
                    fetched);
      }
    }
  }
  // A distance in float64 takes as long as some sixteen scores.
  int64_t allowed = kPairs ? num_points * (num_k_ + 64) / 32 : std::numeric_limits<int64_t>::max();
  const T* doubtful = nullptr;
  int64_t decided = 0;
  for (int64_t i = 0; i < num_points; i += lanes) {
    const T* const tile = scores + i * padded_k_;
    run.select(tile, num_k_, squares + i, lowest + i, least_, kPairs ? pairs_spread_ : spread_, limit + i, count + i,
               arg + i);
    for (int64_t j = i; j < std::min(i + lanes, num_points); ++j) {
      if (count[j] != 1) {
        // Silence, or a sensor that is off, leaves many equal points in doubt.
        const T* const point = x + j * dim_;
        if (!doubtful || std::memcmp(point, doubtful, row_bytes) != 0) {
          if ((allowed -= count[j] ? count[j] : num_k_) < 0) return false;
          decided = recheck(point, tile + (j - i), limit[j]);
          doubtful = point;
        }
        labels[j] = decided;
      } else {
        labels[j] = arg[j];
      }
    }
  }
  return true;
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
