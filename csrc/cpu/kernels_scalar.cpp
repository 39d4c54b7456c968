#include <cstdint>

#include "scratch.h"

#define ISA_NAMESPACE scalar
#include "kernels.inl"

namespace multiexit::cpu {

const Kernels& scalar_kernels() { return scalar::table; }

}  // namespace multiexit::cpu
