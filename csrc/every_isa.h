// Includes HUBERT_ECG_SIMD_FILE once for each instruction set that this compiler can aim at, with
//   HUBERT_ECG_ISA     the namespace, one of the names in isa.h,
//   HUBERT_ECG_TARGET  the function attribute that switches the instructions on,
//   HUBERT_ECG_BYTES   the width of a vector register.
// Attributes instead of compiler flags: inline functions of the standard library, which the linker merges, stay
// baseline code.
#define HUBERT_ECG_ISA baseline
#define HUBERT_ECG_TARGET
#define HUBERT_ECG_BYTES 16
#include HUBERT_ECG_SIMD_FILE
#undef HUBERT_ECG_ISA
#undef HUBERT_ECG_TARGET
#undef HUBERT_ECG_BYTES

#ifdef __x86_64__
#define HUBERT_ECG_ISA avx2
#define HUBERT_ECG_TARGET __attribute__((target("avx2,fma")))
#define HUBERT_ECG_BYTES 32
#include HUBERT_ECG_SIMD_FILE
#undef HUBERT_ECG_ISA
#undef HUBERT_ECG_TARGET
#undef HUBERT_ECG_BYTES

#define HUBERT_ECG_ISA avx512
#define HUBERT_ECG_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma")))
#define HUBERT_ECG_BYTES 64
#include HUBERT_ECG_SIMD_FILE
#undef HUBERT_ECG_ISA
#undef HUBERT_ECG_TARGET
#undef HUBERT_ECG_BYTES
#endif
