#include "linear.h"

#ifdef __x86_64__
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "frames.h"
#include "isa.h"

namespace hubert_ecg {
namespace {

constexpr float kLength = 32700;
// Numbers of a row that share a unit, an even count. A large one takes digits from so many others only.
constexpr int64_t kDepth = 256;
// Rows of a register tile; rows and columns whose sums stay in the second-level cache, whole register tiles of them.
constexpr int kRows = 6;
constexpr int64_t kBlockRows = 28 * kRows, kBlockColumns = 256;

// The inner loops for one instruction set, and one type of numbers: linear_simd.h.
struct Kernels {
  using Pack = void (*)(const void* const* from, int64_t rows, int64_t depth, float* units, int32_t* pairs);
  int columns;
  // Of a matrix, and of a transposed one.
  Pack pack_rows[2], pack_columns[2];
  void (*multiply)(const int32_t* a, const float* a_units, const int32_t* b, const float* b_units, int64_t depth,
                   bool first, float* c, int64_t stride);
  void (*finish)(const float* c, const float* bias, int64_t n, void* out);
};

#define HUBERT_ECG_SIMD_FILE "linear_simd.h"
#include "every_isa.h"

// A matrix, [M, D] or [B, F, D], as B F rows of numbers of one type.
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : kernels(x.is<float>()      ? HUBERT_ECG_BEST(kernels<float>)
                : x.is<BFloat16>() ? HUBERT_ECG_BEST(kernels<BFloat16>)
                                   : HUBERT_ECG_BEST(kernels<Float16>)),
        count(x.size(-2) * (x.ndim() == 3 ? x.size(0) : 1)),
        width(x.size(-1)),
        data_(x.data<char>()),
        element_(x.is<float>() ? 4 : 2),
        frames_(x.size(-2)),
        frame_step_(x.stride(-2) * element_),
        record_step_(x.stride(0) * element_) {}

  // Where column `column` of n rows from `first` on lies.
  void at(int64_t first, int64_t n, int64_t column, void** to) const {
    int64_t frame = first % frames_;
    char* record = data_ + first / frames_ * record_step_ + column * element_;
    for (int64_t i = 0; i < n; ++i) {
      to[i] = record + frame * frame_step_;
      if (++frame == frames_) frame = 0, record += record_step_;
    }
  }

  const Kernels& kernels;
  const int64_t count, width;

 private:
  char* data_;
  int64_t element_, frames_, frame_step_, record_step_;
};

// A matrix of `rows` of `depth` numbers, or the transpose of one, rounded.
class Rounded {
 public:
  Rounded(const Rows& x, bool transposed, int64_t panel, Kernels::Pack pack)
      : rows_(((transposed ? x.width : x.count) + panel - 1) / panel * panel),
        depth_(transposed ? x.count : x.width),
        units_(new float[std::max<int64_t>(1, chunks() * rows_)]),
        pairs_(new CacheLine[(rows_ * ((depth_ + 1) / 2 + chunks()) * 4) / 64 + 1]) {
    const int64_t rows = transposed ? x.width : x.count, panels = rows_ / panel;
#pragma omp parallel for schedule(static) if (rows * depth_ > 65536)
    for (int64_t unit = 0; unit < panels * chunks(); ++unit) {
      const int64_t chunk = unit / panels, first = unit % panels * panel, some = std::min(panel, rows - first);
      void* from[kDepth];
      transposed ? x.at(chunk * kDepth, depth(chunk), first, from) : x.at(first, some, chunk * kDepth, from);
      pack(from, some, depth(chunk), units(chunk, first), pairs(chunk, first));
    }
  }

  int64_t chunks() const { return (depth_ + kDepth - 1) / kDepth; }
  int64_t depth(int64_t chunk) const { return std::min(kDepth, depth_ - chunk * kDepth); }
  float* units(int64_t chunk, int64_t first) const { return units_.get() + chunk * rows_ + first; }
  int32_t* pairs(int64_t chunk, int64_t first) const {
    const int64_t at = chunk * (kDepth / 2) * rows_ + first * ((depth(chunk) + 1) / 2);
    return reinterpret_cast<int32_t*>(pairs_.get()) + at;
  }

