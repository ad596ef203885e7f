// Which instruction set runs: the inner loops of <stem>.cpp lie in <stem>_simd.h and are compiled once for each.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>
#include <type_traits>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace hubert_ecg {

enum class Isa { baseline, avx2, avx512 };

// The widest instruction set of this processor; avx512 is that of servers since 2019, with products of int16 and
// of bytes that are added as they are made. HUBERT_ECG_ISA=baseline|avx2 asks for a narrower one, to compare.
inline Isa best_isa() {
#ifdef __x86_64__
  const char* const wish = std::getenv("HUBERT_ECG_ISA");
  const std::string most = wish ? wish : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && most == "avx512") return Isa::avx512;
  if (avx2 && most != "baseline") return Isa::avx2;
#endif
  return Isa::baseline;
}

// The version of a function that best_isa() names.
#ifdef __x86_64__
#define HUBERT_ECG_BEST(...)                       \
  (best_isa() == Isa::avx512 ? avx512::__VA_ARGS__ \
   : best_isa() == Isa::avx2 ? avx2::__VA_ARGS__   \
                             : baseline::__VA_ARGS__)
#else
#define HUBERT_ECG_BEST(...) baseline::__VA_ARGS__
#endif

// An integer as wide as T.
template <class T>
using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

}  // namespace hubert_ecg
