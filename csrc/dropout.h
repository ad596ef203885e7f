// Which elements dropout keeps, by their place and a seed: the definition is that of hubert_ecg/ops/_dropout.py.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HUBERT_ECG_ANYWHERE __host__ __device__ __forceinline__
#else
#define HUBERT_ECG_ANYWHERE inline __attribute__((always_inline))
#endif

namespace hubert_ecg {

HUBERT_ECG_ANYWHERE uint32_t dropout_mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x21F0AAADu;
  h ^= h >> 15;
  h *= 0xD35A2D97u;
  return h ^ h >> 15;
}

struct DropoutKeys {
  uint32_t k0, k1;

  HUBERT_ECG_ANYWHERE explicit DropoutKeys(uint64_t seed)
      : k0(dropout_mix(uint32_t(seed) ^ 0x9E3779B9u)),
        k1(dropout_mix(uint32_t(seed >> 32) + dropout_mix(k0 ^ 0x85EBCA6Bu))) {}

  // Of an element's index: what its upper half adds, and its bits, kept where they reach the threshold.
  HUBERT_ECG_ANYWHERE uint32_t upper(uint32_t high) const { return k1 ^ high * 0x9E3779B9u; }
  HUBERT_ECG_ANYWHERE uint32_t bits(uint32_t low, uint32_t upper) const {
    return dropout_mix(dropout_mix(low ^ k0) + upper);
  }
};

inline uint32_t dropout_threshold(double p) {
  const double most = 4294967295.0, found = std::floor(p * 4294967296.0 + 0.5);
  return uint32_t(found < most ? found : most);
}
inline double dropout_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }

}  // namespace hubert_ecg
