// The inner loops of linear.cpp for one instruction set (every_isa.h).
#include "halves_simd.h"
#include "vectors_simd.h"

namespace HUBERT_ECG_ISA {

// Columns of a register tile; 2 * kRows + 3 vector registers are in use.
constexpr int kColumns = 2 * Simd<float>::width;

// The factor that makes a row with this sum of squares kLength long, and its inverse, the unit.
HUBERT_ECG_TARGET static inline float factor_of(double squares, float& unit) {
  const double length = std::sqrt(squares);
  // A row so short vanishes; one that is not finite shall be seen.
  const bool sound = length > 1e-33 && squares <= std::numeric_limits<double>::max();
  unit = sound ? float(length / kLength) : squares * 0 == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  return sound ? float(kLength / length) : 0.0f;
}

// The integer next to x in the low bits.
HUBERT_ECG_TARGET static inline int32_t nearest(float x) { return int32_t(float_as_bits(x + float(3 << 22))); }

// Rounds P rows of `depth` numbers, of which `rows` are there, each in a unit of its own, in pairs.
//   from [rows], of `depth` numbers each; transposed: [depth], of `rows`
//   units [P], pairs [depth / 2, rounded up][P] (written)
template <class T, int P, bool kTransposed>
HUBERT_ECG_TARGET static void pack(const void* const* from, int64_t rows, int64_t depth, float* units, int32_t* pairs) {
  const auto row = [from](int64_t i) { return static_cast<const T*>(from[i]); };
  if (kTransposed && rows == P) {
    double squares[P] = {};
    float factors[P];
    for (int64_t k = 0; k < depth; ++k)
#pragma omp simd
      for (int p = 0; p < P; ++p) squares[p] += double(widen(row(k)[p])) * widen(row(k)[p]);
    for (int p = 0; p < P; ++p) factors[p] = factor_of(squares[p], units[p]);
    for (int64_t k = 0; k + 1 < depth; k += 2, pairs += P) {
      const T *const low = row(k), *const high = row(k + 1);
#pragma omp simd
      for (int p = 0; p < P; ++p)
        pairs[p] = (nearest(widen(low[p]) * factors[p]) & 0xffff) | nearest(widen(high[p]) * factors[p]) << 16;
    }
    if (depth % 2)
      for (int p = 0; p < P; ++p) pairs[p] = nearest(widen(row(depth - 1)[p]) * factors[p]) & 0xffff;
    return;
  }
  float wide[kDepth];
  alignas(64) int16_t rounded[P][kDepth];
  for (int p = 0; p < P; ++p) {
    // Behind the last row comes nothing.
    const int64_t index = std::min<int64_t>(p, rows - 1);
    if (kTransposed) {
      for (int64_t k = 0; k < depth; ++k) wide[k] = widen(row(k)[index]);
    } else {
      const T* const own = row(index);
#pragma omp simd
      for (int64_t k = 0; k < depth; ++k) wide[k] = widen(own[k]);
    }
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < depth; ++k) squares += double(wide[k]) * wide[k];
    const float factor = factor_of(p < rows ? squares : 0.0, units[p]);
#pragma omp simd
    for (int64_t k = 0; k < depth; ++k) rounded[p][k] = int16_t(nearest(wide[k] * factor));
    if (depth % 2) rounded[p][depth] = 0;
  }
  int64_t k = 0;
#if __has_builtin(__builtin_shufflevector)
  typedef int32_t Four __attribute__((vector_size(16)));
  for (; k + 8 <= depth; k += 8) {
    int32_t* const to = pairs + k / 2 * P;
#pragma GCC unroll 16
    for (int p = 0; p + 4 <= P; p += 4) {
      const Four a = load<Four>(rounded[p] + k), b = load<Four>(rounded[p + 1] + k);
      const Four c = load<Four>(rounded[p + 2] + k), d = load<Four>(rounded[p + 3] + k);
      const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Four ef = __builtin_shufflevector(a, b, 2, 6, 3, 7), gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      store(to + p, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
      store(to + P + p, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
      store(to + 2 * P + p, __builtin_shufflevector(ef, gh, 0, 1, 4, 5));
      store(to + 3 * P + p, __builtin_shufflevector(ef, gh, 2, 3, 6, 7));
    }
    if constexpr (P % 4 == 2) {
      const Four a = load<Four>(rounded[P - 2] + k), b = load<Four>(rounded[P - 1] + k);
      store(to + P - 2, __builtin_shufflevector(a, b, 0, 4));
      store(to + 2 * P - 2, __builtin_shufflevector(a, b, 1, 5));
      store(to + 3 * P - 2, __builtin_shufflevector(a, b, 2, 6));
      store(to + 4 * P - 2, __builtin_shufflevector(a, b, 3, 7));
    }
  }
#endif
  for (; k < depth; k += 2)
    for (int p = 0; p < P; ++p) std::memcpy(pairs + k / 2 * P + p, rounded[p] + k, sizeof *pairs);
}

// c[r][j] (+)= a_units[r] b_units[j] sum_k a[k][r] b[k][j], of pairs, for kRows and kColumns.
HUBERT_ECG_TARGET static void multiply(const int32_t* a, const float* a_units, const int32_t* b, const float* b_units,
                                       int64_t depth, bool first, float* c, int64_t stride) {
  constexpr int W = Simd<float>::width;
  I<float> sum0[kRows] = {}, sum1[kRows] = {};
  for (int64_t k = 0; k < depth; k += 2, a += kRows, b += kColumns) {
    const I<float> b0 = load<I<float>>(b), b1 = load<I<float>>(b + W);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const I<float> pair = a[r] + I<float>{};
      sum0[r] = add_pairs(sum0[r], pair, b0);
      sum1[r] = add_pairs(sum1[r], pair, b1);
    }
  }
  // A piece as long as float32 can be has no unit that may meet a whole sum first.
  const V<float> unit0 = load<V<float>>(b_units) * 0x1p15f, unit1 = load<V<float>>(b_units + W) * 0x1p15f;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r, c += stride) {
    V<float> c0 = __builtin_convertvector(sum0[r], V<float>) * 0x1p-15f * a_units[r] * unit0;
    V<float> c1 = __builtin_convertvector(sum1[r], V<float>) * 0x1p-15f * a_units[r] * unit1;
    if (!first) c0 += load<V<float>>(c), c1 += load<V<float>>(c + W);
    store(c, c0), store(c + W, c1);
  }
}

template <class T>
HUBERT_ECG_TARGET static void finish(const float* c, const float* bias, int64_t n, void* out) {
  T* const y = static_cast<T*>(out);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(c[j] + (bias ? bias[j] : 0.0f), y[j]);
}

template <class T>
constexpr Kernels kernels = {kColumns,
                             {pack<T, kRows, false>, pack<T, kRows, true>},
                             {pack<T, kColumns, false>, pack<T, kColumns, true>},
                             multiply,
                             finish<T>};

}  // namespace HUBERT_ECG_ISA
