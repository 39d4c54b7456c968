// Blocks over packed texts that see themselves whole; see ops/packed_blocks.py for the contract.
#pragma once
#include <cstdint>
#include <vector>

#include "block.h"
#include "packed_attention.h"

namespace multiexit::cpu {

struct PackedTexts {
  PackedLens lens;      // of each text the rows that go on, and all its rows
  const int64_t* rows;  // those that go on, ascending; null for all
};

// What blocks with cross-attention read: rows of `stride` numbers, which begin with the keys of the
// first block, its values, the keys of the next one.
struct PackedSources {
  const float* keys_values;
  int64_t stride;
  PackedLens lens;
};

// Numbers as they are stored.
struct Stored {
  const void* data;
  DType dtype;
};

// hidden, out: [rows, hidden]. sources may be null where no block reads them.
// is_attended: the first block's self-attention is done, its norm included.
void run_packed_blocks(int threads, const std::vector<Block>& blocks, const PackedTexts& texts,
                       const PackedSources* sources, bool is_attended, const Stored& hidden,
                       float* out);

}  // namespace multiexit::cpu
