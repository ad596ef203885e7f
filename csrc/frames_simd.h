// One frame in each lane of a vector, for one instruction set (every_isa.h): loading, storing, logarithm, Fourier
// transform.
#define HUBERT_ECG_INLINE HUBERT_ECG_TARGET static inline __attribute__((always_inline))

namespace HUBERT_ECG_ISA {

template <class T>
struct Simd {
  typedef T V __attribute__((vector_size(HUBERT_ECG_BYTES)));
  static constexpr int width = HUBERT_ECG_BYTES / sizeof(T);
};
template <class T>
using V = typename Simd<T>::V;

template <class T>
struct Bits;
template <>
struct Bits<float> {
  typedef uint32_t U __attribute__((vector_size(HUBERT_ECG_BYTES)));
  static constexpr uint32_t one = 0x3f800000, sqrt_half = 0x3f3504f3, integer = 0x4b000000;
  static constexpr int mantissa = 23, log_terms = 4;
};
template <>
struct Bits<double> {
  typedef uint64_t U __attribute__((vector_size(HUBERT_ECG_BYTES)));
  static constexpr uint64_t one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd, integer = 0x4330000000000000;
  static constexpr int mantissa = 52, log_terms = 10;
};

// Natural logarithm of positive normal numbers; infinity and NaN stay what they are.
// x = 2^e m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh s = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), s = (m - 1) /
// (m + 1), to the precision of Out.
template <class T, class Out = T>
HUBERT_ECG_INLINE V<T> logarithm(V<T> x) {
  using B = Bits<T>;
  using U = typename B::U;
  constexpr int kTerms = Bits<Out>::log_terms;
  const U bits = (U)x;
  const U exponent = (bits - B::sqrt_half + B::one) >> B::mantissa;
  const V<T> m = (V<T>)(bits - (exponent << B::mantissa) + B::one);
  // Put into the mantissa of 2^mantissa, an integer is converted by one subtraction on any processor.
  constexpr T bias = static_cast<T>(int64_t{1} << B::mantissa) + static_cast<T>(B::one >> B::mantissa);
  const V<T> e = (V<T>)(exponent | B::integer) - bias;
  const V<T> s = (m - T(1)) / (m + T(1)), z = s * s;
  V<T> series = V<T>{} + T(1) / (2 * kTerms + 1);
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 0; --k) series = series * z + T(1) / (2 * k + 1);
  const V<T> log = e * T(0.69314718055994530942) + (s + s) * series;
  return x <= std::numeric_limits<T>::max() ? log : x;
}

// The samples of one frame, or the columns of one row, that fill 16 bytes: a square of them is transposed at a time.
template <class T>
constexpr int kPiece = 16 / sizeof(T);

#if __has_builtin(__builtin_shufflevector)
// Element j of every 16 bytes is element P[j] of those of a followed by those of b.
template <int... P, class X, int... J>
HUBERT_ECG_INLINE X shuffle(X a, X b, std::integer_sequence<int, J...>) {
  constexpr int kPattern[] = {P...}, kSize = sizeof...(P), kWidth = sizeof...(J);
  return __builtin_shufflevector(
      a, b, (J / kSize * kSize + kPattern[J % kSize] % kSize + (kPattern[J % kSize] < kSize ? 0 : kWidth))...);
}

template <class X, int... J>
HUBERT_ECG_INLINE auto join(X a, X b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, J...);
}

// In every 16 bytes of kPiece vectors, rows and columns change places.
template <class T>
HUBERT_ECG_INLINE void transpose(V<T>* v) {
  constexpr auto kLanes = std::make_integer_sequence<int, Simd<T>::width>{};
  if constexpr (sizeof(T) == 8) {
    const V<T> a = v[0], b = v[1];
    v[0] = shuffle<0, 2>(a, b, kLanes);
    v[1] = shuffle<1, 3>(a, b, kLanes);
  } else {
    const V<T> ab = shuffle<0, 4, 1, 5>(v[0], v[1], kLanes), cd = shuffle<0, 4, 1, 5>(v[2], v[3], kLanes);
    const V<T> ef = shuffle<2, 6, 3, 7>(v[0], v[1], kLanes), gh = shuffle<2, 6, 3, 7>(v[2], v[3], kLanes);
    v[0] = shuffle<0, 1, 4, 5>(ab, cd, kLanes);
    v[1] = shuffle<2, 3, 6, 7>(ab, cd, kLanes);
    v[2] = shuffle<0, 1, 4, 5>(ef, gh, kLanes);
    v[3] = shuffle<2, 3, 6, 7>(ef, gh, kLanes);
  }
}

