// Kernels with one mistake each, that the emulator has to find: the argument says which.
#include <cstdio>
#include <cstdlib>

#include "launch.h"

__global__ void mistake(int which, float* out) {
  HUBERT_ECG_SHARED(float, shared);
  const int t = threadIdx.x;
  if (which == 0) {  // a barrier that half of the threads reach
    if (t < 32) __syncthreads();
  } else if (which == 1) {  // no barrier between a write and another thread's read
    shared[t] = float(t);
    out[t] = shared[63 - t];
  } else if (which == 2) {  // a shuffle that half of the warp takes part in
    if (t % 2) out[t] = __shfl_xor_sync(0xffffffffu, float(t), 1);
  } else if (which == 3) {  // a shuffle from a lane that the mask leaves out
    if (t < 16) out[t] = __shfl_xor_sync(0xffffu, float(t), 16);
  } else if (which == 4) {  // one element beyond the shared memory
    shared[t + 1] = float(t);
  } else if (which == 5) {  // no wait between an asynchronous copy and its reader
    __pipeline_memcpy_async(shared + t, out + t, 4);
    __pipeline_commit();
    out[t] = shared[t];
  } else if (which == 6) {  // a tile of a tensor-core product that begins anywhere
    using namespace nvcuda::wmma;
    fragment<accumulator, 16, 16, 16, float> tile;
    fill_fragment(tile, 0.0f);
    store_matrix_sync(shared + 1, tile, 16, mem_row_major);
  } else {  // none
    shared[t] = float(t);
    __syncthreads();
    out[t] = shared[63 - t] + __shfl_xor_sync(0xffffffffu, 0.0f, 1);
  }
}

int main(int, char** argv) {
  float out[64] = {};
  try {
    HUBERT_ECG_LAUNCH(mistake, 1, 64, 64 * sizeof(float), 0, std::atoi(argv[1]), out);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 0;
  }
  for (int t = 0; t < 64; ++t)
    if (out[t] != 63 - t) {
      std::printf("wrong\n");
      return 0;
    }
  std::printf("right\n");
}
