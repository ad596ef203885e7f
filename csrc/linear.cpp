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
  using Pack = void (*)(const void* matrix, int64_t row_step, int64_t depth_step, int64_t rows, int64_t depth,
                        float* units, int32_t* pairs);
  int columns;
  Pack pack_rows, pack_columns;
  void (*multiply)(const int32_t* a, const float* a_units, const int32_t* b, const float* b_units, int64_t depth,
                   bool first, float* c, int64_t stride);
  void (*finish)(const float* c, const float* bias, int64_t n, void* out);
};

#define HUBERT_ECG_SIMD_FILE "linear_simd.h"
#include "every_isa.h"

const Kernels& kernels_of(const Tensor& x) {
  if (x.is<float>()) return HUBERT_ECG_BEST(kernels<float>);
  return x.is<BFloat16>() ? HUBERT_ECG_BEST(kernels<BFloat16>) : HUBERT_ECG_BEST(kernels<Float16>);
}

int64_t element(const Tensor& x) { return x.is<float>() ? 4 : 2; }

// A matrix of `rows` of `depth` numbers, or the transpose of one, rounded.
class Rounded {
 public:
  Rounded(const Tensor& x, bool transposed, int64_t panel, Kernels::Pack pack)
      : rows_((x.size(transposed) + panel - 1) / panel * panel),
        depth_(x.size(!transposed)),
        units_(new float[std::max<int64_t>(1, chunks() * rows_)]),
        pairs_(new CacheLine[(rows_ * ((depth_ + 1) / 2 + chunks()) * 4) / 64 + 1]) {
    const int64_t rows = x.size(transposed), panels = rows_ / panel, step = transposed ? 1 : depth_;
    const int64_t depth_step = transposed ? rows : 1;
#pragma omp parallel for schedule(static) if (rows * depth_ > 65536)
    for (int64_t unit = 0; unit < panels * chunks(); ++unit) {
      const int64_t chunk = unit / panels, first = unit % panels * panel;
      const char* const from = x.data<char>() + (first * step + chunk * kDepth * depth_step) * element(x);
      pack(from, step, depth_step, std::min(panel, rows - first), depth(chunk), units(chunk, first),
           pairs(chunk, first));
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
void product(const Tensor& a, bool a_transposed, const Tensor& b, bool b_transposed, const float* bias,
             const Tensor& out) {
  const int64_t M = out.size(0), N = out.size(1), depth = a.size(!a_transposed);
  if (M == 0 || N == 0) return;
  const Kernels& run = kernels_of(out);
  const int64_t columns = run.columns;
  const Rounded left(a, a_transposed, kRows, kernels_of(a).pack_rows);
  const Rounded right(b, b_transposed, columns, kernels_of(b).pack_columns);
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
      for (int64_t i = i0; i < i1; ++i)
        run.finish(c + (i - i0) * kBlockColumns, bias ? bias + j0 : nullptr, j1 - j0,
                   out.data<char>() + (i * N + j0) * element(out));
    }
  }
}

void check_matrix(const Tensor& x, int64_t rows, int64_t columns, const char* op, const char* name) {
  HUBERT_ECG_CHECK(x.ndim() == 2 && x.contiguous() && (x.is<float>() || x.is<Float16>() || x.is<BFloat16>()) &&
                       (rows < 0 || x.size(0) == rows) && (columns < 0 || x.size(1) == columns),
                   op, ": ", name,
                   " must be a contiguous matrix of float32, float16 or bfloat16 that fits the others, got ", x);
}

}  // namespace

void linear_cpu(Tensor x, Tensor weight, Tensor bias, Tensor y) {
  check_matrix(x, -1, -1, "linear", "x");
  check_matrix(weight, -1, x.size(1), "linear", "weight");
  check_matrix(y, x.size(0), weight.size(0), "linear", "y");
  HUBERT_ECG_CHECK(bias.is<float>() && bias.contiguous() && bias.ndim() == 1 &&
                       (bias.size(0) == 0 || bias.size(0) == weight.size(0)),
                   "linear: bias must be float32 [", weight.size(0), "] or [0], got ", bias);
  product(x, false, weight, false, bias.size(0) ? bias.data<float>() : nullptr, y);
}

void linear_backward_cpu(Tensor grad, Tensor x, Tensor weight, Tensor to_x, Tensor to_weight) {
  check_matrix(grad, -1, -1, "linear_backward", "grad");
  check_matrix(x, grad.size(0), -1, "linear_backward", "x");
  check_matrix(weight, grad.size(1), x.size(1), "linear_backward", "weight");
  // What nobody wants is [0, 0].
  const auto wanted = [](const Tensor& out, const Tensor& like, const char* name) {
    const bool any = out.ndim() != 2 || out.size(0) > 0;
    if (any) check_matrix(out, like.size(0), like.size(1), "linear_backward", name);
    return any;
  };
  const bool with_x = wanted(to_x, x, "to_x"), with_weight = wanted(to_weight, weight, "to_weight");
  if (with_x) product(grad, false, weight, true, nullptr, to_x);
  if (with_weight) product(grad, true, x, true, nullptr, to_weight);
}

}  // namespace hubert_ecg
#endif