// Pieces of `kLanes / kPiece` rows, which lie kPiece rows apart, side by side.
template <class T, int kLanes, class Source>
HUBERT_ECG_INLINE auto gather(const Source* const* row, int64_t i) {
  constexpr int kSize = kPiece<T>;
  if constexpr (kLanes == kSize) {
    typedef T Piece __attribute__((vector_size(16)));
    typedef Source Given __attribute__((vector_size(kSize * sizeof(Source)), aligned(alignof(Source)), may_alias));
    return __builtin_convertvector(*(const Given*)(row[0] + i), Piece);
  } else {
    return join(gather<T, kLanes / 2>(row, i), gather<T, kLanes / 2>(row + kLanes / 2, i),
                std::make_integer_sequence<int, kLanes>{});
  }
}
#endif

// tile[i][lane] = row[lane][i] for i < S.
template <class T, class Source>
HUBERT_ECG_INLINE void load_rows(const Source* const* row, int64_t S, V<T>* tile) {
  constexpr int W = Simd<T>::width;
#if __has_builtin(__builtin_shufflevector)
  constexpr int kSize = kPiece<T>;
  if (S >= kSize) {
    // The last square may overlap the one before.
    for (int64_t i = 0; i < S; i += kSize) {
      const int64_t at = std::min(i, S - kSize);
      V<T> v[kSize];
#pragma GCC unroll 4
      for (int r = 0; r < kSize; ++r) v[r] = gather<T, W>(row + r, at);
      transpose<T>(v);
#pragma GCC unroll 4
      for (int r = 0; r < kSize; ++r) tile[at + r] = v[r];
    }
    return;
  }
#endif
  for (int64_t i = 0; i < S; ++i)
    for (int lane = 0; lane < W; ++lane) tile[i][lane] = static_cast<T>(row[lane][i]);
}

