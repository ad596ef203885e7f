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

// As many numbers as a register of double holds, in double.
template <class T>
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) V<double> load_double(const T* from) {
#if HUBERT_ECG_BYTES == 64
  // GCC converts the halves one after the other.
  if constexpr (sizeof(T) == 4) return (V<double>)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#endif
  typedef T X __attribute__((vector_size(Simd<double>::width * sizeof(T))));
  return __builtin_convertvector(load<X>(from), V<double>);
}

#ifdef __x86_64__
// Adds, in each 32 bits, the product of the lower halves and that of the upper ones, as int16, to the sum.
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) I<float> add_pairs(I<float> sum, I<float> a,
                                                                                  I<float> b) {
#if HUBERT_ECG_BYTES == 64
  return (I<float>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif HUBERT_ECG_BYTES == 32
  return sum + (I<float>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return sum + (I<float>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
#endif

}  // namespace HUBERT_ECG_ISA
