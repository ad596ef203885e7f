#include "kmeans_points.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>

#include "isa.h"

namespace hubert_ecg {
namespace {

// Added to squared lengths, and to what scores may miss: more than products that vanish in T can add up to.
template <class T>
constexpr T kTiny = std::numeric_limits<T>::min() * T(int64_t{1} << 31);

// Length of a block of coordinates in units of its 16 bits: products of two such add up to less than 2^31.
constexpr double kLength = 32700;

// Coordinates from which on bytes pay, and up to which float holds sums of products of them.
constexpr int64_t kLeastOfBytes = 192, kMostOfBytes = 1024;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Of numbers below 2^51: as std::nearbyint, which is a call on processors of any age.
double nearest_whole(double x) {
  constexpr double kRound = 3.0 * (int64_t{1} << 51);
  return x + kRound - kRound;
}

// Rows that were rounded: their units, upper bounds of their lengths, and of what rounding took away.
template <class T>
struct Rounded {
  const T *unit, *length, *missed;
};

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
  void (*round_pairs)(const T* x, int64_t dim, const T* squares, T* unit, int32_t* pairs) = nullptr;
  void (*score_pairs)(const int32_t* x, const T* unit, int64_t dim, const int32_t* c, T c_unit, const T* half,
                      int64_t num_k, T* scores, T* lowest, const char* next, int64_t ahead) = nullptr;
  void (*round_bytes)(const T* points, int64_t stride, int64_t count, int64_t dim, const T* offset, int32_t* bytes,
                      int16_t* shorts, T* unit, T* squares, T* missed) = nullptr;
  void (*score_bytes)(const int32_t* x, const Rounded<T>& points, int64_t dim, const int32_t* c,
                      const Rounded<T>& centroids, const int32_t* start, const T* half, int64_t num_k, T* scores,
                      T* lowest) = nullptr;
  int64_t (*list)(const T* scores, const T* limit, int32_t first, int32_t* found) = nullptr;
  void (*rescore)(const int32_t* found, int64_t count, const int16_t* x, const T* unit, int64_t dim, const int16_t* c,
                  const T* half, T* scores, T* lowest) = nullptr;
};

#define HUBERT_ECG_SIMD_FILE "kmeans_points_simd.h"
#include "every_isa.h"

template <class T>
const Kernels<T>& isa() {
  static const Kernels<T>& chosen = HUBERT_ECG_BEST(kernels<T>);
  return chosen;
}

}  // namespace

