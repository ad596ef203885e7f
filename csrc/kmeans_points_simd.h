// The inner loops of kmeans_points.cpp for one instruction set; every_isa.h includes them once for each.
// Explicit vector types, because the tile has to stay in registers and the auto-vectorizer does not keep it there.
#include "vectors_simd.h"

namespace HUBERT_ECG_ISA {

// Centroids in a register tile: 2 * kRows + 3 vector registers are in use, out of 16 or 32.
#if HUBERT_ECG_BYTES == 64 || defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif

// Copies `dim` coordinates of `count` points, moved by `offset`, to x [dim][2 W] and adds their squares to
// squares [2 W]; places without a point repeat the last one.
template <class T>
HUBERT_ECG_TARGET static void pack(const T* points, int64_t stride, int64_t count, int64_t dim, const T* offset, T* x,
                                   T* squares) {
  constexpr int L = 2 * Simd<T>::width;
  const T* row[L];
  for (int l = 0; l < L; ++l) row[l] = points + std::min<int64_t>(l, count - 1) * stride;
  int64_t d = 0;
#if __has_builtin(__builtin_shufflevector)
  if constexpr (sizeof(T) == 4) {
    typedef float Q __attribute__((vector_size(16)));
    Q sums[L / 4];
    __builtin_memcpy(sums, squares, sizeof(sums));
    for (; d + 4 <= dim; d += 4) {
      const Q o = load<Q>(offset + d);
#pragma GCC unroll 8
      for (int l = 0; l < L; l += 4) {
        const Q a = load<Q>(row[l] + d) + o, b = load<Q>(row[l + 1] + d) + o;
        const Q c = load<Q>(row[l + 2] + d) + o, e = load<Q>(row[l + 3] + d) + o;
        const Q ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ce = __builtin_shufflevector(c, e, 0, 4, 1, 5);
        const Q fg = __builtin_shufflevector(a, b, 2, 6, 3, 7), hi = __builtin_shufflevector(c, e, 2, 6, 3, 7);
        const Q x0 = __builtin_shufflevector(ab, ce, 0, 1, 4, 5), x1 = __builtin_shufflevector(ab, ce, 2, 3, 6, 7);
        const Q x2 = __builtin_shufflevector(fg, hi, 0, 1, 4, 5), x3 = __builtin_shufflevector(fg, hi, 2, 3, 6, 7);
        store(x + d * L + l, x0), store(x + (d + 1) * L + l, x1);
        store(x + (d + 2) * L + l, x2), store(x + (d + 3) * L + l, x3);
        sums[l / 4] += (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3);
      }
    }
    __builtin_memcpy(squares, sums, sizeof(sums));
  }
#endif
  for (; d < dim; ++d) {
    for (int l = 0; l < L; ++l) {
      const T value = row[l][d] + offset[d];
      x[d * L + l] = value;
      squares[l] += value * value;
    }
  }
}

// Scores of 2 W points and num_k centroids over `dim` coordinates. They start at `half`, or where that is null, are
// added to those of the coordinates before. Where `lowest` is not null, these are the last coordinates. `ahead` bytes
// at `next` are fetched into the cache meanwhile.
//   x [dim][2 W]; c [num_k / kRows][dim][kRows]; half [num_k]; scores [num_k][2 W] (written); lowest [2 W] (updated)
template <class T>
HUBERT_ECG_TARGET static void score(const T* x, int64_t dim, const T* c, const T* half, int64_t num_k, T* scores,
                                    T* lowest, const char* next, int64_t ahead) {
  constexpr int W = Simd<T>::width, L = 2 * W;
  V<T> low0{}, low1{};
  if (lowest) low0 = load<V<T>>(lowest), low1 = load<V<T>>(lowest + W);
  const int64_t share = ahead / (num_k / kRows) + 1;
  for (int64_t k = 0; k < num_k; k += kRows, c += kRows * dim, scores += kRows * L) {
    for (int64_t b = k / kRows * share; b < std::min(ahead, (k / kRows + 1) * share); b += 64)
      __builtin_prefetch(next + b);
    V<T> acc0[kRows], acc1[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc0[r] = acc1[r] = V<T>{};
    for (int64_t d = 0; d < dim; ++d) {
      const V<T> x0 = load<V<T>>(x + d * L), x1 = load<V<T>>(x + d * L + W);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        acc0[r] -= c[d * kRows + r] * x0;
        acc1[r] -= c[d * kRows + r] * x1;
      }
    }
    // Each block of coordinates is summed apart: fewer roundings in a row.
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc0[r] += half ? half[k + r] + V<T>{} : load<V<T>>(scores + r * L);
      acc1[r] += half ? half[k + r] + V<T>{} : load<V<T>>(scores + r * L + W);
      store(scores + r * L, acc0[r]), store(scores + r * L + W, acc1[r]);
    }
    if (lowest) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        low0 = acc0[r] < low0 ? acc0[r] : low0;
        low1 = acc1[r] < low1 ? acc1[r] : low1;
      }
    }
  }
  if (lowest) store(lowest, low0), store(lowest + W, low1);
}

