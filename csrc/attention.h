#pragma once
#include "dropout.h"
#include "tensor.h"

namespace hubert_ecg {

// out[b, m, h] = sum_n dropout(P)[m, n] v[b, n, h] with P = exp(scale q[b, row m, h] . k[b, n, h] - logsumexp[b, h, m])
// over the valid keys n of record b: those in any of its spans, or all where there is none. Row m is token m, or
// queries[b, m]; one that is no token gives zeros, and a logsumexp of infinity.
//   q, k, v [B, T, H, D] of one floating dtype, any strides but that of D, which is 1;
//   spans [B, S, 2] int64, or [0]: all keys; queries [B, M] int64, or [0]: M = T; seed [] int64, or [0] with a
//   dropout_p of 0; out [B, M, H, D] (written), logsumexp [B, H, M] float32, float64 as q is (written)
void masked_span_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor queries, Tensor seed, Tensor out,
                               Tensor logsumexp, double dropout_p, double scale);
void masked_span_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor queries, Tensor seed, Tensor out,
                                Tensor logsumexp, double dropout_p, double scale, intptr_t stream);

// The gradients of q, k and v from that of `out`; the sums of each are always added in the same order.
//   grad and out [B, M, H, D] as q; gradients [B, T, 3, H, D] (written); the others as above
void masked_span_attention_backward_cpu(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,
                                        Tensor spans, Tensor queries, Tensor seed, Tensor gradients, double dropout_p,
                                        double scale);
void masked_span_attention_backward_cuda(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,
                                         Tensor spans, Tensor queries, Tensor seed, Tensor gradients, double dropout_p,
                                         double scale, intptr_t stream);

// A tensor [B, T, H, D] of any strides but that of D, which is 1.
template <class T>
struct Heads {
  T* data;
  int64_t b, t, h;

  HUBERT_ECG_ANYWHERE T* row(int64_t record, int64_t token, int64_t head) const {
    return data + record * b + token * t + head * h;
  }
};

template <class T>
Heads<T> heads(const Tensor& x) {
  return {x.data<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

// Part 0, 1 or 2 of a packed tensor [B, T, 3, H, D].
template <class T>
Heads<T> packed_heads(const Tensor& x, int part) {
  return {x.data<T>() + part * x.stride(2), x.stride(0), x.stride(1), x.stride(3)};
}

// What both directions share.
template <class T, class Sum>
struct AttentionInputs {
  Heads<const T> q, k, v;
  const int64_t *spans, *queries, *seed;  // null: none
  Sum* logsumexp;                         // [B, H, M]
  int64_t B, tokens, M, H, D, S;
  Sum scale;
  double dropout_p;
};

template <class T>
bool is_heads(const Tensor& x, const Tensor& q, int64_t rows) {
  return x.ndim() == 4 && x.is<T>() && x.size(0) == q.size(0) && x.size(1) == rows && x.size(2) == q.size(2) &&
         x.size(3) == q.size(3) && (x.size(3) <= 1 || x.stride(3) == 1);
}

// Checks, and gathers, what both directions share.
template <class T, class Sum>
AttentionInputs<T, Sum> attention_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& spans, const Tensor& queries, const Tensor& seed,
                                         const Tensor& out, const Tensor& logsumexp, double dropout_p, double scale) {
  HUBERT_ECG_CHECK(q.ndim() == 4 && is_heads<T>(q, q, q.size(1)), op, ": q must be [B, T, H, D], got ", q);
  const int64_t B = q.size(0), tokens = q.size(1), H = q.size(2), D = q.size(3);
  HUBERT_ECG_CHECK(is_heads<T>(k, q, tokens), op, ": k must be like q (", q, "), got ", k);
  HUBERT_ECG_CHECK(is_heads<T>(v, q, tokens), op, ": v must be like q (", q, "), got ", v);
  const bool some = queries.ndim() == 2, limited = spans.ndim() == 3, drops = seed.ndim() == 0;
  HUBERT_ECG_CHECK(queries.is<int64_t>() && queries.contiguous() && (!some || queries.size(0) == B), op,
                   ": queries must be int64 [", B, ", M], got ", queries);
  HUBERT_ECG_CHECK(
      spans.is<int64_t>() && spans.contiguous() && (!limited || (spans.size(0) == B && spans.size(2) == 2)), op,
      ": spans must be int64 [", B, ", S, 2], got ", spans);
  HUBERT_ECG_CHECK(seed.is<int64_t>() && (drops || dropout_p == 0), op, ": seed must be int64 [], got ", seed);
  const int64_t M = some ? queries.size(1) : tokens;
  HUBERT_ECG_CHECK(is_heads<T>(out, q, M), op, ": out must be [", B, ", ", M, ", ", H, ", ", D, "], got ", out);
  HUBERT_ECG_CHECK(logsumexp.ndim() == 3 && logsumexp.is<Sum>() && logsumexp.contiguous() && logsumexp.size(0) == B &&
                       logsumexp.size(1) == H && logsumexp.size(2) == M,
                   op, ": logsumexp must be [", B, ", ", H, ", ", M, "], got ", logsumexp);
  return {heads<const T>(q),
          heads<const T>(k),
          heads<const T>(v),
          limited ? spans.data<const int64_t>() : nullptr,
          some ? queries.data<const int64_t>() : nullptr,
          dropout_p > 0 ? seed.data<const int64_t>() : nullptr,
          logsumexp.data<Sum>(),
          B,
          tokens,
          M,
          H,
          D,
          limited ? spans.size(1) : 0,
          static_cast<Sum>(scale),
          dropout_p};
}

template <class T>
void check_attention_gradients(const Tensor& grad, const Tensor& q, const Tensor& out, const Tensor& gradients) {
  HUBERT_ECG_CHECK(is_heads<T>(grad, q, out.size(1)), "masked_span_attention_backward: grad must be like out (", out,
                   "), got ", grad);
  HUBERT_ECG_CHECK(gradients.ndim() == 5 && gradients.is<T>() && gradients.contiguous() &&
                       gradients.size(0) == q.size(0) && gradients.size(1) == q.size(1) && gradients.size(2) == 3 &&
                       gradients.size(3) == q.size(2) && gradients.size(4) == q.size(3),
                   "masked_span_attention_backward: gradients must be [B, T, 3, H, D] of q (", q, "), got ", gradients);
}

}  // namespace hubert_ecg
