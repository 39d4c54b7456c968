#if defined(__x86_64__)
// Headers come before the pragma: what they define inline must stay generic, because the linker
// keeps one copy of it for all instruction sets.
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"
#include "scratch.h"

#pragma GCC target("avx2,fma,f16c")
#define MULTIEXIT_AVX2
#define ISA_NAMESPACE avx2
#include "kernels.inl"

namespace multiexit::cpu {

const Kernels& avx2_kernels() { return avx2::table; }

}  // namespace multiexit::cpu

#endif
