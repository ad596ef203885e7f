// Numbers of any kind to float32 and back, for one instruction set (every_isa.h).
namespace HUBERT_ECG_ISA {

inline __attribute__((always_inline)) float bits_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline __attribute__((always_inline)) uint32_t float_as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline __attribute__((always_inline)) float widen(float x) { return x; }
inline __attribute__((always_inline)) float widen(double x) { return static_cast<float>(x); }
inline __attribute__((always_inline)) float widen(int16_t x) { return static_cast<float>(x); }
inline __attribute__((always_inline)) float widen(BFloat16 x) { return bits_as_float(uint32_t{x.bits} << 16); }
inline __attribute__((always_inline)) float widen(Float16 x) {
  // The exponent, moved into that of float32, is 112 too low; the highest one means infinity or NaN. The lowest one is
  // a count of 2^-24, put into the mantissa of 2^-14: as float32 it would be denormal, which threads may flush to zero.
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13, sign = uint32_t{x.bits & 0x8000u} << 16;
  const float value = magnitude < 0x00800000u ? bits_as_float(magnitude + (113u << 23)) - 0x1p-14f
                                              : bits_as_float(magnitude) * 0x1p112f;
  return bits_as_float(float_as_bits(value) | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | sign);
}

// To the type that a sum is kept in.
inline __attribute__((always_inline)) double widen_to(double x, double) { return x; }
template <class T>
inline __attribute__((always_inline)) float widen_to(T x, float) {
  return widen(x);
}

// To the nearest, ties to even; NaN stays NaN.
inline __attribute__((always_inline)) void narrow(float x, float& to) { to = x; }
inline __attribute__((always_inline)) void narrow(double x, double& to) { to = x; }
inline __attribute__((always_inline)) void narrow(float x, BFloat16& to) {
  const uint32_t bits = float_as_bits(x);
  to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline __attribute__((always_inline)) void narrow(float x, Float16& to) {
  const uint32_t bits = float_as_bits(x), magnitude = bits & 0x7fffffffu;
  // Below 2^-14, adding 0.5 leaves a count of 2^-24 in the mantissa.
  const uint32_t tiny = float_as_bits(bits_as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t usual = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t value = magnitude >= 0x47800000u ? huge : magnitude < 0x38800000u ? tiny : usual;
  to.bits = uint16_t(value | (bits >> 16 & 0x8000u));
}

}  // namespace HUBERT_ECG_ISA
