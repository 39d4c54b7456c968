// The chance that a row passes an exit's test. See ops/gate_odds.py for the contract.
#pragma once
#include <cstdint>

#include "dense.h"

namespace multiexit::cpu {

// What rows have to pass.
struct GateThresholds {
  const float* values;  // [rows]
  const bool* by_entropy;
};

void gate_odds(int threads, const float* normed, int64_t rows, const Linear& up,
               const Linear& down, const GateThresholds& thresholds, float* out);

}  // namespace multiexit::cpu
