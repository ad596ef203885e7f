// Vector registers of one instruction set (every_isa.h): their types, and how they reach memory of any alignment.
namespace HUBERT_ECG_ISA {

template <class T>
struct Simd {
  typedef T V __attribute__((vector_size(HUBERT_ECG_BYTES)));
  typedef Index<T> I __attribute__((vector_size(HUBERT_ECG_BYTES)));
  static constexpr int width = HUBERT_ECG_BYTES / sizeof(T);
};
template <class T>
using V = typename Simd<T>::V;
template <class T>
using I = typename Simd<T>::I;

template <class To, class From>
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) To load(const From* from) {
  To v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class To, class From>
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) void store(To* to, From v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

}  // namespace HUBERT_ECG_ISA
