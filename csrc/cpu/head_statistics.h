// Statistics of a vocabulary head's distributions without their logits in memory. See
// ops/heads.py for the contract.
#pragma once
#include <cstdint>

#include "dense.h"

namespace multiexit::cpu {

// Out, [rows] each.
struct HeadStatistics {
  int64_t* tokens;
  float* log_probs;
  float* second_log_probs;
  float* log_sum_exp;
  float* entropy;
};

void head_statistics(int threads, const float* hidden, int64_t rows, const Linear& head,
                     const HeadStatistics& out);

}  // namespace multiexit::cpu
