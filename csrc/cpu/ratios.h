// What decides between the plausible tokens of a contrast.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace multiexit::cpu {

// NaN if one is among them.
inline float largest_of(const float* x, int64_t count) {
  float best = x[0];
  for (int64_t i = 1; i < count; ++i)
    if (x[i] > best || x[i] != x[i]) best = x[i];
  return best;
}

// `lower` becomes the logarithms of the ratios, up to one number for all; returns the place of the
// greatest one, of equals the first. count > 0.
inline int64_t to_ratios(const float* upper, float* lower, int64_t count) {
  for (int64_t i = 0; i < count; ++i) lower[i] = upper[i] - lower[i];
  const float best = largest_of(lower, count);
  if (std::isinf(best))
    for (int64_t i = 0; i < count; ++i) lower[i] = lower[i] == best ? upper[i] : -INFINITY;
  int64_t found = 0;
  for (int64_t i = 1; i < count; ++i)
    if (lower[i] > lower[found]) found = i;
  return found;
}

// Least logit of a plausible token where one is enough.
inline float plausible_from(float greatest, float alpha) {
  return greatest + std::log(std::min(std::max(alpha, 0.0f), 1.0f));
}

}  // namespace multiexit::cpu
