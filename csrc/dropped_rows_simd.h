// Dropout along a row for one instruction set (every_isa.h).
namespace HUBERT_ECG_ISA {

// Of the row whose first element has the flat index `base`.
template <class T>
struct Dropout {
  DropoutKeys keys;
  uint32_t threshold;
  T scale;
  uint32_t low, upper, upper_after;

  Dropout(double p, const int64_t* seed)
      : keys(p > 0 ? uint64_t(*seed) : 0),
        threshold(p > 0 ? dropout_threshold(p) : 0),
        scale(p > 0 ? static_cast<T>(dropout_scale(p)) : T(1)) {}

  inline __attribute__((always_inline)) void at(uint64_t base) {
    low = uint32_t(base);
    upper = keys.upper(uint32_t(base >> 32));
    upper_after = keys.upper(uint32_t(base >> 32) + 1);
  }
  // What element d of the row is multiplied with.
  inline __attribute__((always_inline)) T operator()(uint32_t d) const {
    const uint32_t i = low + d;
    return keys.bits(i, i < low ? upper_after : upper) >= threshold ? scale : T(0);
  }
};

}  // namespace HUBERT_ECG_ISA