// Which scores of 2 W points lie within `least` + `spread` |x| of the lowest one: how many, and the last of them. The
// limit is NaN, and the count 0, for points so long that a score may overflow.
//   scores [num_k][2 W]; squares, lowest [2 W]; limit, count, arg [2 W] (written)
template <class T>
HUBERT_ECG_TARGET static void select(const T* scores, int64_t num_k, const T* squares, const T* lowest, T least,
                                     T spread, T* limit, Index<T>* count, Index<T>* arg) {
  constexpr int W = Simd<T>::width, L = 2 * W;
  constexpr T huge = std::numeric_limits<T>::max() / 16;
  for (int l = 0; l < L; ++l) {
    const T found = lowest[l] + (least + spread * std::sqrt(squares[l]));
    limit[l] = squares[l] < huge ? found : std::numeric_limits<T>::quiet_NaN();
  }
  const V<T> limit0 = load<V<T>>(limit), limit1 = load<V<T>>(limit + W);
  I<T> count0{}, count1{}, arg0{}, arg1{};
  for (int64_t k = 0; k < num_k; ++k, scores += L) {
    const I<T> in0 = load<V<T>>(scores) <= limit0, in1 = load<V<T>>(scores + W) <= limit1;
    count0 -= in0, count1 -= in1;
    arg0 = in0 ? Index<T>(k) + I<T>{} : arg0;
    arg1 = in1 ? Index<T>(k) + I<T>{} : arg1;
  }
  store(count, count0), store(count + W, count1);
  store(arg, arg0), store(arg + W, arg1);
}

// |a - b|^2 in float64, its terms added in an order that does not depend on the instruction set.
template <class T>
HUBERT_ECG_TARGET static double distance(const T* a, const T* b, int64_t dim) {
  constexpr int W = Simd<double>::width, kParts = 8 / W;
  V<double> sums[kParts] = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const V<double> delta = load_double(a + d + p * W) - load_double(b + d + p * W);
      sums[p] += delta * delta;
    }
  }
  double s[8];
  __builtin_memcpy(s, sums, sizeof(s));
  for (; d < dim; ++d) {
    const double delta = double(a[d]) - double(b[d]);
    s[d % 8] += delta * delta;
  }
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// add_pairs takes half as long as two products of float.
#ifdef __x86_64__

// Rounds `dim` coordinates of 2 W points to 16 bits, by units that make each point kLength long.
//   x [dim][2 W]; squares [2 W]: squared lengths; unit [2 W], pairs [dim / 2, rounded up][2 W] (written)
HUBERT_ECG_TARGET static void round_pairs(const float* x, int64_t dim, const float* squares, float* unit,
                                          int32_t* pairs) {
  constexpr int W = Simd<float>::width, L = 2 * W;
  // A number with this added has the integer next to it in its low bits.
  constexpr float kRound = 3 << 22;
  float scale[L];
  for (int l = 0; l < L; ++l) {
    unit[l] = std::sqrt(squares[l]) * float(1 / kLength);
    scale[l] = 1 / unit[l];
  }
#pragma GCC unroll 2
  for (int w = 0; w < L; w += W) {
    const V<float> by = load<V<float>>(scale + w);
    const float* row = x + w;
    int32_t* to = pairs + w;
    for (int64_t d = 0; d < dim; d += 2, row += 2 * L, to += L) {
      const V<float> low = load<V<float>>(row) * by + kRound;
      const V<float> high = d + 1 < dim ? load<V<float>>(row + L) * by + kRound : V<float>{};
      store(to, ((I<float>)low & 0xffff) | ((I<float>)high << 16));
    }
  }
}

