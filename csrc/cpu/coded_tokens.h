// The best tokens of a head, by rough logits of 8-bit codes first. See ops/coded_heads.py for the
// contract.
#pragma once
#include <cstdint>

#include "dense.h"

namespace multiexit::cpu {

// Room for what `code_rows` finds of [rows, columns]; codes are padded to a multiple of 4 columns.
struct CodedOut {
  uint8_t* codes;
  float* scales;
  double* norms;
  double* errors;
};

void code_rows(int threads, const float* x, int64_t rows, int64_t columns, const CodedOut& out);

// Rows as they are, and in codes whose logits are each within `errors` of those of the head.
struct RoughRows {
  const float* hidden;  // [rows, columns]
  CodedRows codes;
  const double* errors;
  int64_t rows;
};

// tokens[row]: of equals the lowest; -1 where the codes leave it open.
void coded_head_tokens(int threads, const RoughRows& rows, const CodedMatrix& rough,
                       const Linear& head, int64_t* tokens);

}  // namespace multiexit::cpu