template <class T>
Codebook<T>::Codebook(const T* centroids, int64_t num_k, int64_t dim)
    : centroids_(centroids), num_k_(num_k), dim_(dim), offset_(dim) {
  const int64_t rows = isa<T>().rows, lanes = isa<T>().lanes, element = sizeof(T);
  padded_k_ = round_up(num_k, rows);
  // 16 KiB of points stay in the first-level cache.
  const int64_t num_blocks = (dim * lanes * element - 1) / (16 << 10) + 1;
  block_ = (dim - 1) / num_blocks + 1;
  fours_ = (num_fours() - 1) / ((num_fours() * lanes * 4 - 1) / (16 << 10) + 1) + 1;
  points_ = std::clamp<int64_t>((1 << 17) / padded_k_ / lanes * lanes, lanes, kPoints);

  // Distances do not change when everything moves by the centroids' mean, and scores then lose the least to
  // cancellation.
  std::vector<double> sums(dim);
  for (int64_t k = 0; k < num_k; ++k)
    for (int64_t d = 0; d < dim; ++d) sums[d] += double(centroids[k * dim + d]);
  for (int64_t d = 0; d < dim; ++d) {
    const T mean = T(sums[d] / double(num_k));
    offset_[d] = std::isfinite(mean) ? -mean : T(0);
  }
  half_.assign(padded_k_, std::numeric_limits<T>::infinity());
  lengths_.resize(num_k);
  for_tiles([&](int64_t tile) {
    for (int64_t k = tile; k < std::min(num_k, tile + rows); ++k) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += double(centred(k, d)) * double(centred(k, d));
      half_[k] = T(sum / 2);
      lengths_[k] = std::sqrt(sum);
    }
  });
  for (const double length : lengths_) longest_ = std::max(longest_, length);
  // Rounding error of a score by Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: each step of the
  // longest chain of additions and the roundings of x, c and |c|^2 / 2 cost at most u (|x| |c| + |c|^2 / 2). Two scores
  // may each be off.
  spread_ = T(1.01 * 2 * (std::numeric_limits<T>::epsilon() / 2) * double(block_ + num_blocks + 8) * longest_);
  least_ = spread_ * T(longest_ / 2) + kTiny<T>;
  // Half of it all may overflow on the way.
  if (!(longest_ * longest_ < std::numeric_limits<T>::max() / 16)) spread_ = std::numeric_limits<T>::quiet_NaN();
  has_pairs_ = isa<T>().score_pairs && std::isfinite(spread_);
  has_bytes_ = isa<T>().score_bytes && std::isfinite(spread_) && dim >= kLeastOfBytes && dim <= kMostOfBytes;
  scratch_size_ = points_ * (block_ + padded_k_) + lanes * block_;
  if (has_bytes_)
    scratch_size_ = std::max(scratch_size_, points_ * (round_up(num_fours(), 16) + shorts_size() / 2 + padded_k_) +
                                                2 * (most_in_doubt() + 2 * lanes));
  // While there are threads to share the work.
  has_bytes_ ? void(bytes()) : has_pairs_ ? void(pairs()) : void(floats());
}

// Centroids of which so many bytes stay in the second-level cache.
template <class T>
int64_t Codebook<T>::in_cache(int64_t row_bytes) const {
  return round_up((128 << 10) / row_bytes, isa<T>().rows);
}

template <class T>
bool Codebook<T>::finite(int64_t k) const {
  return k < num_k_ && std::isfinite(half_[k]);
}

// Calls run(k) for the first centroid k of each register tile.
template <class T>
template <class Run>
void Codebook<T>::for_tiles(Run run) const {
  const int64_t rows = isa<T>().rows, num_tiles = padded_k_ / rows;
  const int num_threads = int(std::clamp<int64_t>(padded_k_ * dim_ >> 15, 1, omp_get_max_threads()));
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t tile = 0; tile < num_tiles; ++tile) run(tile * rows);
}

template <class T>
auto Codebook<T>::floats() const -> const Floats& {
  return floats_.get([&](Floats& made) {
    const int64_t rows = isa<T>().rows;
    made.centroids.resize(padded_k_ * dim_);
    for_tiles([&](int64_t tile) {
      for (int64_t first = 0; first < dim_; first += block_) {
        const int64_t size = std::min(block_, dim_ - first);
        T* const to = made.centroids.data() + first * padded_k_ + tile * size;
        for (int64_t d = 0; d < size; ++d)
          for (int64_t r = 0; r < rows; ++r) to[d * rows + r] = centred(tile + r, first + d);
      }
    });
  });
}

