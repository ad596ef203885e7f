#include <algorithm>

#include "deltas.h"
#include "launch.h"

namespace hubert_ecg {
namespace {

// One thread to a number.
template <class T>
__global__ void deltas_kernel(const T* x, const int64_t* ends, T* out, int64_t B, int64_t F, int64_t D, int64_t L,
                              int64_t reach, T scale) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < B * F * D; at += stride) {
    const int64_t f = at / D % F;
    int64_t begin = 0, end = F;
    for (int64_t l = 0; l < L; ++l) {
      if (ends[l] <= f) {
        begin = ends[l];
      } else {
        end = ends[l] < F ? ends[l] : F;
        break;
      }
    }
    T sum = 0;
    for (int64_t k = 1; k <= reach; ++k) {
      const int64_t later = f + k < end ? f + k : end - 1, earlier = f - k > begin ? f - k : begin;
      sum += T(k) * (x[at + (later - f) * D] - x[at + (earlier - f) * D]);
    }
    out[at] = sum / scale;
  }
}

template <class T>
void run(const Tensor& x, const Tensor& ends, const Tensor& out, int64_t window, intptr_t stream) {
  check_deltas<T>(x, ends, out, window);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(2), reach = (window - 1) / 2;
  if (B * F * D == 0) return;
  const int64_t blocks = std::min<int64_t>((B * F * D + 255) / 256, 1 << 16);
  HUBERT_ECG_LAUNCH(deltas_kernel<T>, static_cast<unsigned>(blocks), 256u, 0u, stream, x.data<T>(),
                    ends.data<int64_t>(), out.data<T>(), B, F, D, ends.size(0), reach,
                    static_cast<T>(delta_scale(reach)));
  check_cuda("deltas", cudaGetLastError());
}

}  // namespace

void deltas_cuda(Tensor x, Tensor ends, Tensor out, int64_t window, intptr_t stream) {
  x.is<double>() ? run<double>(x, ends, out, window, stream) : run<float>(x, ends, out, window, stream);
}

}  // namespace hubert_ecg
