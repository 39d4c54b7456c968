// What the tests of kernels share: numbers, expectations, and the list of the tests themselves.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/kernels.h"

namespace multiexit::cpu {

inline int failures = 0;

inline void expect_near(double actual, double expected, const char* what) {
  if (std::abs(actual - expected) <= 1e-4 * (1 + std::abs(expected))) return;
  std::printf("%s, %s: %g, expected %g\n", kernels().name, what, actual, expected);
  ++failures;
}

inline void expect_equal(float actual, float expected, const char* what) {
  if (actual == expected) return;
  std::printf("%s, %s: %.9g, expected %.9g\n", kernels().name, what, actual, expected);
  ++failures;
}

inline std::vector<float> numbers(int64_t count, float scale = 1.0f) {
  static uint32_t state = 1;
  std::vector<float> out(count);
  for (float& x : out) {
    state = state * 1664525u + 1013904223u;
    x = scale * (static_cast<float>(state >> 8) / (1 << 23) - 1.0f);
  }
  return out;
}

void products();
void gathered_products();
void quantized_products(int bits, int64_t group_size);
void floats_of_8_bits();
void conversions();
void blocks(bool is_gated, bool is_bart, int64_t head_dim, int64_t window);
void packed_texts(bool is_bart, bool is_gated, int64_t head_dim);
void attention(int64_t tokens, int64_t context, int64_t window, int64_t group, int64_t head_dim,
               int64_t reach = 0);
void heads(int64_t vocab);
void coded_heads(int64_t vocab, int64_t rows, int64_t columns);

}  // namespace multiexit::cpu
