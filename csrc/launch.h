// How a kernel is launched: <<<>>> under nvcc, a plain function call where a host build emulates the device.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <mma.h>

#define HUBERT_ECG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Dynamic shared memory as an array of T. The raw array has one name and one type in every kernel, as the language
// wants.
#define HUBERT_ECG_SHARED(T, name)                            \
  extern __shared__ __align__(32) unsigned char shared_raw[]; \
  T* const name = reinterpret_cast<T*>(shared_raw)

namespace hubert_ecg {

// Reaches Python as RuntimeError.
inline void check_cuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

// Multiprocessors of the current device: how many blocks a grid that stays needs.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  check_cuda("cudaGetDevice", cudaGetDevice(&device));
  check_cuda("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// The most dynamic shared memory that a block may ask for, in bytes.
inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda("cudaGetDevice", cudaGetDevice(&device));
  check_cuda("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// A block gets more than 48 KiB of shared memory only when the kernel has asked for it.
template <class Kernel>
void allow_shared(const char* op, Kernel* kernel, size_t bytes) {
  if (bytes > (48 << 10))
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

}  // namespace hubert_ecg
#else
// The emulator brings the same names, and those of CUDA that the kernels use.
#include "cuda_on_host.h"
#endif