// What is read next, asked for a part at a time between stages of work: all of it at once would hold them up. Much of
// it goes to the second-level cache, as the work needs the first.
class Ahead {
 public:
  inline __attribute__((always_inline)) Ahead(const void* from, int64_t bytes, int64_t parts)
      : at_(static_cast<const char*>(from)),
        end_(at_ + bytes),
        part_((bytes / 64 / parts + 1) * 64),
        little_(bytes <= 8192) {}
  inline __attribute__((always_inline)) void fetch() {
    const char* const stop = std::min(at_ + part_, end_);
    if (little_) {
      for (; at_ < stop; at_ += 64) __builtin_prefetch(at_);
    } else {
      for (; at_ < stop; at_ += 64) __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  const char *at_, *end_;
  int64_t part_;
  bool little_;
};

// tile[i][lane] = rows[lane][i] for i < S. Lanes from `count` on repeat the last row.
template <class T>
HUBERT_ECG_INLINE void load_tile(const T* rows, int64_t S, int64_t count, V<T>* tile) {
  const T* row[Simd<T>::width];
  for (int lane = 0; lane < Simd<T>::width; ++lane) row[lane] = rows + std::min<int64_t>(lane, count - 1) * S;
  load_rows<T>(row, S, tile);
}

// rows[lane][d] = columns[d][lane] for lane < count.
template <class T>
HUBERT_ECG_INLINE void store_tile(const V<T>* columns, int64_t D, int64_t count, T* rows) {
  constexpr int W = Simd<T>::width;
#if __has_builtin(__builtin_shufflevector)
  constexpr int kSize = kPiece<T>;
  if (count == W && D >= kSize) {
    for (int64_t i = 0; i < D; i += kSize) {
      const int64_t at = std::min(i, D - kSize);
      V<T> v[kSize];
#pragma GCC unroll 4
      for (int r = 0; r < kSize; ++r) v[r] = columns[at + r];
      transpose<T>(v);
#pragma GCC unroll 16
      for (int lane = 0; lane < W; ++lane)
        std::memcpy(rows + lane * D + at, (const T*)&v[lane % kSize] + lane / kSize * kSize, 16);
    }
    return;
  }
#endif
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t d = 0; d < D; ++d) rows[lane * D + d] = columns[d][lane];
}

// The transform of length 4 of x[0], x[step], x[2 step], x[3 step].
template <class T>
HUBERT_ECG_INLINE void fft_quad(const V<T>* x, int64_t step, V<T>* X) {
  const V<T> even = x[0] + x[2 * step], odd = x[step] + x[3 * step];
  X[0] = even + odd;
  X[1] = x[0] - x[2 * step];
  X[2] = even - odd;
  X[3] = x[3 * step] - x[step];
}

// The transform of odd length m of x[0], x[step], x[2 step], ...; overwrites x. Sums x_j + x_{m-j} meet the cosines,
// differences the sines. turn: entries of the circle in 1 / m of a turn.
template <class T>
HUBERT_ECG_TARGET static void fft_odd(V<T>* x, int64_t step, int64_t m, V<T>* X, const T* circle, int64_t turn) {
  constexpr int kBins = 4;
  const int64_t half = m / 2;
  V<T> total = x[0];
  for (int64_t j = 1; j <= half; ++j) {
    const V<T> a = x[j * step], b = x[(m - j) * step];
    x[j * step] = a + b;
    x[(m - j) * step] = a - b;
    total += a + b;
  }
  X[0] = total;
  for (int64_t k = 1; k <= half; k += kBins) {
    V<T> re[kBins], im[kBins];
    int64_t angle[kBins];
#pragma GCC unroll 4
    for (int r = 0; r < kBins; ++r) re[r] = x[0], im[r] = V<T>{}, angle[r] = 0;
    for (int64_t j = 1; j <= half; ++j) {
      const V<T> sum = x[j * step], difference = x[(m - j) * step];
#pragma GCC unroll 4
      for (int r = 0; r < kBins; ++r) {
        angle[r] += k + r;
        angle[r] -= angle[r] >= m ? m : 0;
        re[r] += circle[2 * angle[r] * turn] * sum;
        im[r] -= circle[2 * angle[r] * turn + 1] * difference;
      }
    }
    for (int r = 0; r < kBins && k + r <= half; ++r) X[k + r] = re[r], X[m - k - r] = im[r];
  }
}

// The transform of odd length m = radix * q of x[0], x[step], ...: transforms of length q, joined `radix` at a time.
template <class T>
HUBERT_ECG_TARGET static void fft_odd_factors(V<T>* x, int64_t step, int64_t m, int64_t radix, V<T>* X, const T* circle,
                                              int64_t turn) {
  if (radix == 1) return fft_odd<T>(x, step, m, X, circle, turn);
  const int64_t q = m / radix;
  V<T> re[RealFft::kMostRadix], im[RealFft::kMostRadix], A[RealFft::kMostRadix], B[RealFft::kMostRadix];
  for (int64_t j = 0; j < radix; ++j) fft_odd<T>(x + j * step, radix * step, q, X + j * q, circle, turn * radix);
  for (int64_t j = 0; j < radix; ++j) re[j] = X[j * q];
  fft_odd<T>(re, 1, radix, A, circle, turn * q);
  for (int64_t j = 0; j < radix; ++j) X[j * q] = A[j];
  for (int64_t k = 1; 2 * k < q; ++k) {
    for (int64_t j = 0; j < radix; ++j) {
      const T c = circle[2 * j * k * turn], s = circle[2 * j * k * turn + 1];
      const V<T> r = X[j * q + k], i = X[j * q + q - k];
      re[j] = c * r + s * i;
      im[j] = c * i - s * r;
    }
    // The transform of complex numbers is that of their real parts and i times that of their imaginary parts.
    fft_odd<T>(re, 1, radix, A, circle, turn * q);
    fft_odd<T>(im, 1, radix, B, circle, turn * q);
    X[k] = A[0];
    X[m - k] = B[0];
    for (int64_t r = 1; 2 * r < radix; ++r) {
      const V<T> ar = A[r], ai = A[radix - r], br = B[r], bi = B[radix - r];
      X[r * q + k] = ar - bi;
      X[m - r * q - k] = ai + br;
      // Bin (radix - r) q + k is the mirror image of bin r q - k.
      X[r * q - k] = ar + bi;
      X[m - r * q + k] = ai - br;
    }
  }
}

// Two transforms of length `half`, of the even and the odd samples, to one of twice the length.
template <class T>
HUBERT_ECG_INLINE void fft_join(V<T>* X, int64_t half, const T* circle, int64_t turn) {
  const V<T> even = X[0], odd = X[half];
  X[0] = even + odd;
  X[half] = even - odd;
  if (half % 2 == 0) X[half + half / 2] = -X[half + half / 2];
  for (int64_t k = 1; 2 * k < half; ++k) {
    const T c = circle[2 * k * turn], s = circle[2 * k * turn + 1];
    const V<T> er = X[k], ei = X[half - k], odd_re = X[half + k], odd_im = X[2 * half - k];
    const V<T> tr = c * odd_re + s * odd_im, ti = c * odd_im - s * odd_re;
    X[k] = er + tr;
    X[half - k] = er - tr;
    X[half + k] = ti - ei;
    X[2 * half - k] = ti + ei;
  }
}

// Four transforms of length `quarter`, of the samples 0, 2, 1 and 3 modulo 4, to one of four times the length.
template <class T>
HUBERT_ECG_INLINE void fft_join4(V<T>* X, int64_t quarter, const T* circle, int64_t turn) {
  V<T>*const X1 = X + quarter, *const X2 = X1 + quarter, *const X3 = X2 + quarter;
  {
    const V<T> even = X[0] + X1[0], odd = X2[0] + X3[0];
    const V<T> re = X[0] - X1[0], im = X3[0] - X2[0];
    X[0] = even + odd;
    X1[0] = re;
    X2[0] = even - odd;
    X3[0] = im;
  }
  for (int64_t k = 1, j = quarter - 1; k < j; ++k, --j) {
    const T *const w1 = circle + 2 * k * turn, *const w2 = w1 + 2 * k * turn, *const w3 = w2 + 2 * k * turn;
    const V<T> r0 = X[k], i0 = X[j];
    const V<T> r2 = w2[0] * X1[k] + w2[1] * X1[j], i2 = w2[0] * X1[j] - w2[1] * X1[k];
    const V<T> r1 = w1[0] * X2[k] + w1[1] * X2[j], i1 = w1[0] * X2[j] - w1[1] * X2[k];
    const V<T> r3 = w3[0] * X3[k] + w3[1] * X3[j], i3 = w3[0] * X3[j] - w3[1] * X3[k];
    const V<T> even_re = r0 + r2, even_im = i0 + i2, odd_re = r1 + r3, odd_im = i1 + i3;
    const V<T> low_re = r0 - r2, low_im = i0 - i2, high_re = r1 - r3, high_im = i1 - i3;
    X[k] = even_re + odd_re;
    X3[j] = even_im + odd_im;
    X1[j] = even_re - odd_re;
    X2[k] = odd_im - even_im;
    X1[k] = low_re + high_im;
    X2[j] = low_im - high_re;
    X[j] = low_re - high_im;
    X3[k] = -low_im - high_re;
  }
  if (quarter % 2 == 0) {
    const int64_t k = quarter / 2;
    const V<T> f0 = X[k], f2 = X1[k];
    const V<T> sum = T(0.70710678118654752440) * (X2[k] + X3[k]),
               difference = T(0.70710678118654752440) * (X2[k] - X3[k]);
    X[k] = f0 + difference;
    X1[k] = f0 - difference;
    X2[k] = f2 - sum;
    X3[k] = -f2 - sum;
  }
}

// The transform of kLeaf samples, every `step`, kept in registers. turn: entries of the circle in 1 / kLeaf of a turn.
template <class T, int kLeaf>
HUBERT_ECG_INLINE void fft_leaf(const V<T>* x, int64_t step, V<T>* X, const T* circle, int64_t turn) {
  V<T> local[kLeaf];
  if constexpr (kLeaf < 4) {
    local[0] = kLeaf == 2 ? x[0] + x[step] : x[0];
    if constexpr (kLeaf == 2) local[1] = x[0] - x[step];
  } else {
    constexpr int kQuads = kLeaf / 4, kReversed[] = {0, kQuads / 2, 1, 3};
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) fft_quad<T>(x + kReversed[q] * step, kQuads * step, local + 4 * q);
    if constexpr (kLeaf == 8) fft_join<T>(local, 4, circle, turn);
    if constexpr (kLeaf == 16) fft_join4<T>(local, 4, circle, turn);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLeaf; ++i) X[i] = local[i];
}

