// Memory between the parts of one call: it grows to what the largest call needed and stays.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace multiexit::cpu {

class Scratch {
 public:
  enum Slot {
    kInput, kResidual, kNormed, kWide, kUp, kMixed, kRounded,  // blocks
    kScores, kParts, kTasks,  // attention
    kLogits, kLower, kLowerInput, kLowerRounded, kSummaries, kCandidates, kUpper, kShared, kNoisy, kContrasted,  // heads
    kPieces, kDistributions,  // statistics of heads
    kNearBest, kPlans, kNear, kExact, kOffsets, kKept,  // tokens by codes
    kUppers, kOrder,  // sums by codes
    kDequantized,  // weights
    kPacked, kBias,  // attention among packed rows
    kSlots
  };

  // Room for `count` numbers of T; what it held before is lost when it grows.
  template <class T = float>
  T* room(Slot slot, int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    Part& part = parts_[slot];
    if (bytes > part.bytes) {
      part.data.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      part.bytes = part.data ? bytes : 0;
      if (!part.data) throw std::bad_alloc();
    }
    return reinterpret_cast<T*>(part.data.get());
  }

  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Part {
    std::unique_ptr<char, Free> data;
    size_t bytes = 0;
  };
  Part parts_[kSlots];
};

}  // namespace multiexit::cpu
