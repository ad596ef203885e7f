// How a kernel is launched: <<<>>> under nvcc, a plain function call where a host build emulates the device.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define HUBERT_ECG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Dynamic shared memory as an array of T. The raw array has one name and one type in every kernel, as the language
// wants.
#define HUBERT_ECG_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char shared_raw[]; \
  T* const name = reinterpret_cast<T*>(shared_raw)

namespace hubert_ecg {

// Reaches Python as RuntimeError.
inline void check_cuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

}  // namespace hubert_ecg
#else
// The emulator brings dim3, threadIdx, __global__, __shared__, HUBERT_ECG_LAUNCH, HUBERT_ECG_SHARED and check_cuda.
#include "cuda_on_host.h"
#endif
