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

// `lower` becomes the logarithms of the ratios, up to one number for all; count > 0.
inline void to_ratios(const float* upper, float* lower, int64_t count) {
  for (int64_t i = 0; i < count; ++i) lower[i] = upper[i] - lower[i];
  const float best = largest_of(lower, count);
  if (!std::isinf(best)) return;
  for (int64_t i = 0; i < count; ++i) lower[i] = lower[i] == best ? upper[i] : -INFINITY;
}

// What makes these ratios logits beside those of all other tokens: plausible ones share their mass.
inline double shift_of_ratios(const float* upper, const float* ratios, int64_t count) {
  const double top = largest_of(ratios, count), greatest = largest_of(upper, count);
  double sum = 0.0, mass = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    sum += std::exp(ratios[i] - top);
    mass += std::exp(upper[i] - greatest);
  }
  return (greatest + std::log(mass)) - (top + std::log(sum));
}

// Least logit of a plausible token where one is enough.
inline float plausible_from(float greatest, float alpha) {
  return greatest + std::log(std::min(std::max(alpha, 0.0f), 1.0f));
}

}  // namespace multiexit::cpu
