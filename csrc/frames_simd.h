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
// (m + 1).
template <class T>
HUBERT_ECG_INLINE V<T> logarithm(V<T> x) {
  using B = Bits<T>;
  using U = typename B::U;
  const U bits = (U)x;
  const U exponent = (bits - B::sqrt_half + B::one) >> B::mantissa;
  const V<T> m = (V<T>)(bits - (exponent << B::mantissa) + B::one);
  // Put into the mantissa of 2^mantissa, an integer is converted by one subtraction on any processor.
  constexpr T bias = static_cast<T>(int64_t{1} << B::mantissa) + static_cast<T>(B::one >> B::mantissa);
  const V<T> e = (V<T>)(exponent | B::integer) - bias;
  const V<T> s = (m - T(1)) / (m + T(1)), z = s * s;
  V<T> series = V<T>{} + T(1) / (2 * B::log_terms + 1);
#pragma GCC unroll 16
  for (int k = B::log_terms - 1; k >= 0; --k) series = series * z + T(1) / (2 * k + 1);
  const V<T> log = e * T(0.69314718055994530942) + (s + s) * series;
  return x <= std::numeric_limits<T>::max() ? log : x;
}

// tile[i][lane] = rows[lane][i] for i < S. Lanes from `count` on repeat the last row.
template <class T>
HUBERT_ECG_INLINE void load_tile(const T* rows, int64_t S, int64_t count, V<T>* tile) {
  constexpr int W = Simd<T>::width;
  const T* row[W];
  for (int lane = 0; lane < W; ++lane) row[lane] = rows + std::min<int64_t>(lane, count - 1) * S;
  T* const to = reinterpret_cast<T*>(tile);
  int64_t i = 0;
#if __has_builtin(__builtin_shufflevector)
  if constexpr (sizeof(T) == 4) {
    typedef float Q __attribute__((vector_size(16)));
    typedef float QU __attribute__((vector_size(16), aligned(4), may_alias));
    for (; i + 4 <= S; i += 4) {
#pragma GCC unroll 4
      for (int lane = 0; lane < W; lane += 4) {
        const Q a = *(const QU*)(row[lane] + i), b = *(const QU*)(row[lane + 1] + i);
        const Q c = *(const QU*)(row[lane + 2] + i), d = *(const QU*)(row[lane + 3] + i);
        const Q ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
        const Q ef = __builtin_shufflevector(a, b, 2, 6, 3, 7), gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        *(QU*)(to + (i + 0) * W + lane) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
        *(QU*)(to + (i + 1) * W + lane) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
        *(QU*)(to + (i + 2) * W + lane) = __builtin_shufflevector(ef, gh, 0, 1, 4, 5);
        *(QU*)(to + (i + 3) * W + lane) = __builtin_shufflevector(ef, gh, 2, 3, 6, 7);
      }
    }
  }
#endif
  for (; i < S; ++i)
    for (int lane = 0; lane < W; ++lane) to[i * W + lane] = row[lane][i];
}

// rows[lane][d] = columns[d][lane] for lane < count.
template <class T>
HUBERT_ECG_INLINE void store_tile(const V<T>* columns, int64_t D, int64_t count, T* rows) {
  const T* const from = reinterpret_cast<const T*>(columns);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t d = 0; d < D; ++d) rows[lane * D + d] = from[d * Simd<T>::width + lane];
}

// Four samples to a transform of length 4.
template <class T>
HUBERT_ECG_INLINE void fft_quad(const V<T>* x, const int64_t* first, V<T>* X) {
  const V<T> a = x[first[0]], b = x[first[1]], c = x[first[2]], d = x[first[3]];
  const V<T> even = a + b, odd = c + d;
  X[0] = even + odd;
  X[1] = a - b;
  X[2] = even - odd;
  X[3] = d - c;
}

// The transform of odd length m of x[0], x[step], x[2 step], ...; overwrites x. Sums x_j + x_{m-j} meet the cosines,
// differences the sines. turn: entries of the circle in 1 / m of a turn.
template <class T>
HUBERT_ECG_INLINE void fft_odd(V<T>* x, int64_t step, int64_t m, V<T>* X, const T* circle, int64_t turn) {
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

// x [n] is read (and overwritten where n has an odd factor), X [n] written. circle [n, 2]: cos and sin of 2 pi j / n.
//
// The result lies "half-complex": Re X_k at k for 0 <= k <= n / 2, Im X_k at n - k for 0 < k < n / 2. In that order
// each butterfly writes where it read.
template <class T>
HUBERT_ECG_INLINE void real_fft(const RealFft& fft, V<T>* x, V<T>* X, const T* circle) {
  const int64_t blocks = fft.n / fft.odd;
  int64_t half = fft.odd;
  if (fft.odd == 1 && blocks >= 4) {
    for (int64_t b = 0; b < blocks; b += 4) fft_quad<T>(x, &fft.first[b], X + b);
    half = 4;
  } else if (fft.odd == 1) {
    for (int64_t b = 0; b < blocks; ++b) X[b] = x[fft.first[b]];
  } else {
    for (int64_t b = 0; b < blocks; ++b) fft_odd<T>(x + fft.first[b], blocks, fft.odd, X + b * fft.odd, circle, blocks);
  }
  for (; half < fft.n; half *= 2)
    for (int64_t at = 0; at < fft.n; at += 2 * half) fft_join<T>(X + at, half, circle, fft.n / (2 * half));
}

}  // namespace HUBERT_ECG_ISA
