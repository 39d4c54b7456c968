// All kernels of one instruction set; each kernels_<isa>.cpp compiles this file once.
#include "kernels.h"
#include "vec.h"

#include "product.inl"
#include "quantized.inl"
#include "gathered.inl"
#include "rows.inl"
#include "coded.inl"
#include "transpose.inl"
#include "attention.inl"
#include "distribution.inl"
#include "dola.inl"
#include "noise.inl"
#include "near.inl"
#include "packed.inl"

#define MULTIEXIT_NAME_(name) #name
#define MULTIEXIT_NAME(name) MULTIEXIT_NAME_(name)

namespace multiexit::cpu::ISA_NAMESPACE {

static const Kernels table = {
    MULTIEXIT_NAME(ISA_NAMESPACE),
    input_dtype,
    product,
    gathered_product,
    coded_product,
    code_row,
    sum_terms,
    sum_blocks,
    find_near,
    find_noisy_near,
    to_float,
    from_float,
    add,
    layer_norm,
    rms_norm,
    activate,
    rotate,
    attend,
    unite,
    normalise_part,
    statistics,
    distribution,
    exp_sums,
    divergence,
    noisy_best,
    sum,
    softmax,
    mix,
};

}  // namespace multiexit::cpu::ISA_NAMESPACE