// As score(), of coordinates in pairs.
//   x [dim][2 W] in units of unit [2 W]; c [num_k / kRows][dim][kRows] in units of c_unit
HUBERT_ECG_TARGET static void score_pairs(const int32_t* x, const float* unit, int64_t dim, const int32_t* c,
                                          float c_unit, const float* half, int64_t num_k, float* scores, float* lowest,
                                          const char* next, int64_t ahead) {
  constexpr int W = Simd<float>::width, L = 2 * W;
  const V<float> unit0 = load<V<float>>(unit) * c_unit, unit1 = load<V<float>>(unit + W) * c_unit;
  V<float> low0{}, low1{};
  if (lowest) low0 = load<V<float>>(lowest), low1 = load<V<float>>(lowest + W);
  const int64_t share = ahead / (num_k / kRows) + 1;
  for (int64_t k = 0; k < num_k; k += kRows, c += kRows * dim, scores += kRows * L) {
    for (int64_t b = k / kRows * share; b < std::min(ahead, (k / kRows + 1) * share); b += 64)
      __builtin_prefetch(next + b);
    I<float> acc0[kRows], acc1[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc0[r] = acc1[r] = I<float>{};
    for (int64_t d = 0; d < dim; ++d) {
      const I<float> x0 = load<I<float>>(x + d * L), x1 = load<I<float>>(x + d * L + W);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const I<float> pair = c[d * kRows + r] + I<float>{};
        acc0[r] = add_pairs(acc0[r], pair, x0);
        acc1[r] = add_pairs(acc1[r], pair, x1);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V<float> from0 = half ? half[k + r] + V<float>{} : load<V<float>>(scores + r * L);
      const V<float> from1 = half ? half[k + r] + V<float>{} : load<V<float>>(scores + r * L + W);
      const V<float> score0 = from0 - __builtin_convertvector(acc0[r], V<float>) * unit0;
      const V<float> score1 = from1 - __builtin_convertvector(acc1[r], V<float>) * unit1;
      store(scores + r * L, score0), store(scores + r * L + W, score1);
      // Where these are not the last coordinates, nobody asks.
      low0 = score0 < low0 ? score0 : low0;
      low1 = score1 < low1 ? score1 : low1;
    }
  }
  if (lowest) store(lowest, low0), store(lowest + W, low1);
}
#endif

// Four products of bytes in each 32 bits take as long as two of int16.
#if HUBERT_ECG_BYTES == 64

// Turns rows into columns: v[i][j] and v[j][i] change places.
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) void transpose(__m512i (&v)[16]) {
  const __m512i index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int step = 1; step < 16; step *= 2) {
    const __m512i by = _mm512_set1_epi32(step);
    const __mmask16 odd = _mm512_test_epi32_mask(index, by);
    const __m512i low = _mm512_mask_add_epi32(index, odd, index, _mm512_set1_epi32(16 - step));
    const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(index, by), odd, index, _mm512_set1_epi32(16));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & step) continue;
      const __m512i a = v[i], b = v[i + step];
      v[i] = _mm512_permutex2var_epi32(a, low, b);
      v[i + step] = _mm512_permutex2var_epi32(a, high, b);
    }
  }
}

