// The C interface of the kernels: plain numbers and addresses, so neither Python's nor PyTorch's
// version matters. multiexit_engine/_cuda/library.py repeats it, under the same number.
#pragma once
#include <cstdint>

#define MULTIEXIT_EXPORT __attribute__((visibility("default")))

extern "C" {

// What is asked for. Addresses are on the device; numbers of the heads and hidden states are of
// `number_type`: 1 bfloat16, 2 float16.
struct MultiexitHeadCall {
  uint64_t hidden;        // [rows, width]
  uint64_t weight;        // [vocab, width]
  uint64_t bias;          // [vocab], or 0
  uint64_t lower_hidden;  // [rows, width], or 0: no contrast
  uint64_t lower_weight;  // [vocab, width]
  uint64_t alpha;         // [rows] float32
  uint64_t temperature;   // [rows] float32
  uint64_t seeds;         // [rows] int64
  uint64_t positions;     // [rows] int64
  uint64_t tokens;        // [rows] int64, written
  uint64_t log_probs;     // [rows] float32, written
  uint64_t num_candidates;  // [rows] int32, written by contrasts, or 0
  uint64_t kept;          // multiexit_head_kept_bytes(), zero before the first call; left zero
  uint64_t scratch;       // plan.scratch_bytes
  int64_t rows, vocab, width, number_type;
};

// How the current device runs calls of one shape.
struct MultiexitHeadPlan {
  int64_t blocks;
  int64_t piece_bytes;
  int64_t shared_bytes;
  int64_t scratch_bytes;
};

MULTIEXIT_EXPORT int multiexit_cuda_interface();
MULTIEXIT_EXPORT int multiexit_head_kept_bytes();

// 0, or a number that multiexit_cuda_error explains. A plan looks at the shape only, and whether
// there is a contrast.
MULTIEXIT_EXPORT int multiexit_head_plan(const MultiexitHeadCall* call, MultiexitHeadPlan* plan);
MULTIEXIT_EXPORT int multiexit_head_tokens(const MultiexitHeadCall* call,
                                           const MultiexitHeadPlan* plan, uint64_t stream);
MULTIEXIT_EXPORT const char* multiexit_cuda_error(int code);

}
