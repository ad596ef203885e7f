// What ops on rows share: checks, and sums over rows that do not depend on how threads share them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace hubert_ecg {

// x is contiguous [N, D]; returns N.
template <class T>
int64_t check_rows(const Tensor& x, const char* op) {
  HUBERT_ECG_CHECK(x.is<T>() && x.contiguous() && x.ndim() == 2, op,
                   ": x must be contiguous floating point [N, D], got ", x);
  return x.size(0);
}

template <class T>
void check_like(const Tensor& x, const Tensor& like, const char* op, const char* name) {
  HUBERT_ECG_CHECK(
      x.is<T>() && x.contiguous() && x.ndim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1), op, ": ",
      name, " must have the shape of x, ", like, ", and the dtype that goes with it, got ", x);
}

template <class T>
void check_vector(const Tensor& x, int64_t size, const char* op, const char* name) {
  HUBERT_ECG_CHECK(x.is<T>() && x.contiguous() && x.ndim() == 1 && x.size(0) == size, op, ": ", name,
                   " must be contiguous [", size, "] of the dtype that x is computed in, got ", x);
}

inline const int64_t* check_seed(const Tensor& seed, const char* op) {
  HUBERT_ECG_CHECK(seed.is<int64_t>(), op, ": seed must be int64, got ", seed);
  return seed.data<int64_t>();
}

// Calls work(first, last, sums) for chunks of rows, `sums` being `width` zeros of the chunk; adds these up in order.
template <class T, class Work>
void for_rows(int64_t rows, int64_t width, T* total, const Work& work) {
  const int64_t chunk = std::max<int64_t>(16, (rows + 255) / 256), chunks = (rows + chunk - 1) / chunk;
  std::vector<T> sums(chunks * width, T(0));
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < chunks; ++c) work(c * chunk, std::min(rows, (c + 1) * chunk), sums.data() + c * width);
  std::fill(total, total + width, T(0));
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < width; ++i) total[i] += sums[c * width + i];
}

}  // namespace hubert_ecg
