#pragma once
#include "tensor.h"
namespace hubert_ecg {
// labels[i] = argmin_k |x[i] - centroids[k]|^2, the lowest k on a tie.
//   x [N, D] float32, centroids [K, D] float32, labels [N] int64 (written)
void kmeans_assign_cpu(Tensor x, Tensor centroids, Tensor labels);
void kmeans_assign_cuda(Tensor x, Tensor centroids, Tensor labels, intptr_t stream);

inline void check_kmeans_assign(Tensor x, Tensor c, Tensor labels) {
  HUBERT_ECG_CHECK(x.ndim() == 2 && x.is<float>() && x.contiguous(), "kmeans_assign: x must be a contiguous float32 [N, D], got ", x);
  HUBERT_ECG_CHECK(c.ndim() == 2 && c.is<float>() && c.contiguous() && c.size(1) == x.size(1), "kmeans_assign: centroids must be a contiguous float32 [K, ", x.size(1), "], got ", c);
  HUBERT_ECG_CHECK(labels.ndim() == 1 && labels.is<int64_t>() && labels.size(0) == x.size(0), "kmeans_assign: labels must be int64 [", x.size(0), "], got ", labels);
}
}  // namespace hubert_ecg
