// The inner loops of kmeans.cpp for one instruction set; every_isa.h includes them once for each.
// Explicit vector types, because the tile has to stay in registers and the auto-vectorizer does not keep it there.
namespace HUBERT_ECG_ISA {

typedef float F __attribute__((vector_size(HUBERT_ECG_BYTES)));
typedef int32_t I __attribute__((vector_size(HUBERT_ECG_BYTES)));
typedef float FU __attribute__((vector_size(HUBERT_ECG_BYTES), aligned(4), may_alias));
typedef int32_t IU __attribute__((vector_size(HUBERT_ECG_BYTES), aligned(4), may_alias));
typedef double D __attribute__((vector_size(HUBERT_ECG_BYTES)));
typedef int64_t L __attribute__((vector_size(HUBERT_ECG_BYTES)));
typedef double DU __attribute__((vector_size(HUBERT_ECG_BYTES), aligned(8), may_alias));
typedef int64_t LU __attribute__((vector_size(HUBERT_ECG_BYTES), aligned(8), may_alias));

// Centroids in a register tile: 2 * kRows + 4 vector registers are in use, out of 16 or 32.
#if HUBERT_ECG_BYTES == 64 || defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kF = HUBERT_ECG_BYTES / 4;
constexpr int kD = HUBERT_ECG_BYTES / 8;

// Copies `count` points, less `shift`, to x [dim][2 * kF] and their squared lengths to squares [2 * kF]; the rest is 0.
HUBERT_ECG_TARGET static void pack(const float* points, int64_t count, int64_t dim, const float* shift, float* x,
                                   float* squares) {
  for (int64_t l = 0; l < 2 * kF; ++l) {
    const float* const point = points + l * dim;
    for (int64_t d = 0; d < dim; ++d) x[d * 2 * kF + l] = l < count ? point[d] - shift[d] : 0.0f;
  }
  F sum0 = F{}, sum1 = F{};
  for (int64_t d = 0; d < dim; ++d) {
    const F x0 = *(const FU*)(x + d * 2 * kF), x1 = *(const FU*)(x + d * 2 * kF + kF);
    sum0 += x0 * x0;
    sum1 += x1 * x1;
  }
  *(FU*)squares = sum0, *(FU*)(squares + kF) = sum1;
}

// Takes the scores of kRows centroids, from number k on, into the lowest, the second lowest and the number of the
// lowest.
HUBERT_ECG_TARGET static inline __attribute__((always_inline)) void update(const F* scores, int64_t k, F& low, F& next,
                                                                           I& at) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const I less = scores[r] < low;
    const F high = less ? low : scores[r];
    next = high < next ? high : next;
    low = less ? scores[r] : low;
    at = less ? int32_t(k) + r + I{} : at;
  }
}

// Lowest and second lowest score of 2 * kF points over num_k centroids; a score is |c|^2 / 2 - x.c.
//   x [dim][2 * kF]; c [num_k / kRows][dim][kRows]; half [num_k]; best, second, arg [2 * kF] (updated)
HUBERT_ECG_TARGET static void score(const float* x, int64_t dim, const float* c, const float* half, int64_t first_k,
                                    int64_t num_k, float* best, float* second, int32_t* arg) {
  F low0 = *(const FU*)best, low1 = *(const FU*)(best + kF);
  F next0 = *(const FU*)second, next1 = *(const FU*)(second + kF);
  I at0 = *(const IU*)arg, at1 = *(const IU*)(arg + kF);
  for (int64_t k = 0; k < num_k; k += kRows, c += kRows * dim) {
    F acc0[kRows], acc1[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc0[r] = acc1[r] = half[k + r] + F{};
    for (int64_t d = 0; d < dim; ++d) {
      const F x0 = *(const FU*)(x + d * 2 * kF), x1 = *(const FU*)(x + d * 2 * kF + kF);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        acc0[r] -= c[d * kRows + r] * x0;
        acc1[r] -= c[d * kRows + r] * x1;
      }
    }
    update(acc0, first_k + k, low0, next0, at0);
    update(acc1, first_k + k, low1, next1, at1);
  }
  *(FU*)best = low0, *(FU*)(best + kF) = low1;
  *(FU*)second = next0, *(FU*)(second + kF) = next1;
  *(IU*)arg = at0, *(IU*)(arg + kF) = at1;
}

// The nearest of num_k centroids to 2 * kD points, by squared differences in float64.
//   x [dim][2 * kD]; c [num_k / kRows][dim][kRows]; arg [2 * kD] (written)
HUBERT_ECG_TARGET static void nearest(const double* x, int64_t dim, const double* c, int64_t num_k, int64_t* arg) {
  D low0 = INFINITY + D{}, low1 = low0;
  L at0 = L{}, at1 = L{};
  for (int64_t k = 0; k < num_k; k += kRows, c += kRows * dim) {
    D acc0[kRows], acc1[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc0[r] = acc1[r] = D{};
    for (int64_t d = 0; d < dim; ++d) {
      const D x0 = *(const DU*)(x + d * 2 * kD), x1 = *(const DU*)(x + d * 2 * kD + kD);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const D delta0 = x0 - c[d * kRows + r], delta1 = x1 - c[d * kRows + r];
        acc0[r] += delta0 * delta0;
        acc1[r] += delta1 * delta1;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const L less0 = acc0[r] < low0, less1 = acc1[r] < low1;
      low0 = less0 ? acc0[r] : low0;
      low1 = less1 ? acc1[r] : low1;
      at0 = less0 ? k + r + L{} : at0;
      at1 = less1 ? k + r + L{} : at1;
    }
  }
  *(LU*)arg = at0, *(LU*)(arg + kD) = at1;
}

// Adds n points to the sums and counts of their clusters.
template <class T>
HUBERT_ECG_TARGET static void add(const T* x, const int64_t* labels, int64_t n, int64_t dim, int64_t num_k,
                                  double* sums, int64_t* counts) {
  for (int64_t i = 0; i < n; ++i, x += dim) {
    const int64_t k = labels[i];
    if (k < 0 || k >= num_k) continue;
    double* __restrict sum = sums + k * dim;
    for (int64_t d = 0; d < dim; ++d) sum[d] += double(x[d]);
    ++counts[k];
  }
}

const Kernels kernels = {kRows, 2 * kF, 2 * kD, pack, score, nearest, add<float>, add<double>};

}  // namespace HUBERT_ECG_ISA