// Rounds `count` points, moved by `offset`, to bytes about 128, by units that make the largest coordinate of each 127.
// Places without a point repeat the last one.
// And to 16 bits, by units that make each point kLength long.
//   bytes [dim / 64, rounded up][16][32 points][4 coordinates] and shorts [32][dim, rounded up to 64] (written);
//   unit [32] (written): of the bytes; squares [32] (added to): squared lengths; missed [32] (written): squared lengths
//   of what bytes take away
HUBERT_ECG_TARGET static void round_bytes(const float* points, int64_t stride, int64_t count, int64_t dim,
                                          const float* offset, int32_t* bytes, int16_t* shorts, float* unit,
                                          float* squares, float* missed) {
  constexpr int L = 32;
  const int64_t shorts_size = (dim + 63) / 64 * 64;
  const float* row[L];
  float scale[L], fine[L];
  const auto moved = [&](const float* from, int64_t d) HUBERT_ECG_TARGET {
    const auto in = __mmask16((1u << std::clamp<int64_t>(dim - d, 0, 16)) - 1);
    return _mm512_add_ps(_mm512_maskz_loadu_ps(in, from + d), _mm512_maskz_loadu_ps(in, offset + d));
  };
  for (int l = 0; l < L; ++l) {
    row[l] = points + std::min<int64_t>(l, count - 1) * stride;
    __m512 sums[2] = {}, most[2] = {};
    for (int64_t d = 0; d < dim; d += 32) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512 value = moved(row[l], d + 16 * i);
        sums[i] = _mm512_fmadd_ps(value, value, sums[i]);
        most[i] = _mm512_max_ps(most[i], _mm512_abs_ps(value));
      }
    }
    squares[l] += _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    const float longest = _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1]));
    unit[l] = std::max(longest / 127, 128 * std::numeric_limits<float>::min());
    scale[l] = 1 / unit[l];
    fine[l] = float(kLength) / std::sqrt(squares[l]);
  }
  for (int half = 0; half < L; half += 16) {
    __m512 lost[16] = {};
    for (int64_t d = 0; d < dim; d += 64) {
      __m512i words[16];
#pragma GCC unroll 4
      for (int l = 0; l < 16; ++l) {
        const __m512 by = _mm512_set1_ps(scale[half + l]), back = _mm512_set1_ps(unit[half + l]);
        const __m512 finely = _mm512_set1_ps(fine[half + l]);
        __m512i whole[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m512 value = moved(row[half + l], d + 16 * i);
          whole[i] = _mm512_cvtps_epi32(_mm512_mul_ps(value, by));
          const __m512 rest = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole[i]), back, value);
          lost[l] = _mm512_fmadd_ps(rest, rest, lost[l]);
          const __m512i longer = _mm512_cvtps_epi32(_mm512_mul_ps(value, finely));
          store(shorts + (half + l) * shorts_size + d + 16 * i, _mm512_cvtepi32_epi16(longer));
        }
        const __m512i packed =
            _mm512_packs_epi16(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]));
        words[l] = _mm512_xor_si512(packed, _mm512_set1_epi8(-128));
      }
      transpose(words);
      // Packing leaves the words 4 j + i where 4 i + j belong.
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) store(bytes + (d / 4 + w % 4 * 4 + w / 4) * L + half, words[w]);
    }
    for (int l = 0; l < 16; ++l) missed[half + l] = _mm512_reduce_add_ps(lost[l]);
  }
}

