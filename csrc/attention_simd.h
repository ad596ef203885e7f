// The inner loops of attention.cpp for one instruction set (every_isa.h).
#include "dropped_rows_simd.h"
#include "halves_simd.h"
#include "vectors_simd.h"

namespace HUBERT_ECG_ISA {

// Rows of a register tile of two columns of vectors.
#if HUBERT_ECG_BYTES == 64 || defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif

// Columns [0, 2 W), [2 W, 4 W), ... of c = a b, or c += a b: a(r, k) = a[r * pitch + k], where kTurned a[k * pitch +
// r].
//   b [depth][columns]; c [rows, rounded up to kRows][columns]; columns a multiple of 2 W
template <bool kTurned, class Sum>
HUBERT_ECG_TARGET static void multiply(const Sum* a, int64_t pitch, const Sum* b, int64_t rows, int64_t depth,
                                       int64_t columns, bool add, Sum* c) {
  constexpr int W = Simd<Sum>::width;
  const int64_t to_row = kTurned ? 1 : pitch, to_step = kTurned ? pitch : 1;
  for (int64_t n = 0; n < columns; n += 2 * W) {
    for (int64_t r = 0; r < rows; r += kRows) {
      Sum* const tile = c + r * columns + n;
      V<Sum> sum0[kRows], sum1[kRows];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        sum0[i] = add ? load<V<Sum>>(tile + i * columns) : V<Sum>{};
        sum1[i] = add ? load<V<Sum>>(tile + i * columns + W) : V<Sum>{};
      }
      const Sum *left = a + r * to_row, *right = b + n;
      for (int64_t k = 0; k < depth; ++k, left += to_step, right += columns) {
        const V<Sum> b0 = load<V<Sum>>(right), b1 = load<V<Sum>>(right + W);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          sum0[i] += left[i * to_row] * b0;
          sum1[i] += left[i * to_row] * b1;
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        store(tile + i * columns, sum0[i]);
        store(tile + i * columns + W, sum1[i]);
      }
    }
  }
}

// The rows `index` (null: the first n) of a head, times `scale`, as [n][pitch]; zeros for those that are no token.
template <class T, class Sum>
HUBERT_ECG_TARGET static void pack(const T* x, int64_t stride, const int64_t* index, int64_t tokens, int64_t n,
                                   int64_t D, Sum scale, int64_t pitch, Sum* to) {
  for (int64_t i = 0; i < n; ++i, to += pitch) {
    const int64_t row = index ? index[i] : i;
    if (row < 0 || row >= tokens) {
      std::fill(to, to + D, Sum(0));
      continue;
    }
    const T* const from = x + row * stride;
    for (int64_t d = 0; d < D; ++d) to[d] = widen_to(from[d], Sum()) * scale;
  }
}

// The same turned, [D][pitch]; all are tokens.
template <class T, class Sum>
HUBERT_ECG_TARGET static void pack_turned(const T* x, int64_t stride, const int64_t* index, int64_t n, int64_t D,
                                          int64_t pitch, Sum* to) {
  constexpr int kTogether = 8;
  int64_t i = 0;
  for (; i + kTogether <= n; i += kTogether) {
    const T* row[kTogether];
    for (int j = 0; j < kTogether; ++j) row[j] = x + index[i + j] * stride;
    for (int64_t d = 0; d < D; ++d)
#pragma GCC unroll 8
      for (int j = 0; j < kTogether; ++j) to[d * pitch + i + j] = widen_to(row[j][d], Sum());
  }
  for (; i < n; ++i)
    for (int64_t d = 0; d < D; ++d) to[d * pitch + i] = widen_to(x[index[i] * stride + d], Sum());
}

template <class T, class Sum>
HUBERT_ECG_TARGET static void unpack(const Sum* from, int64_t D, Sum scale, T* to) {
  for (int64_t d = 0; d < D; ++d) narrow(from[d] * scale, to[d]);
}

// exp(x) for x <= 88 to 2 units in the last place, by Cody and Waite's reduction and the polynomial of Cephes' expf.
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) V<float> exponential(V<float> x) {
  constexpr float kRound = 12582912.0f;  // its last bit counts ones
  const V<float> turned = x * 1.44269504f + kRound, n = turned - kRound;
  const V<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I<float> power = ((I<float>)turned - (0x4b400000 - 127)) << 23;
  return x < -87.0f ? V<float>{} : p * (V<float>)power;
}
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) V<double> exponential(V<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::exp(x[i]);
  return x;
}

