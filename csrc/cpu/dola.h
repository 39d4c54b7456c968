// DoLa from logits: how far earlier layers are from the last one, and the token of their
// difference. See ops/dola.py for the contracts.
#pragma once
#include <cstdint>

#include "heads.h"

namespace multiexit::cpu {

struct LayerLogits {
  const float* mature;     // [rows, vocab]
  const float* premature;  // [candidates, rows, vocab]
  int64_t candidates, rows, vocab;
};

// out: [candidates, rows].
void js_divergences(int threads, const LayerLogits& logits, bool is_published, float* out);

// places: [rows], out: of each row's premature layer among the candidates.
void dola_tokens(int threads, const LayerLogits& logits, const float* relative_top,
                 bool is_published, const Choice& choice, int64_t* places);

}  // namespace multiexit::cpu
