// Attention and storing over a paged cache, for the flat rows of a batch.
#pragma once
#include <cstdint>

#include "types.h"

namespace multiexit::cpu {

// Where the sequences of a flat batch lie; see SequenceLayout in batch.py.
struct Layout {
  int64_t tokens, sequences;
  const int32_t* starts;    // [sequences + 1]
  const int32_t* contexts;  // [sequences]
  const int32_t* tables;    // [sequences, table_stride]
  int64_t table_stride;
  int64_t longest_context;
};

struct Cache {
  void* keys;
  void* values;
  DType dtype;
  int64_t block_size, kv_heads, head_dim;
};

// A token's bits depend on its own keys only: neither on threads, nor on the tokens beside it.
// query: rows of `query_stride` numbers, heads first; out: [tokens, heads * head_dim].
// window: keys that a query sees, its own included; 0 for all.
void paged_attention(int threads, const float* query, int64_t query_stride, int64_t heads,
                     const Cache& cache, const Layout& layout, float scale, int64_t window,
                     const DistanceBias& bias, float* out);

// Stores one token's keys and values, [kv_heads * head_dim] each.
void store_token(const float* key, const float* value, const Cache& cache, int64_t slot);

}  // namespace multiexit::cpu
