#if defined(__x86_64__)
// Headers come before the pragma: what they define inline must stay generic, because the linker
// keeps one copy of it for all instruction sets.
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"
#include "scratch.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define MULTIEXIT_AVX512
#define ISA_NAMESPACE avx512
#include "kernels.inl"

namespace multiexit::cpu {

const Kernels& avx512_kernels() { return avx512::table; }

}  // namespace multiexit::cpu

#endif
