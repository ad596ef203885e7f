// Nearest centroids for a few points at a time, to be called from inside a loop over many: no allocation, no threads.
#pragma once
#include <cstdint>
#include <vector>

namespace hubert_ecg {

// Centroids made ready for that: packed for the vector registers, with the rounding error of a score.
//
// A label is argmin_k |x - c_k|^2 in float64 arithmetic, the lowest k on a tie. Found by scores |c_k|^2 / 2 - x.c_k in
// T; the centroids whose scores lie within their rounding error of the lowest one are compared again in float64. A
// distance that is NaN never wins; where none wins, the label is 0.
template <class T>
class Codebook {
 public:
  // centroids [num_k, dim] are read by label() too: they must outlive this. num_k > 0, dim > 0.
  Codebook(const T* centroids, int64_t num_k, int64_t dim);

  // Points that label() takes at most.
  static constexpr int64_t kPoints = 128;

  // Elements of memory that label() works in; any alignment.
  int64_t scratch_size() const { return points_ * (block_ + padded_k_) + 64; }

  // x [n, dim] with n <= kPoints; labels [n] (written); scratch [scratch_size()], of one caller at a time. So many
  // points lie `ahead`, after x, and come next: they are fetched into the cache meanwhile.
  void label(const T* x, int64_t n, int64_t* labels, T* scratch, int64_t ahead = 0) const;

 private:
  int64_t recheck(const T* point, const T* scores, T limit) const;

  const T* centroids_;
  int64_t num_k_, dim_;
  int64_t padded_k_;  // num_k, rounded up to whole register tiles
  int64_t points_;    // points that share a pass over the centroids
  int64_t block_;     // dimensions that points and centroids are in the cache with
  int64_t block_k_;   // centroids in the second-level cache
  std::vector<T> offset_, packed_, half_;
  T slack_, half_longest_;
};

extern template class Codebook<float>;
extern template class Codebook<double>;

}  // namespace hubert_ecg
