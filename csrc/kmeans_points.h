// Nearest centroids for a few points at a time, to be called from inside a loop over many: no allocation, no threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

namespace hubert_ecg {

// Centroids made ready for that: packed for the vector registers, with the rounding error of a score.
//
// A label is argmin_k |x - c_k|^2 in float64 arithmetic, the lowest k on a tie. Found by scores |c_k|^2 / 2 - x.c_k in
// T; the centroids whose scores lie within their rounding error of the lowest one are compared again in float64. A
// distance that is NaN never wins; where none wins, the label is 0.
//
// Where the processor multiplies int16 twice as fast as float, and bytes four times as fast, x and c_k are rounded to
// 16 bits first, or to 8 where there are many coordinates. That leaves more centroids to be compared again; where it
// leaves too many, scores are of the next longer number, and of T in the end.
template <class T>
class Codebook {
 public:
  // centroids [num_k, dim] are read by label() too: they must outlive this. num_k > 0, dim > 0.
  Codebook(const T* centroids, int64_t num_k, int64_t dim);

  // Points that label() takes at most.
  static constexpr int64_t kPoints = 128;

  // Elements of memory that label() works in; any alignment.
  int64_t scratch_size() const { return scratch_size_ + 64; }

  // x [n, dim] with n <= kPoints; labels [n] (written); scratch [scratch_size()], of one caller at a time. So many
  // points lie `ahead`, after x, and come next: they are fetched into the cache meanwhile.
  void label(const T* x, int64_t n, int64_t* labels, T* scratch, int64_t ahead = 0) const;

 private:
  static constexpr int64_t kMostLanes = 128 / sizeof(T);

  // What labels are found by, made by the thread that first asks for it.
  template <class Form>
  class Late {
   public:
    template <class Make>
    const Form& get(Make make) const {
      if (!made_.load(std::memory_order_acquire)) {
        const std::lock_guard lock(mutex_);
        if (!made_.load(std::memory_order_relaxed)) make(form_), made_.store(true, std::memory_order_release);
      }
      return form_;
    }

   private:
    mutable std::mutex mutex_;
    mutable std::atomic<bool> made_{false};
    mutable Form form_;
  };

  struct Floats {
    std::vector<T> centroids;  // [dim / block][K / rows][block][rows]
  };

  struct Pairs {
    std::vector<int32_t> centroids;  // [dim / block][K / rows][block / 2][rows], two coordinates in each
    std::vector<T> units;            // of each block
    T spread;
  };

  struct Bytes {
    std::vector<int32_t> centroids;       // [dim / fours / 4][K / rows][fours][rows], four coordinates in each
    std::vector<int32_t> start;           // what 128 in each coordinate of a point adds
    std::vector<T> unit, length, missed;  // of each centroid: rounding takes `missed` away
    std::vector<int16_t> shorts;          // [K][shorts_size()] in one unit, for those that bytes leave in doubt
    T shorts_unit, shorts_missed;
  };

  const Floats& floats() const;
  const Pairs& pairs() const;
  const Bytes& bytes() const;
  template <class Run>
  void for_tiles(Run run) const;
  template <bool kPairs>
  bool label_together(const T* x, int64_t n, int64_t* labels, T* tiles, int64_t ahead) const;
  bool label_by_bytes(const T* x, int64_t n, int64_t* labels, T* scratch) const;
  int64_t recheck(const T* point, const T* scores, T limit) const;
  int64_t in_cache(int64_t row_bytes) const;
  // Centroids that points_ points have in doubt, at most, after bytes: one takes as long as some sixteen scores.
  int64_t most_in_doubt() const { return points_ * (num_k_ / 16 + 2); }
  int64_t num_fours() const { return (dim_ + 3) / 4; }
  int64_t shorts_size() const { return (dim_ + 63) / 64 * 64; }
  bool finite(int64_t k) const;
  T centred(int64_t k, int64_t d) const { return k < num_k_ ? centroids_[k * dim_ + d] + offset_[d] : T(0); }

  const T* centroids_;
  int64_t num_k_, dim_;
  int64_t padded_k_;  // num_k, rounded up to whole register tiles
  int64_t points_;    // points that share a pass over the centroids
  int64_t block_;     // dimensions that points and centroids are in the cache with
  int64_t fours_;     // the same of bytes, in fours
  int64_t scratch_size_;
  bool has_pairs_, has_bytes_;  // where they pay
  // Points and centroids move by offset_, to the centroids' mean.
  std::vector<T> offset_, half_;
  std::vector<double> lengths_;
  double longest_ = 0;
  // Scores of a point x in doubt lie within least_ + spread_ |x| of the lowest one.
  T least_, spread_;
  Late<Floats> floats_;
  Late<Pairs> pairs_;
  Late<Bytes> bytes_;
  // Passes over the centroids that go without, after one that left too many centroids in doubt.
  mutable std::atomic<int> without_bytes_{0}, without_pairs_{0};
};

extern template class Codebook<float>;
extern template class Codebook<double>;

}  // namespace hubert_ecg
