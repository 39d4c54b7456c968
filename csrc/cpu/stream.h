// The residual stream of some rows, and what blocks of every kind do to it.
#pragma once
#include <cstdint>

#include "block.h"
#include "scratch.h"

namespace multiexit::cpu {

class Stream {
 public:
  // residual: [rows, hidden], changed in place.
  Stream(int threads, int64_t rows, float* residual)
      : threads_(threads), rows_(rows), residual_(residual) {}

 protected:
  // What a part of the block reads, until the next call or product that is added.
  const float* before(const Block& block, const Norm& norm);

  // What follows once the part's result is in the residual.
  void after(const Block& block, const Norm& norm);

  void add_product(const float* x, const Linear& linear);

  // The last part of a block.
  void feed_forward(const Block& block);

  const int threads_;
  const int64_t rows_;
  float* const residual_;
  Scratch& scratch_ = Scratch::of_this_thread();
};

}  // namespace multiexit::cpu