// Each block of coordinates in units of its own, by which no centroid is longer than kLength.
template <class T>
auto Codebook<T>::pairs() const -> const Pairs& {
  return pairs_.get([&](Pairs& made) {
    const int64_t rows = isa<T>().rows;
    std::vector<double> errors(padded_k_), longest(padded_k_);
    double longest_of_all = 0;
    for (int64_t first = 0; first < dim_; first += block_) {
      const int64_t size = std::min(block_, dim_ - first), in_pairs = (size + 1) / 2;
      for_tiles([&](int64_t tile) {
        for (int64_t k = tile; k < tile + rows; ++k) {
          longest[k] = 0;
          for (int64_t d = first; d < first + size && finite(k); ++d)
            longest[k] += double(centred(k, d)) * double(centred(k, d));
        }
      });
      const double most = *std::max_element(longest.begin(), longest.end());
      longest_of_all += most;
      // Where the unit would vanish, all is zero.
      made.units.push_back(std::max(T(std::sqrt(most) / kLength), std::numeric_limits<T>::min()));
      const double unit = double(made.units.back());
      const auto rounded = [&](int64_t k, int64_t d) -> int32_t {
        if (d >= first + size || !finite(k)) return 0;
        const double value = double(centred(k, d)), whole = nearest_whole(value / unit);
        errors[k] += (value - whole * unit) * (value - whole * unit);
        return int32_t(whole);
      };
      const int64_t done = int64_t(made.centroids.size());
      made.centroids.resize(done + padded_k_ * in_pairs);
      for_tiles([&](int64_t tile) {
        int32_t* to = made.centroids.data() + done + tile * in_pairs;
        for (int64_t d = first; d < first + size; d += 2)
          for (int64_t k = tile; k < tile + rows; ++k) {
            const uint32_t low = uint32_t(rounded(k, d)) & 0xffffu, high = uint32_t(rounded(k, d + 1)) << 16;
            *to++ = int32_t(high | low);
          }
      });
    }
    // |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'|, where a coordinate of x' is off by half a unit, |x| / kLength.
    const double error = std::sqrt(*std::max_element(errors.begin(), errors.end()));
    const double coarse = 0.51 * std::sqrt(double(block_)) / kLength * std::sqrt(longest_of_all) + error;
    made.spread = spread_ + T(1.01 * 2 * coarse);
  });
}

// Each centroid in units of its own, by which no coordinate is larger than 127.
template <class T>
auto Codebook<T>::bytes() const -> const Bytes& {
  return bytes_.get([&](Bytes& made) {
    const int64_t rows = isa<T>().rows;
    made.centroids.resize(padded_k_ * num_fours()), made.start.resize(padded_k_);
    made.unit.resize(padded_k_), made.length.resize(padded_k_), made.missed.resize(padded_k_);
    made.shorts.resize(num_k_ * shorts_size());
    made.shorts_unit = T(longest_ / kLength) + std::numeric_limits<T>::min();
    std::vector<T> shorts_missed(padded_k_);
    for_tiles([&](int64_t tile) {
      std::vector<int8_t> bytes(rows * num_fours() * 4);
      for (int64_t k = tile; k < tile + rows; ++k) {
        if (!finite(k)) continue;
        const auto round = [&](double unit, auto* to) {
          double missed = 0;
          for (int64_t d = 0; d < dim_; ++d) {
            const double value = double(centred(k, d)), whole = nearest_whole(value / unit);
            missed += (value - whole * unit) * (value - whole * unit);
            to[d] = std::decay_t<decltype(*to)>(whole);
          }
          return T(1.01 * std::sqrt(missed));
        };
        T largest = 0;
        for (int64_t d = 0; d < dim_; ++d) largest = std::max(largest, std::abs(centred(k, d)));
        int8_t* const to = bytes.data() + (k - tile) * num_fours() * 4;
        made.unit[k] = std::max(largest / 127, std::numeric_limits<T>::min());
        made.length[k] = T(1.01 * lengths_[k]);
        made.missed[k] = round(double(made.unit[k]), to);
        made.start[k] = 128 * std::accumulate(to, to + dim_, 0);
        shorts_missed[k] = round(double(made.shorts_unit), made.shorts.data() + k * shorts_size());
      }
      for (int64_t first = 0; first < num_fours(); first += fours_) {
        const int64_t size = std::min(fours_, num_fours() - first);
        int32_t* const to = made.centroids.data() + first * padded_k_ + tile * size;
        for (int64_t f = 0; f < size; ++f)
          for (int64_t r = 0; r < rows; ++r)
            std::memcpy(to + f * rows + r, &bytes[(r * num_fours() + first + f) * 4], 4);
      }
    });
    made.shorts_missed = *std::max_element(shorts_missed.begin(), shorts_missed.end());
  });
}

