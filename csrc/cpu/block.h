// A decoder block as plain pointers, and the call that runs a span of them.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "attention.h"
#include "dense.h"

namespace multiexit::cpu {

struct Norm {
  const float* weight;
  const float* bias;  // null for RMS
  float eps;
};

// Of an encoder-decoder's block: its keys and values stand in the layer's cache.
struct CrossAttention {
  Norm norm;
  Linear query, output;
  float scale;
};

// The block of layers/block.py, or BART's. Vectors are float32, matrices and caches of one dtype.
struct Block {
  bool is_post_norm;  // norms are of the residual after each sum, not of what each part reads
  Norm attention_norm, mlp_norm;
  Norm query_norm, key_norm;  // weight null where the model has none
  Linear qkv, output;
  Linear up, down;
  bool is_gated;  // `up` then holds the gate's rows first
  Activation activation;
  int64_t heads, kv_heads, head_dim;
  int64_t window;  // 0 for all keys
  float scale;
  DistanceBias bias;  // of attention to the own text
  const float* cos;  // [positions, head_dim / 2]; null without rotary positions
  const float* sin;
  std::optional<CrossAttention> cross;
};

// Rows that only give keys and values, in every block from the same state.
struct CopiedRows {
  int64_t count;
  const float* states;       // [count, hidden]
  const int64_t* positions;  // [count]
  const int64_t* slots;      // [count]
};

struct Rows {
  Layout layout;
  const int64_t* positions;  // [tokens]
  const int64_t* slots;      // [tokens]
  std::optional<Layout> sources;  // every token a sequence of its own; for cross-attention
  std::optional<CopiedRows> copied;
};

// Blocks that follow each other, each with its part of the cache.
struct Span {
  std::vector<Block> blocks;
  std::vector<Cache> caches;
};

// hidden, out: [tokens, hidden] of `dtype`.
void run_blocks(int threads, const Span& span, const Rows& rows, const void* hidden, void* out,
                DType dtype);

// Rows that a thread takes at once of work that costs little for each.
constexpr int64_t kRowsOfChunk = 16;

// x[i] = norm(x[i]) for `count` rows of `size` numbers each; out may be x.
void normalise(int threads, const float* x, const Norm& norm, float* out, int64_t count,
               int64_t size);

}  // namespace multiexit::cpu
