#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "isa.h"

namespace hubert_ecg {
namespace {

template <class T>
using Inputs = AttentionInputs<T, Wide<T>>;

// Queries at a time: their weights stay in the second-level cache. A multiple of every register tile's rows.
constexpr int64_t kBlock = 48;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The valid keys of a record, twice: as dropout's hashes and as addresses want them.
struct Keys {
  const int32_t* narrow;
  const int64_t* wide;
  int64_t count;
};

// Arrays of a thread, kept from head to head.
template <class Sum>
class Scratch {
 public:
  void reset() { next_ = 0; }
  Sum* take(int64_t count) {
    // Products write and read beyond the end, by less than a register tile. Vectors do not cross cache lines.
    constexpr int64_t kBeyond = 64, kLine = 64;
    if (next_ == parts_.size()) parts_.emplace_back();
    std::vector<Sum>& part = parts_[next_++];
    if (int64_t(part.size()) < count + kBeyond + kLine) part.resize(count + kBeyond + kLine);
    const uintptr_t at = reinterpret_cast<uintptr_t>(part.data());
    return reinterpret_cast<Sum*>((at + kLine - 1) / kLine * kLine);
  }

 private:
  std::vector<std::vector<Sum>> parts_;
  size_t next_ = 0;
};

#define HUBERT_ECG_SIMD_FILE "attention_simd.h"
#include "every_isa.h"

// What the keys of a record are, and room for those of any record.
class KeyList {
 public:
  explicit KeyList(int64_t tokens) : valid_(tokens), narrow_(tokens), wide_(tokens) {}

  Keys of(const int64_t* spans, int64_t S, int64_t b) {
    const int64_t tokens = valid_.size();
    std::fill(valid_.begin(), valid_.end(), spans == nullptr);
    for (int64_t s = 0; spans && s < S; ++s) {
      const int64_t *const span = spans + (b * S + s) * 2, from = std::clamp<int64_t>(span[0], 0, tokens),
                           to = std::clamp<int64_t>(span[1], 0, tokens);
      if (from < to) std::fill(valid_.begin() + from, valid_.begin() + to, true);
    }
    int64_t count = 0;
    const bool none = std::find(valid_.begin(), valid_.end(), true) == valid_.end();
    for (int64_t t = 0; t < tokens; ++t) {
      narrow_[count] = static_cast<int32_t>(t);
      wide_[count] = t;
      count += none || valid_[t];
    }
    return {narrow_.data(), wide_.data(), count};
  }

 private:
  std::vector<char> valid_;
  std::vector<int32_t> narrow_;
  std::vector<int64_t> wide_;
};

// work(b, h, keys, scratch) for each head of each record, by all threads.
template <class T, class Work>
void each_head(const Inputs<T>& in, const Work& work) {
#pragma omp parallel if (in.B * in.H > 1)
  {
    Scratch<Wide<T>> scratch;
    KeyList list(in.tokens);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < in.B * in.H; ++i) {
      scratch.reset();
      work(i / in.H, i % in.H, list.of(in.spans, in.S, i / in.H), scratch);
    }
  }
}

template <class T>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& spans, const Tensor& queries,
         const Tensor& seed, const Tensor& out, const Tensor& logsumexp, double dropout_p, double scale) {
  const Inputs<T> in = attention_inputs<T, Wide<T>>("masked_span_attention", q, k, v, spans, queries, seed, out,
                                                    logsumexp, dropout_p, scale);
  const auto kernel = HUBERT_ECG_BEST(forward<T>);
  const Heads<T> to = heads<T>(out);
  each_head<T>(in, [&](int64_t b, int64_t h, const Keys& keys, Scratch<Wide<T>>& scratch) {
    kernel(in, b, h, keys, scratch, to);
  });
}

template <class T>
void run_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                  const Tensor& logsumexp, const Tensor& spans, const Tensor& queries, const Tensor& seed,
                  const Tensor& gradients, double dropout_p, double scale) {
  const Inputs<T> in = attention_inputs<T, Wide<T>>("masked_span_attention_backward", q, k, v, spans, queries, seed,
                                                    out, logsumexp, dropout_p, scale);
  check_attention_gradients<T>(grad, q, out, gradients);
  const auto kernel = HUBERT_ECG_BEST(backward<T>);
  const Heads<const T> from = heads<const T>(grad), result = heads<const T>(out);
  const Heads<T> of_q = packed_heads<T>(gradients, 0), of_k = packed_heads<T>(gradients, 1),
                 of_v = packed_heads<T>(gradients, 2);
  each_head<T>(in, [&](int64_t b, int64_t h, const Keys& keys, Scratch<Wide<T>>& scratch) {
    kernel(in, b, h, keys, scratch, from, result, of_q, of_k, of_v);
  });
}

}  // namespace

void masked_span_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor queries, Tensor seed, Tensor out,
                               Tensor logsumexp, double dropout_p, double scale) {
  of_type(q, [&](auto one) { run<decltype(one)>(q, k, v, spans, queries, seed, out, logsumexp, dropout_p, scale); });
}

void masked_span_attention_backward_cpu(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,
                                        Tensor spans, Tensor queries, Tensor seed, Tensor gradients, double dropout_p,
                                        double scale) {
  of_type(q, [&](auto one) {
    run_backward<decltype(one)>(grad, q, k, v, out, logsumexp, spans, queries, seed, gradients, dropout_p, scale);
  });
}

}  // namespace hubert_ecg
