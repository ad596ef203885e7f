// Attention for any number of tokens and any size of a head: plain kernels that take one row of the result at a time,
// and what they share with the fast ones of attention.cu.
#pragma once
#include "attention.cuh"

namespace hubert_ecg {
namespace {

constexpr int kPlain = 128;  // threads of a plain kernel, and keys or queries at a time

template <class T>
using Inputs = AttentionInputs<T, Wide<T>>;

// How dropout is done, as the host knows it: the seed is on the device.
struct Drop {
  uint32_t threshold;
  double scale;
};

class Keep {
 public:
  __device__ Keep(const int64_t* seed, const Drop& drop)
      : keys_(seed ? uint64_t(*seed) : 0), threshold_(seed ? drop.threshold : 0) {}

  __device__ __forceinline__ bool operator()(int64_t i) const {
    return threshold_ == 0 || keys_.bits(uint32_t(i), keys_.upper(uint32_t(uint64_t(i) >> 32))) >= threshold_;
  }

 private:
  DropoutKeys keys_;
  uint32_t threshold_;
};

// The token of row m, negative where there is none.
template <class T, class Sum>
__device__ __forceinline__ int64_t token_of(const AttentionInputs<T, Sum>& in, int64_t b, int64_t m) {
  if (m >= in.M) return -1;
  if (!in.queries) return m;
  const int64_t token = in.queries[b * in.M + m];
  return token < in.tokens ? token : -1;
}

__device__ inline bool in_a_span(const int64_t* spans, int64_t S, int64_t token) {
  bool found = false;
  for (int64_t s = 0; s < S; ++s) found |= spans[2 * s] <= token && token < spans[2 * s + 1];
  return found;
}

// Which keys of a record are valid.
class Valid {
 public:
  template <class T, class Sum>
  __device__ Valid(const AttentionInputs<T, Sum>& in, int64_t b) : spans_(in.spans + b * in.S * 2), S_(in.S) {
    all_ = true;
    for (int64_t s = 0; in.spans && s < S_; ++s) {
      const int64_t from = spans_[2 * s], to = spans_[2 * s + 1];
      all_ &= !((from > 0 ? from : 0) < (to < in.tokens ? to : in.tokens));
    }
  }
  __device__ bool operator()(int64_t token) const { return all_ || in_a_span(spans_, S_, token); }

