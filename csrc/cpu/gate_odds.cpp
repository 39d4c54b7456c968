#include "gate_odds.h"

#include <cmath>

namespace multiexit::cpu {

namespace {

// Rows that a thread takes at once.
constexpr int64_t kRows = 16;
constexpr int64_t kOutputs = 4;

}  // namespace

void gate_odds(int threads, const float* normed, int64_t rows, const Linear& up,
               const Linear& down, const GateThresholds& thresholds, float* out) {
  const Kernels& k = kernels();
  const int64_t units = up.weight.rows;
  in_chunks(threads, rows, kRows, [&](int64_t first, int64_t count, int) {
    float* inner = Scratch::of_this_thread().room(Scratch::kWide, kRows * units);
    float outputs[kRows * kOutputs];
    k.product(normed + first * up.weight.columns, count, up.weight, 0, units, up.bias, inner,
              units);
    k.activate(inner, nullptr, Activation::kRelu, count * units);
    k.product(inner, count, down.weight, 0, kOutputs, down.bias, outputs, kOutputs);
    for (int64_t i = 0; i < count; ++i) {
      const bool by_entropy = thresholds.by_entropy[first + i];
      const float* own = outputs + i * kOutputs + by_entropy;
      const float above = (own[0] - thresholds.values[first + i]) * std::exp(-own[2]);
      out[first + i] = by_entropy ? -above : above;
    }
  });
}

}  // namespace multiexit::cpu
