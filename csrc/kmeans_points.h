// Nearest centroids for a few points at a time, to be called from inside a loop over many: no allocation, no threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace hubert_ecg {

// Centroids made ready for that: packed for the vector registers, with the rounding error of a score.
//
// A label is argmin_k |x - c_k|^2 in float64 arithmetic, the lowest k on a tie. Found by scores |c_k|^2 / 2 - x.c_k in
// T; the centroids whose scores lie within their rounding error of the lowest one are compared again in float64. A
// distance that is NaN never wins; where none wins, the label is 0.
//
// Where the processor multiplies int16 twice as fast as float, x and c_k are rounded to 16 bits first. That leaves a
// few points more to be compared again; where it leaves too many, scores are of T.
template <class T>
class Codebook {
 public:
  // centroids [num_k, dim] are read by label() too: they must outlive this. num_k > 0, dim > 0.
  Codebook(const T* centroids, int64_t num_k, int64_t dim);

  // Points that label() takes at most.
  static constexpr int64_t kPoints = 128;

  // Elements of memory that label() works in; any alignment.
  int64_t scratch_size() const { return points_ * (block_ + padded_k_) + kMostLanes * block_ + 64; }

  // x [n, dim] with n <= kPoints; labels [n] (written); scratch [scratch_size()], of one caller at a time. So many
  // points lie `ahead`, after x, and come next: they are fetched into the cache meanwhile.
  void label(const T* x, int64_t n, int64_t* labels, T* scratch, int64_t ahead = 0) const;

 private:
  static constexpr int64_t kMostLanes = 128 / sizeof(T);

  void pack_pairs(const std::vector<T>& centred);
  template <bool kPairs>
  bool label_together(const T* x, int64_t n, int64_t* labels, T* tiles, int64_t ahead) const;
  int64_t recheck(const T* point, const T* scores, T limit) const;

  const T* centroids_;
  int64_t num_k_, dim_;
  int64_t padded_k_;  // num_k, rounded up to whole register tiles
  int64_t points_;    // points that share a pass over the centroids
  int64_t block_;     // dimensions that points and centroids are in the cache with
  int64_t block_k_;   // centroids in the second-level cache
  std::vector<T> offset_, packed_, half_;
  // Scores of a point x in doubt lie within least_ + spread_ |x| of the lowest one.
  T least_, spread_;
  // The same of 16 bits: pairs of coordinates, empty where they do not pay, and the unit of each block of them.
  std::vector<int32_t> pairs_;
  std::vector<T> units_;
  T pairs_spread_ = 0;
  // Passes over the centroids that go without, after one that left too many points in doubt.
  mutable std::atomic<int> without_pairs_{0};
};

extern template class Codebook<float>;
extern template class Codebook<double>;

}  // namespace hubert_ecg