// What dropout multiplies the weights of a row by; `first` is the index of its first token.
template <class Sum>
HUBERT_ECG_TARGET static void drop(Dropout<Sum> dropout, uint64_t first, const int32_t* key, int64_t n, Sum* factor) {
  dropout.at(first);
  for (int64_t i = 0; i < n; ++i) factor[i] = dropout(uint32_t(key[i]));
}

// Turns a row of n scores into weights that are not divided by their sum yet; columns: n rounded up to W.
template <class Sum>
HUBERT_ECG_TARGET static Sum softmax(Sum* x, int64_t n, int64_t columns, Sum& most) {
  constexpr int W = Simd<Sum>::width;
  std::fill(x + n, x + columns, -std::numeric_limits<Sum>::infinity());
  V<Sum> high = load<V<Sum>>(x), sums{};
  for (int64_t i = W; i < columns; i += W) {
    const V<Sum> v = load<V<Sum>>(x + i);
    high = v > high ? v : high;
  }
  most = high[0];
  for (int i = 1; i < W; ++i) most = high[i] > most ? high[i] : most;
  for (int64_t i = 0; i < columns; i += W) {
    const V<Sum> v = exponential(load<V<Sum>>(x + i) - most);
    sums += v;
    store(x + i, v);
  }
  Sum sum = 0;
  for (int i = 0; i < W; ++i) sum += sums[i];
  return sum;
}

// Of a row: scores become weights as dropout leaves them, and the gradients of these become those of the scores.
template <class Sum>
HUBERT_ECG_TARGET static void differentiate(Sum* x, Sum* gradient, const Sum* factor, int64_t columns, Sum logsumexp,
                                            Sum mean) {
  constexpr int W = Simd<Sum>::width;
  for (int64_t i = 0; i < columns; i += W) {
    const V<Sum> p = exponential(load<V<Sum>>(x + i) - logsumexp), g = load<V<Sum>>(gradient + i);
    const V<Sum> f = factor ? load<V<Sum>>(factor + i) : V<Sum>{} + Sum(1);
    store(x + i, p * f);
    store(gradient + i, p * (g * f - mean));
  }
}

