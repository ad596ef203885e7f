#include "published.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "rows.h"

namespace hubert_ecg {
namespace {

#define HUBERT_ECG_SIMD_FILE "published_simd.h"
#include "every_isa.h"

// What a lead is divided by where it does not change at all.
constexpr double kLeast = std::numeric_limits<double>::min();

template <class T>
void rings(const Tensor& x, int64_t memory, const Tensor& ring, double* low, double* extent) {
  const int64_t L = check_rows<T>(x, "published_ring"), n = x.size(1), size = ring.size(1);
  for (int64_t l = 0; l < L; ++l) {
    const T* const lead = x.data<T>() + l * n;
    double* const to = ring.data<double>() + l * size;
    T least, most;
    const bool finite = HUBERT_ECG_BEST(extremes<T>)(lead, n, &least, &most);
    low[l] = least, extent[l] = finite ? double(most) - double(least) : std::nan("");
    if (!std::isfinite(extent[l])) {
      std::fill(to, to + size, 0.0);
      continue;
    }
    HUBERT_ECG_BEST(shifted<T>)(lead, n, low[l], 1 / std::max(extent[l], kLeast), to);
    for (int64_t i = 1; i <= memory; ++i) {
      to[n - 1 + i] = 2 * to[n - 1] - to[n - 1 - i];
      to[size - i] = 2 * to[0] - to[i];
    }
    std::fill(to + n + memory, to + size - memory, to[0]);
  }
}

}  // namespace

void published_ring_cpu(Tensor x, int64_t memory, Tensor ring, Tensor low, Tensor extent) {
  const char* const op = "published_ring";
  HUBERT_ECG_CHECK(x.ndim() == 2 && memory >= 0 && memory < x.size(1), op, ": x must be [L, more than memory], got ", x,
                   " and memory ", memory);
  HUBERT_ECG_CHECK(ring.is<double>() && ring.contiguous() && ring.ndim() == 2 && ring.size(0) == x.size(0) &&
                       ring.size(1) >= x.size(1) + 2 * memory,
                   op, ": ring must be contiguous float64 [", x.size(0), ", at least ", x.size(1) + 2 * memory,
                   "], got ", ring);
  check_vector<double>(low, x.size(0), op, "low");
  check_vector<double>(extent, x.size(0), op, "extent");
  (x.is<double>() ? rings<double> : rings<float>)(x, memory, ring, low.data<double>(), extent.data<double>());
}

void published_scale_cpu(Tensor y, Tensor extent, Tensor out) {
  const char* const op = "published_scale";
  HUBERT_ECG_CHECK(y.is<float>() && y.ndim() == 2 && y.size(1) > 0 && (y.size(1) == 1 || y.stride(1) == 1), op,
                   ": y must be float32 [L, n] with rows without gaps, got ", y);
  const int64_t L = y.size(0), n = y.size(1);
  HUBERT_ECG_CHECK(out.is<float>() && out.contiguous() && out.ndim() == 2 && out.size(0) == L && out.size(1) <= n, op,
                   ": out must be contiguous float32 [", L, ", at most ", n, "], got ", out);
  check_vector<double>(extent, L, op, "extent");
  const int64_t num = out.size(1);
  for (int64_t l = 0; l < L; ++l) {
    const float* const lead = y.data<float>() + l * y.stride(0);
    const double unit = std::max(extent.data<double>()[l], kLeast);
    float low, high;
    HUBERT_ECG_BEST(extremes<float>)(lead, n, &low, &high);
    HUBERT_ECG_BEST(scaled)(lead, num, low, float(2 * unit / ((high - low) * unit + 1e-8)),
                            out.data<float>() + l * num);
  }
}

}  // namespace hubert_ecg
