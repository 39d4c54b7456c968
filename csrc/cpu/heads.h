// Vocabulary heads, their contrast, and the choice of tokens. See ops/heads.py, contrast.py and
// tokens.py for the contracts.
#pragma once
#include <cstdint>
#include <vector>

#include "dense.h"

namespace multiexit::cpu {

// One row for each token of the step.
struct Choice {
  const float* temperature;  // 0 is greedy
  const int64_t* seeds;
  const int64_t* positions;
  int64_t* tokens;          // out
  float* log_probs;         // out
  int32_t* num_candidates;  // out, or null: plausible tokens of a contrast, 0 without one
};

// Rows of an upper head, from `first` on, that are contrasted with one lower head.
struct LowerHead {
  int64_t first;
  int64_t count;
  const float* hidden;  // [count, columns]
  Linear head;
  const float* alpha;    // [count]
  const int64_t* least;  // [count] sizes of the plausible sets, or null for 1

  int64_t row(int64_t place) const { return first + place; }
};

// Two heads for the same rows; hidden: [rows, columns] float32.
struct HeadPair {
  const float* upper_hidden;
  Matrix upper;
  LowerHead lower;
};

void head_tokens(int threads, const float* hidden, int64_t rows, const Linear& head,
                 const Choice& choice);

void contrast_tokens(int threads, const HeadPair& heads, int64_t rows, const Choice& choice);

// Tokens of rows that share an upper head, each in the contrast of one of `lowers` or in none.
void shared_head_tokens(int threads, const float* hidden, int64_t rows, const Linear& head,
                        const std::vector<LowerHead>& lowers, const Choice& choice);

// scores: [rows, vocab]; tokens: [rows], each the argmax of its scores and noise.
void sample_tokens(int threads, const float* scores, int64_t rows, int64_t vocab,
                   const int64_t* seeds, const int64_t* positions, int64_t* tokens);

// out: [rows, vocab] log-probabilities; num_candidates: [rows] plausible tokens, or null.
void contrast_heads(int threads, const HeadPair& heads, int64_t rows, float* out,
                    int32_t* num_candidates = nullptr);

// out: [rows, vocab] logits.
void head_logits(int threads, const float* hidden, int64_t rows, const Linear& head, float* out);

}  // namespace multiexit::cpu
