// Tokens of a head by rough logits of 8-bit codes first. See ops/coded_tokens.py for the contract.
#pragma once
#include <cstdint>
#include <vector>

#include "heads.h"

namespace multiexit::cpu {

// Room for what `code_rows` finds of [rows, columns]; codes are padded to a multiple of 4 columns.
struct CodedOut {
  int64_t terms;   // 1, or 2
  uint8_t* codes;  // [rows, terms, padded columns]
  float* scales;   // [rows, terms]
  double* norms;
  double* errors;
};

// Codes of x, each column times its factor where there are some.
void code_rows(int threads, const float* x, const float* factors, int64_t rows, int64_t columns,
               const CodedOut& out);

// Rows as they are, and in codes. The logit of a row and a token is rough by no more than the row's
// reach times the token's error, plus the row's slack.
struct RoughRows {
  const float* hidden;  // [rows, columns]
  CodedRows codes;      // [rows, terms]
  int64_t terms;
  const float* reaches;
  const double* slacks;
  int64_t rows;

  RoughRows from(int64_t row, int64_t count, int64_t columns, int64_t coded_columns) const {
    return {hidden + row * columns, codes.from(row * terms, coded_columns),
            terms, reaches + row, slacks + row, count};
  }
};

struct RoughHead {
  CodedMatrix codes;
  const float* errors;  // [padded rows]
  CodedMatrix finer = {};  // what is to be added to the codes, if there are any
};

// The tokens of `shared_head_tokens`; -1 where the codes leave it open. Log-probabilities are not
// written.
void coded_head_tokens(int threads, const RoughRows& rows, const RoughHead& rough,
                       const Linear& head, const std::vector<LowerHead>& lowers,
                       const Choice& choice);

}  // namespace multiexit::cpu