template <class T>
void Codebook<T>::label(const T* x, int64_t n, int64_t* labels, T* scratch, int64_t ahead) const {
  constexpr int kPassesWithout = 64;
  // Whole cache lines, for loads that do not straddle two of them.
  T* const tiles = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  const auto tried = [](std::atomic<int>& without, auto run) {
    const int passes = without.load(std::memory_order_relaxed);
    if (passes == 0 && run()) return true;
    without.store(passes == 0 ? kPassesWithout : passes - 1, std::memory_order_relaxed);
    return false;
  };
  for (; n > 0; n -= points_, x += points_ * dim_, labels += points_) {
    if (has_bytes_ && tried(without_bytes_, [&] { return label_by_bytes(x, n, labels, tiles); })) continue;
    if (has_pairs_ && tried(without_pairs_, [&] { return label_together<true>(x, n, labels, tiles, ahead); })) continue;
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
    const int64_t block_k = in_cache(size * int64_t(sizeof(T)));
    for (int64_t k = 0; k < padded_k_; k += block_k) {
      for (int64_t i = 0; i < num_points; i += lanes) {
        // Rows of many coordinates take so long that the processor fetches them in time by itself.
        const bool fetch = k == 0 && block_ == dim_;
        const int64_t fetched = fetch ? std::clamp<int64_t>(n + ahead - points_ - i, 0, lanes) * row_bytes : 0;
        const T* const half = first == 0 ? half_.data() + k : nullptr;
        const int64_t num_k = std::min(block_k, padded_k_ - k);
        T *const to = scores + i * padded_k_ + k * lanes, *const low = last ? lowest + i : nullptr;
        const char* const next = reinterpret_cast<const char*>(x) + (points_ + i) * row_bytes;
        if constexpr (kPairs)
          run.score_pairs(reinterpret_cast<const int32_t*>(tiles) + i * in_pairs, unit + i, in_pairs,
                          pairs().centroids.data() + block * ((block_ + 1) / 2) * padded_k_ + k * in_pairs,
                          pairs().units[block], half, num_k, to, low, next, fetched);
        else
          run.score(tiles + i * size, size, floats().centroids.data() + first * padded_k_ + k * size, half, num_k, to,
                    low, next, fetched);
      }
    }
  }
  // A distance in float64 takes as long as some sixteen scores.
  int64_t allowed = kPairs ? num_points * (num_k_ + 64) / 32 : std::numeric_limits<int64_t>::max();
  const T* doubtful = nullptr;
  int64_t decided = 0;
  const T spread = kPairs ? pairs().spread : spread_;
  for (int64_t i = 0; i < num_points; i += lanes) {
    const T* const tile = scores + i * padded_k_;
    run.select(tile, num_k_, squares + i, lowest + i, least_, spread, limit + i, count + i, arg + i);
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

// As label_together(), with bytes. Many points have some centroids in doubt: these get scores of int16, and distances
// in float64 where that leaves more than one.
template <class T>
bool Codebook<T>::label_by_bytes(const T* x, int64_t n, int64_t* labels, T* scratch) const {
  const Kernels<T>& run = isa<T>();
  const Bytes& c = this->bytes();
  const int64_t lanes = run.lanes, num_points = std::min(n, points_);
  const int64_t tile = round_up(num_fours(), 16), most = most_in_doubt();
  int32_t* const bytes = reinterpret_cast<int32_t*>(scratch);
  int16_t* const shorts = reinterpret_cast<int16_t*>(bytes + points_ * tile);
  T* const scores = scratch + points_ * (tile + shorts_size() / 2);
  int32_t* const found = reinterpret_cast<int32_t*>(scores + points_ * padded_k_);
  T* const again = scores + points_ * padded_k_ + most + 2 * lanes;
  T squares[kPoints], unit[kPoints], length[kPoints], missed[kPoints], limit[kPoints], fine_unit[kPoints],
      fine[kPoints];
  std::fill_n(squares, kPoints, kTiny<T>);
  for (int64_t i = 0; i < num_points; i += lanes)
    run.round_bytes(x + i * dim_, dim_, std::min(lanes, num_points - i), dim_, offset_.data(), bytes + i * tile,
                    shorts + i * shorts_size(), unit + i, squares + i, missed + i);
  for (int64_t i = 0; i < round_up(num_points, lanes); ++i) {
    const T norm = std::sqrt(squares[i]), fine_missed = T(0.51 / kLength) * norm * std::sqrt(T(dim_));
    missed[i] = T(1.01) * std::sqrt(missed[i]);
    length[i] = T(1.01) * norm + missed[i];
    // Points that do not exist or are so long that a score may overflow have no score below this.
    const bool in = i < num_points && squares[i] < std::numeric_limits<T>::max() / 16;
    limit[i] = in ? std::numeric_limits<T>::infinity() : std::numeric_limits<T>::quiet_NaN();
    fine_unit[i] = norm * T(1 / kLength) * c.shorts_unit;
    // Two scores may each be off.
    fine[i] = T(2.02) * (fine_missed * T(longest_) + norm * T(1.01) * c.shorts_missed) + (least_ + spread_ * norm);
  }
  for (int64_t first = 0; first < num_fours(); first += fours_) {
    const int64_t size = std::min(fours_, num_fours() - first), block_k = in_cache(size * 4);
    const bool last = first + size == num_fours();
    for (int64_t k = 0; k < padded_k_; k += block_k)
      for (int64_t i = 0; i < num_points; i += lanes)
        run.score_bytes(bytes + i * tile + first * lanes, {unit + i, length + i, missed + i}, size,
                        c.centroids.data() + first * padded_k_ + k * size,
                        {c.unit.data() + k, c.length.data() + k, c.missed.data() + k},
                        first == 0 ? c.start.data() + k : nullptr, last ? half_.data() + k : nullptr,
                        std::min(block_k, padded_k_ - k), scores + i * padded_k_ + k * lanes, limit + i);
  }
  for (int64_t i = 0; i < num_points; ++i) limit[i] += least_ + spread_ * std::sqrt(squares[i]);
  int64_t count = 0;
  for (int64_t k = 0; k < num_k_; ++k)
    for (int64_t i = 0; i < num_points; i += lanes) {
      count += run.list(scores + i * padded_k_ + k * lanes, limit + i, int32_t(k * kPoints + i), found + count);
      if (count > most) return false;
    }

  T lowest[kPoints];
  int32_t rivals[kPoints] = {};
  std::fill_n(lowest, kPoints, std::numeric_limits<T>::infinity());
  run.rescore(found, count, shorts, fine_unit, shorts_size(), c.shorts.data(), half_.data(), again, lowest);
  const auto doubtful = [&](int64_t j, int64_t i) { return again[j] <= lowest[i] + fine[i]; };
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = found[j] % kPoints;
    if (doubtful(j, i)) labels[i] = found[j] / kPoints, ++rivals[i];
  }
  double best[kPoints];
  std::fill_n(best, kPoints, double(INFINITY));
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = found[j] % kPoints, k = found[j] / kPoints;
    if (rivals[i] < 2 || !doubtful(j, i)) continue;
    const double distance = run.distance(x + i * dim_, centroids_ + k * dim_, dim_);
    if (distance < best[i]) best[i] = distance, labels[i] = k;
  }
  for (int64_t i = 0; i < num_points; ++i) {
    if (rivals[i] > 0) continue;
    if ((count += num_k_) > most) return false;
    labels[i] = recheck(x + i * dim_, nullptr, std::numeric_limits<T>::quiet_NaN());
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
