// Sums over the distributions of a head by 8-bit codes, but for the tokens that count most, whose
// logits are exact. See ops/rough_sums.py for the contract.
#pragma once
#include <cstdint>

#include "coded_tokens.h"

namespace multiexit::cpu {

// Out.
struct RoughSums {
  int64_t* tokens;  // [rows]
  double* numbers;  // [rows, kNumbers]

  static constexpr int64_t kNumbers = 10;
};

// `mean` is what the codes' rows lack, [columns]; weights are float32.
void rough_head_sums(int threads, const RoughRows& rows, const RoughHead& rough,
                     const Linear& head, const float* mean, const RoughSums& out);

}  // namespace multiexit::cpu