// x [n] is read (and overwritten where n has an odd factor), X [n] written. circle [n, 2]: cos and sin of 2 pi j / n.
//
// The result lies "half-complex": Re X_k at k for 0 <= k <= n / 2, Im X_k at n - k for 0 < k < n / 2. In that order
// each butterfly writes where it read.
template <class T>
HUBERT_ECG_INLINE void real_fft(const RealFft& fft, V<T>* x, V<T>* X, const T* circle) {
  const int64_t n = fft.n, leaf = fft.leaf, step = n / leaf;
  for (int64_t b = 0; b < step; ++b) {
    V<T>*const from = x + fft.first[b], *const to = X + b * leaf;
    leaf == 16  ? fft_leaf<T, 16>(from, step, to, circle, step)
    : leaf == 8 ? fft_leaf<T, 8>(from, step, to, circle, step)
    : leaf == 4 ? fft_leaf<T, 4>(from, step, to, circle, step)
    : leaf == 2 ? fft_leaf<T, 2>(from, step, to, circle, step)
    : leaf == 1 ? fft_leaf<T, 1>(from, step, to, circle, step)
                : fft_odd_factors<T>(from, step, leaf, fft.radix, to, circle, step);
  }
  int64_t length = leaf;
  if (fft.halves)
    for (; length < 2 * leaf; length *= 2)
      for (int64_t at = 0; at < n; at += 2 * length) fft_join<T>(X + at, length, circle, n / (2 * length));
  for (; length < n; length *= 4)
    for (int64_t at = 0; at < n; at += 4 * length) fft_join4<T>(X + at, length, circle, n / (4 * length));
}

}  // namespace HUBERT_ECG_ISA
