#include "kmeans.h"
#include <limits>
namespace hubert_ecg {
void kmeans_assign_cpu(Tensor x, Tensor centroids, Tensor labels) {
  check_kmeans_assign(x, centroids, labels);
  const int64_t n = x.size(0), d = x.size(1), k = centroids.size(0);
  const float *px = x.data<float>(), *pc = centroids.data<float>();
  int64_t* out = labels.data<int64_t>();
#pragma omp parallel for if (n > 256)
  for (int64_t i = 0; i < n; ++i) {
    float best = std::numeric_limits<float>::infinity();
    int64_t arg = 0;
    for (int64_t j = 0; j < k; ++j) {
      float s = 0.f;
      for (int64_t t = 0; t < d; ++t) { const float v = px[i * d + t] - pc[j * d + t]; s += v * v; }
      if (s < best) { best = s; arg = j; }
    }
    out[i] = arg;
  }
}
}  // namespace hubert_ecg
