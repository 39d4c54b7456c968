#if defined(__x86_64__)
// Headers come before the pragma: what they define inline must stay generic, because the linker
// keeps one copy of it for all instruction sets.
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"
#include "scratch.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")
#define MULTIEXIT_AVX512
#define MULTIEXIT_AVX512BF16
#define ISA_NAMESPACE avx512bf16
#include "kernels.inl"

namespace multiexit::cpu {

const Kernels& avx512bf16_kernels() { return avx512bf16::table; }

}  // namespace multiexit::cpu

#endif