template <class Sum>
HUBERT_ECG_TARGET static Sum dot(const Sum* a, const Sum* b, int64_t n) {
  Sum sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// One head of one record. `keys` [n] are the valid ones, in both widths.
template <class T>
HUBERT_ECG_TARGET static void forward(const Inputs<T>& in, int64_t b, int64_t h, const Keys& keys,
                                      Scratch<Wide<T>>& scratch, const Heads<T>& out) {
  using Sum = Wide<T>;
  constexpr int L = 2 * Simd<Sum>::width;
  const int64_t n = keys.count, D = in.D, columns = round_up(n, L), width = round_up(D, L);
  Sum *const k = scratch.take(D * columns), *const v = scratch.take(n * width), *const q = scratch.take(kBlock * D);
  Sum *const weights = scratch.take(kBlock * columns), *const sums = scratch.take(kBlock * width);
  Sum *const factor = scratch.take(columns), *const by = scratch.take(kBlock);
  const Dropout<Sum> dropout(in.dropout_p, in.seed);
  pack_turned(in.k.row(b, 0, h), in.k.t, keys.wide, n, D, columns, k);
  pack(in.v.row(b, 0, h), in.v.t, keys.wide, in.tokens, n, D, Sum(1), width, v);
  for (int64_t first = 0; first < in.M; first += kBlock) {
    const int64_t rows = std::min(kBlock, in.M - first);
    const int64_t* const index = in.queries ? in.queries + b * in.M + first : nullptr;
    const T* const from = in.q.row(b, index ? 0 : first, h);
    pack(from, in.q.t, index, in.tokens, rows, D, in.scale, D, q);
    multiply<false>(q, D, k, rows, D, columns, false, weights);
    for (int64_t i = 0; i < rows; ++i) {
      Sum* const row = weights + i * columns;
      const int64_t at = (b * in.H + h) * in.M + first + i;
      Sum most;
      const Sum sum = softmax(row, n, columns, most);
      const bool outside = index && (index[i] < 0 || index[i] >= in.tokens);
      in.logsumexp[at] = outside ? std::numeric_limits<Sum>::infinity() : most + std::log(sum);
      by[i] = outside ? Sum(0) : 1 / sum;
      if (!in.seed) continue;
      drop(dropout, uint64_t(at) * uint64_t(in.tokens), keys.narrow, n, factor);
      for (int64_t j = 0; j < n; ++j) row[j] *= factor[j];
    }
    multiply<false>(weights, columns, v, rows, n, width, false, sums);
    for (int64_t i = 0; i < rows; ++i) unpack(sums + i * width, D, by[i], out.row(b, first + i, h));
  }
}

template <class T>
HUBERT_ECG_TARGET static void backward(const Inputs<T>& in, int64_t b, int64_t h, const Keys& keys,
                                       Scratch<Wide<T>>& scratch, const Heads<const T>& grad, const Heads<const T>& out,
                                       const Heads<T>& of_q, const Heads<T>& of_k, const Heads<T>& of_v) {
  using Sum = Wide<T>;
  constexpr int L = 2 * Simd<Sum>::width;
  const int64_t n = keys.count, D = in.D, columns = round_up(n, L), width = round_up(D, L);
  Sum *const k_turned = scratch.take(D * columns), *const v_turned = scratch.take(D * columns);
  Sum *const k = scratch.take(n * width), *const q = scratch.take(kBlock * width),
             *const g = scratch.take(kBlock * width);
  Sum *const weights = scratch.take(kBlock * columns), *const of_weights = scratch.take(kBlock * columns);
  Sum *const k_sums = scratch.take((n + kBlock) * width), *const v_sums = scratch.take((n + kBlock) * width);
  Sum *const sums = scratch.take(kBlock * width), *const factor = scratch.take(columns),
             *const row_out = scratch.take(D);
  Sum* const q_sums = scratch.take(in.queries ? in.tokens * D : 0);
  const Dropout<Sum> dropout(in.dropout_p, in.seed);
  pack_turned(in.k.row(b, 0, h), in.k.t, keys.wide, n, D, columns, k_turned);
  pack_turned(in.v.row(b, 0, h), in.v.t, keys.wide, n, D, columns, v_turned);
  pack(in.k.row(b, 0, h), in.k.t, keys.wide, in.tokens, n, D, Sum(1), width, k);
  if (in.queries) std::fill(q_sums, q_sums + in.tokens * D, Sum(0));
  for (int64_t first = 0; first < in.M; first += kBlock) {
    const int64_t rows = std::min(kBlock, in.M - first);
    const int64_t* const index = in.queries ? in.queries + b * in.M + first : nullptr;
    pack(in.q.row(b, index ? 0 : first, h), in.q.t, index, in.tokens, rows, D, in.scale, width, q);
    pack(grad.row(b, first, h), grad.t, nullptr, rows, rows, D, Sum(1), width, g);
    multiply<false>(q, width, k_turned, rows, D, columns, false, weights);
    multiply<false>(g, width, v_turned, rows, D, columns, false, of_weights);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (b * in.H + h) * in.M + first + i;
      pack(out.row(b, first + i, h), out.t, nullptr, 1, 1, D, Sum(1), D, row_out);
      if (in.seed) drop(dropout, uint64_t(at) * uint64_t(in.tokens), keys.narrow, n, factor);
      differentiate(weights + i * columns, of_weights + i * columns, in.seed ? factor : nullptr, columns,
                    in.logsumexp[at], dot(g + i * width, row_out, D));
    }
    multiply<true>(weights, columns, g, n, rows, width, first > 0, v_sums);
    multiply<true>(of_weights, columns, q, n, rows, width, first > 0, k_sums);
    multiply<false>(of_weights, columns, k, rows, n, width, false, sums);
    for (int64_t i = 0; i < rows; ++i) {
      if (!index) {
        unpack(sums + i * width, D, in.scale, of_q.row(b, first + i, h));
      } else if (index[i] >= 0 && index[i] < in.tokens) {
        for (int64_t d = 0; d < D; ++d) q_sums[index[i] * D + d] += sums[i * width + d];
      }
    }
  }
  if (in.queries)
    for (int64_t t = 0; t < in.tokens; ++t) unpack(q_sums + t * D, D, in.scale, of_q.row(b, t, h));
  for (int64_t t = 0, i = 0; t < in.tokens; ++t) {
    const bool valid = i < n && keys.wide[i] == t;
    for (const auto& [sums, to] : {std::pair(k_sums, of_k.row(b, t, h)), std::pair(v_sums, of_v.row(b, t, h))}) {
      if (valid)
        unpack(sums + i * width, D, Sum(1), to);
      else
        std::memset(to, 0, D * sizeof(T));
    }
    i += valid;
  }
}

}  // namespace HUBERT_ECG_ISA