 private:
  int64_t rows_, depth_;
  std::unique_ptr<float[]> units_;
  std::unique_ptr<CacheLine[]> pairs_;
};

// out [M, N] = a b^T + bias: of a [M, K], of b [N, K], or of their transposes.
void product(const Rows& a, bool a_transposed, const Rows& b, bool b_transposed, const float* bias, const Rows& out) {
  const int64_t M = out.count, N = out.width, depth = a_transposed ? a.count : a.width;
  if (M == 0 || N == 0) return;
  const Kernels& run = out.kernels;
  const int64_t columns = run.columns;
  const Rounded left(a, a_transposed, kRows, a.kernels.pack_rows[a_transposed]);
  const Rounded right(b, b_transposed, columns, b.kernels.pack_columns[b_transposed]);
  const int64_t down = (M + kBlockRows - 1) / kBlockRows, blocks = down * ((N + kBlockColumns - 1) / kBlockColumns);
  const int num_threads =
      M * N * depth > 65536 ? static_cast<int>(std::min<int64_t>(blocks, omp_get_max_threads())) : 1;
  constexpr int64_t kSums = kBlockRows * kBlockColumns * sizeof(float) / 64;
  const std::unique_ptr<CacheLine[]> sums(new CacheLine[num_threads * kSums]);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    float* const c = reinterpret_cast<float*>(sums.get() + omp_get_thread_num() * kSums);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t i0 = block % down * kBlockRows, i1 = std::min(M, i0 + kBlockRows);
      const int64_t j0 = block / down * kBlockColumns, j1 = std::min(N, j0 + kBlockColumns);
      if (depth == 0) std::fill_n(c, kBlockRows * kBlockColumns, 0.0f);
      for (int64_t chunk = 0; chunk < left.chunks(); ++chunk)
        for (int64_t j = j0; j < j1; j += columns)
          for (int64_t i = i0; i < i1; i += kRows)
            run.multiply(left.pairs(chunk, i), left.units(chunk, i), right.pairs(chunk, j), right.units(chunk, j),
                         left.depth(chunk), chunk == 0, c + (i - i0) * kBlockColumns + (j - j0), kBlockColumns);
      void* to[kBlockRows];
      out.at(i0, i1 - i0, j0, to);
      for (int64_t i = i0; i < i1; ++i)
        run.finish(c + (i - i0) * kBlockColumns, bias ? bias + j0 : nullptr, j1 - j0, to[i - i0]);
    }
  }
}

// Of `rows` rows; -1: any number.
Rows check_matrix(const Tensor& x, int64_t rows, int64_t columns, const char* op, const char* name) {
  const bool matrix = (x.ndim() == 2 || x.ndim() == 3) && (x.contiguous() || x.size(-1) == 1 || x.stride(-1) == 1) &&
                      (x.is<float>() || x.is<Float16>() || x.is<BFloat16>());
  HUBERT_ECG_CHECK(matrix && (rows < 0 || x.size(-2) * (x.ndim() == 3 ? x.size(0) : 1) == rows) &&
                       (columns < 0 || x.size(-1) == columns),
                   op, ": ", name,
                   " must be a matrix of float32, float16 or bfloat16, the numbers of a row side by side, that fits "
                   "the others, got ",
                   x);
  return Rows(x);
}

}  // namespace

void linear_cpu(Tensor x, Tensor weight, Tensor bias, Tensor y) {
  const Rows rows = check_matrix(x, -1, -1, "linear", "x");
  const Rows columns = check_matrix(weight, -1, rows.width, "linear", "weight");
  HUBERT_ECG_CHECK(
      bias.is<float>() && bias.contiguous() && bias.ndim() == 1 && (bias.size(0) == 0 || bias.size(0) == columns.count),
      "linear: bias must be float32 [", columns.count, "] or [0], got ", bias);
  product(rows, false, columns, false, bias.size(0) ? bias.data<float>() : nullptr,
          check_matrix(y, rows.count, columns.count, "linear", "y"));
}

void linear_backward_cpu(Tensor grad, Tensor x, Tensor weight, Tensor to_x, Tensor to_weight) {
  const char* const op = "linear_backward";
  const Rows own = check_matrix(grad, -1, -1, op, "grad"), rows = check_matrix(x, own.count, -1, op, "x");
  const Rows columns = check_matrix(weight, own.width, rows.width, op, "weight");
  // What nobody wants is [0, 0].
  const auto wanted = [](const Tensor& out) { return out.ndim() != 2 || out.size(0) > 0; };
  if (wanted(to_x)) product(own, false, columns, true, nullptr, check_matrix(to_x, own.count, rows.width, op, "to_x"));
  if (wanted(to_weight))
    product(own, true, rows, true, nullptr, check_matrix(to_weight, own.width, rows.width, op, "to_weight"));
}

}  // namespace hubert_ecg
#endif
