// Runs every kernel of every instruction set on buffers of exactly the size that it may touch, so
// that AddressSanitizer and UBSan see each step too far. Values are held against plain loops.
#include <cstdio>
#include <cstdlib>

#include "tests/kernels/tests.h"

using namespace multiexit::cpu;

int main() {
  for (const char* isa : {"scalar", "avx2", "avx512", "avx512bf16"}) {
    if (!choose_isa(isa)) continue;
    products();
    gathered_products();
    for (int bits : {8, 4})
      for (int64_t group_size : {32, 64}) quantized_products(bits, group_size);
    floats_of_8_bits();
    conversions();
    for (int64_t head_dim : {1, 6, 16, 70})
      for (int64_t window : {0, 2})
        for (bool is_gated : {false, true})
          for (bool is_bart : {false, true}) blocks(is_gated, is_bart, head_dim, window);
    for (int64_t group : {1, 3})
      for (int64_t window : {0, 1, 150}) {
        attention(1, 1, window, group, 7);
        attention(3, 129, window, group, 80);
        attention(70, 300, window, group, 18);
        for (int64_t reach : {1, 30, 500}) attention(70, 300, window, group, 18, reach);
      }
    for (int64_t vocab : {1, 7, 513, 1031}) heads(vocab);
    for (int64_t head_dim : {1, 6, 16, 20})
      for (bool is_bart : {false, true})
        for (bool is_gated : {false, true}) packed_texts(is_bart, is_gated, head_dim);
    for (int64_t vocab : {1, 16, 530, 2200})
      for (int64_t rows : {1, 12, 27}) coded_heads(vocab, rows, 36);
  }
  std::printf("%d failures\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
