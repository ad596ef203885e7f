#include "kmeans.h"
#include <cuda_runtime.h>
namespace hubert_ecg {
namespace {
__global__ void assign(const float* x, const float* c, int64_t* labels, int64_t n, int64_t k, int64_t d) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  float best = INFINITY; int64_t arg = 0;
  for (int64_t j = 0; j < k; ++j) { float s = 0.f; for (int64_t t = 0; t < d; ++t) { const float v = x[i*d+t]-c[j*d+t]; s += v*v; } if (s < best) { best = s; arg = j; } }
  labels[i] = arg;
}
}  // namespace
void kmeans_assign_cuda(Tensor x, Tensor centroids, Tensor labels, intptr_t stream) {
  check_kmeans_assign(x, centroids, labels);
  const int64_t n = x.size(0);
  if (n == 0) return;
  assign<<<(n + 255) / 256, 256, 0, reinterpret_cast<cudaStream_t>(stream)>>>(x.data<float>(), centroids.data<float>(), labels.data<int64_t>(), n, centroids.size(0), x.size(1));
  const cudaError_t e = cudaGetLastError();
  if (e != cudaSuccess) throw std::runtime_error(std::string("kmeans_assign: ") + cudaGetErrorString(e));
}
}  // namespace hubert_ecg
