// The inner loop of gather.cpp for one instruction set; every_isa.h includes it once for each.
#include "halves_simd.h"

namespace HUBERT_ECG_ISA {

template <class T>
HUBERT_ECG_TARGET static void scaled(const T* from, int64_t count, float scale, float* to) {
  for (int64_t t = 0; t < count; ++t) to[t] = widen(from[t]) * scale;
}

}  // namespace HUBERT_ECG_ISA