 private:
  const int64_t* spans_;
  int64_t S_;
  bool all_;
};

template <class T>
__device__ __forceinline__ Wide<T> dot_of_warp(const T* x, const T* y, int64_t D) {
  Wide<T> sum = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) sum += widen(x[d]) * widen(y[d]);
  return sum_of_warp(sum);
}

// One row of 128 numbers of the result.
template <class T>
__global__ void __launch_bounds__(kPlain, 4) attention_rows(Inputs<T> in, Heads<T> out, Drop drop) {
  using Sum = Wide<T>;
  HUBERT_ECG_SHARED(Sum, weights);  // [kPlain]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, m = row % in.M, h = row / in.M % in.H, b = row / in.M / in.H;
  const int64_t d = int64_t(blockIdx.y) * kPlain + threadIdx.x, token = token_of(in, b, m);
  if (token < 0) {
    if (d < in.D) narrow(Sum(0), out.row(b, m, h)[d]);
    if (blockIdx.y == 0 && threadIdx.x == 0) in.logsumexp[row] = INFINITY;
    return;
  }
  const Valid valid(in, b);
  const Keep keep(in.seed, drop);
  const T* const q = in.q.row(b, token, h);
  Sum most = -INFINITY, total = 0, sum = 0;
  for (int64_t first = 0; first < in.tokens; first += kPlain) {
    for (int i = warp; i < kPlain; i += kPlain / 32) {
      const int64_t n = first + i;
      Sum score = -INFINITY;
      if (n < in.tokens && valid(n)) score = in.scale * dot_of_warp(q, in.k.row(b, n, h), in.D);
      if (lane == 0) weights[i] = score;
    }
    __syncthreads();
    // By every warp alike.
    Sum now = most, part = 0;
    for (int i = lane; i < kPlain; i += 32) now = weights[i] > now ? weights[i] : now;
    now = most_of_warp(now);
    const bool none = now == -INFINITY;
    for (int i = lane; i < kPlain; i += 32) part += none && weights[i] == now ? Sum(0) : std::exp(weights[i] - now);
    const Sum before = none ? Sum(1) : std::exp(most - now);
    const Sum mine = none && weights[threadIdx.x] == now ? Sum(0) : std::exp(weights[threadIdx.x] - now);
    total = total * before + sum_of_warp(part);
    most = now;
    __syncthreads();
    weights[threadIdx.x] = keep(row * in.tokens + first + threadIdx.x) ? mine : Sum(0);
    __syncthreads();
    sum *= before;
    for (int64_t n = first; d < in.D && n < in.tokens && n < first + kPlain; ++n)
      if (valid(n)) sum += weights[n - first] * widen(in.v.row(b, n, h)[d]);
    __syncthreads();
  }
  if (d < in.D) narrow(sum * Sum(drop.scale) / total, out.row(b, m, h)[d]);
  if (blockIdx.y == 0 && threadIdx.x == 0) in.logsumexp[row] = most + std::log(total);
}

// The weight of a pair of a row and a key, as dropout leaves it, and the gradient of its score; by a warp.
template <class Sum>
struct Pair {
  Sum weight, of_score;
};
template <class T, class Sum>
__device__ __forceinline__ Pair<Sum> pair_of_warp(const AttentionInputs<T, Sum>& in, const Heads<const T>& grad,
                                                  const Heads<const T>& out, const Keep& keep, Sum kept, int64_t b,
                                                  int64_t h, int64_t m, int64_t token, int64_t n) {
  const int64_t row = (b * in.H + h) * in.M + m;
  const T *const from = grad.row(b, m, h), *const to = out.row(b, m, h), *const q = in.q.row(b, token, h),
                 *const k = in.k.row(b, n, h), *const v = in.v.row(b, n, h);
  Sum score = 0, of_weight = 0, mean = 0;
  for (int64_t d = threadIdx.x % 32; d < in.D; d += 32) {
    const Sum g = widen(from[d]);
    score += widen(q[d]) * widen(k[d]);
    of_weight += g * widen(v[d]);
    mean += g * widen(to[d]);
  }
  const Sum weight = std::exp(in.scale * sum_of_warp(score) - in.logsumexp[row]),
            factor = keep(row * in.tokens + n) ? kept : Sum(0);
  return {weight * factor, in.scale * weight * (sum_of_warp(of_weight) * factor - sum_of_warp(mean))};
}

// 128 numbers of the gradients of one token: of its key and value over all rows, and of its query over all keys.
template <class T>
__global__ void __launch_bounds__(kPlain, 4)
    attention_backward_rows(Inputs<T> in, Heads<const T> grad, Heads<const T> out, Heads<T> of_q, Heads<T> of_k,
                            Heads<T> of_v, Drop drop) {
  using Sum = Wide<T>;
  HUBERT_ECG_SHARED(Pair<Sum>, pairs);  // [kPlain]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t t = blockIdx.x % in.tokens, h = blockIdx.x / in.tokens % in.H, b = blockIdx.x / in.tokens / in.H;
  const int64_t d = int64_t(blockIdx.y) * kPlain + threadIdx.x;
  const Valid valid(in, b);
  const Keep keep(in.seed, drop);
  const Sum kept = Sum(drop.scale);
  Sum q = 0, k = 0, v = 0;
  if (valid(t)) {
    for (int64_t first = 0; first < in.M; first += kPlain) {
      for (int i = warp; i < kPlain; i += kPlain / 32) {
        const int64_t token = token_of(in, b, first + i);
        if (token < 0) continue;
        const Pair<Sum> pair = pair_of_warp(in, grad, out, keep, kept, b, h, first + i, token, t);
        if (lane == 0) pairs[i] = pair;
      }
      __syncthreads();
      for (int i = 0; d < in.D && i < kPlain; ++i) {
        const int64_t token = token_of(in, b, first + i);
        if (token < 0) continue;
        v += pairs[i].weight * widen(grad.row(b, first + i, h)[d]);
        k += pairs[i].of_score * widen(in.q.row(b, token, h)[d]);
      }
      __syncthreads();
    }
  }
  for (int64_t m = in.queries ? 0 : t, end = in.queries ? in.M : t + 1; m < end; ++m) {
    if (token_of(in, b, m) != t) continue;
    for (int64_t first = 0; first < in.tokens; first += kPlain) {
      for (int i = warp; i < kPlain; i += kPlain / 32) {
        if (first + i >= in.tokens || !valid(first + i)) continue;
        const Pair<Sum> pair = pair_of_warp(in, grad, out, keep, kept, b, h, m, t, first + i);
        if (lane == 0) pairs[i] = pair;
      }
      __syncthreads();
      for (int64_t n = first; d < in.D && n < in.tokens && n < first + kPlain; ++n)
        if (valid(n)) q += pairs[n - first].of_score * widen(in.k.row(b, n, h)[d]);
      __syncthreads();
    }
  }
  if (d >= in.D) return;
  narrow(q, of_q.row(b, t, h)[d]);
  narrow(k, of_k.row(b, t, h)[d]);
  narrow(v, of_v.row(b, t, h)[d]);
}

unsigned num_blocks(const char* op, int64_t count) {
  HUBERT_ECG_CHECK(count <= INT32_MAX, op, ": at most 2^31 - 1 rows and heads, got ", count);
  return static_cast<unsigned>(count);
}

template <class T>
void run_plain(const char* op, const Inputs<T>& in, const Heads<T>& out, const Drop& drop, intptr_t stream) {
  using Sum = Wide<T>;
  const dim3 grid(num_blocks(op, in.B * in.H * in.M), static_cast<unsigned>((in.D + kPlain - 1) / kPlain));
  HUBERT_ECG_LAUNCH(attention_rows<T>, grid, kPlain, kPlain * sizeof(Sum), stream, in, out, drop);
}

template <class T>
void run_plain_backward(const char* op, const Inputs<T>& in, const Heads<const T>& grad, const Heads<const T>& out,
                        const Heads<T>& q, const Heads<T>& k, const Heads<T>& v, const Drop& drop, intptr_t stream) {
  using Sum = Wide<T>;
  const dim3 grid(num_blocks(op, in.B * in.H * in.tokens), static_cast<unsigned>((in.D + kPlain - 1) / kPlain));
  HUBERT_ECG_LAUNCH(attention_backward_rows<T>, grid, kPlain, kPlain * sizeof(Pair<Sum>), stream, in, grad, out, q, k,
                    v, drop);
}

}  // namespace
}  // namespace hubert_ecg