// As score(), of coordinates in fours. What is left in the end are lower bounds of the scores, and the lowest upper
// bound in `lowest`, which stays NaN: |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'|, where x' and c' are what was
// rounded. Between the blocks of coordinates, scores hold sums of products.
//   x [dim][2 W], c [num_k / kRows][dim][kRows]; start [num_k], null but for the first block: what 128 in each
//   coordinate of x adds; half [num_k], null but for the last block
HUBERT_ECG_TARGET static void score_bytes(const int32_t* x, const Rounded<float>& points, int64_t dim, const int32_t* c,
                                          const Rounded<float>& centroids, const int32_t* start, const float* half,
                                          int64_t num_k, float* scores, float* lowest) {
  constexpr int W = 16, L = 2 * W;
  for (int64_t k = 0; k < num_k; k += kRows, c += kRows * dim, scores += kRows * L) {
    __m512i acc0[kRows], acc1[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc0[r] = start ? _mm512_set1_epi32(-start[k + r]) : load<__m512i>(scores + r * L);
      acc1[r] = start ? acc0[r] : load<__m512i>(scores + r * L + W);
    }
    for (int64_t d = 0; d < dim; ++d) {
      const auto x0 = load<__m512i>(x + d * L), x1 = load<__m512i>(x + d * L + W);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512i four = _mm512_set1_epi32(c[d * kRows + r]);
        acc0[r] = _mm512_dpbusd_epi32(acc0[r], x0, four);
        acc1[r] = _mm512_dpbusd_epi32(acc1[r], x1, four);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store(scores + r * L, acc0[r]), store(scores + r * L + W, acc1[r]);
    if (!half) continue;
    for (int w = 0; w < L; w += W) {
      const auto unit = load<V<float>>(points.unit + w), length = load<V<float>>(points.length + w);
      const auto missed = load<V<float>>(points.missed + w);
      auto low = load<V<float>>(lowest + w);
#pragma GCC unroll 1
      for (int r = 0; r < kRows; ++r) {
        float* const at = scores + r * L + w;
        const auto products = (V<float>)_mm512_cvtepi32_ps(load<__m512i>(at));
        const V<float> score = half[k + r] - products * (unit * centroids.unit[k + r]);
        const V<float> off = missed * centroids.length[k + r] + length * centroids.missed[k + r];
        store(at, score - off);
        low = score + off < low ? score + off : low;
      }
      store(lowest + w, low);
    }
  }
}

// Which of the 2 W scores of a centroid do not lie above their limit. Writes first + l for each such l, and up to 2 W
// numbers beyond them; returns their number.
HUBERT_ECG_TARGET static int64_t list(const float* scores, const float* limit, int32_t first, int32_t* found) {
  constexpr int W = 16;
  int64_t count = 0;
#pragma GCC unroll 2
  for (int w = 0; w < 2 * W; w += W) {
    const __mmask16 in = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + w), _mm512_loadu_ps(limit + w), _CMP_LE_OQ);
    const __m512i index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    store(found + count, _mm512_maskz_compress_epi32(in, _mm512_add_epi32(index, _mm512_set1_epi32(first + w))));
    count += __builtin_popcount(in);
  }
  return count;
}

// Scores of the point i and the centroid k for each found k kPoints + i, and the lowest of each point.
//   x [kPoints][dim] in units of unit [kPoints], c [num_k][dim] in one unit that these contain, dim a multiple of 64;
//   half [num_k]; scores [count] (written); lowest [kPoints] (updated)
HUBERT_ECG_TARGET static void rescore(const int32_t* found, int64_t count, const int16_t* x, const float* unit,
                                      int64_t dim, const int16_t* c, const float* half, float* scores, float* lowest) {
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = found[j] % Codebook<float>::kPoints, k = found[j] / Codebook<float>::kPoints;
    const int16_t *const a = x + i * dim, *const b = c + k * dim;
    __m512i sum0{}, sum1{};
    for (int64_t d = 0; d < dim; d += 64) {
      sum0 = _mm512_dpwssd_epi32(sum0, load<__m512i>(a + d), load<__m512i>(b + d));
      sum1 = _mm512_dpwssd_epi32(sum1, load<__m512i>(a + d + 32), load<__m512i>(b + d + 32));
    }
    scores[j] = half[k] - float(_mm512_reduce_add_epi32(_mm512_add_epi32(sum0, sum1))) * unit[i];
    lowest[i] = std::min(lowest[i], scores[j]);
  }
}
#endif

template <class T>
constexpr Kernels<T> make_kernels() {
  Kernels<T> made{kRows, 2 * Simd<T>::width, pack<T>, score<T>, select<T>, distance<T>};
#ifdef __x86_64__
  if constexpr (sizeof(T) == 4) made.round_pairs = round_pairs, made.score_pairs = score_pairs;
#endif
#if HUBERT_ECG_BYTES == 64
  if constexpr (sizeof(T) == 4)
    made.round_bytes = round_bytes, made.score_bytes = score_bytes, made.list = list, made.rescore = rescore;
#endif
  return made;
}

template <class T>
const Kernels<T> kernels = make_kernels<T>();

}  // namespace HUBERT_ECG_ISA
