// How the rows of a matrix are cut for rings.
#pragma once
#include "cuda/calls.h"

namespace multiexit::cuda {

constexpr int kMostPiece = 1536, kLeastPiece = 512;

// Bytes are cut into as few pieces as fit the rings, of equal length. A piece is whole strides of a
// warp, or all there is: each lane then adds up the same numbers in any case.
constexpr int64_t piece_of(int64_t bytes, int64_t most) {
  const int64_t pieces = (bytes + most - 1) / most;
  return pieces == 1 ? bytes : rounded_up((bytes + pieces - 1) / pieces, kLeastPiece);
}

}  // namespace multiexit::cuda
