// A warp's ring of slots in shared memory: weights arrive in some while others are multiplied.
//
// A slot holds a piece of each of kGroup matrix rows. Knows nothing of what the numbers mean.
#pragma once
#include "cuda/target.cuh"

namespace multiexit::cuda {

constexpr int kLanes = 32;
constexpr int kGroup = 4;  // matrix rows that a warp multiplies at once
constexpr int kSlots = 4;  // of a ring; wait_for_groups needs it as a constant

// Which slot comes next, and how often the ring has been through all of them.
struct Turn {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

#if MULTIEXIT_CAPABILITY >= 90

// One bulk copy for each row: no thread waits for its bytes, no register holds them.
class Ring {
 public:
  static constexpr int kTransfers = kSlots;

  __device__ __forceinline__ Ring(char* slots, Transfers* transfers, int piece)
      : slots_(slots), transfers_(transfers), piece_(piece) {
    if (threadIdx.x % kLanes == 0) {
      for (int slot = 0; slot < kSlots; ++slot) prepare(&transfers[slot], kGroup);
      publish_prepared();
    }
    __syncwarp();
  }

  __device__ __forceinline__ const char* slot(int index) const {
    return slots_ + index * kGroup * piece_;
  }

  // By all lanes; those of the warp have read what the slot held. `source` gives the address of
  // each member's bytes, or null where there is no such row.
  template <class Source>
  __device__ __forceinline__ void fill(const Turn& turn, int bytes, Source&& source) {
    const int member = threadIdx.x % kLanes;
    if (member >= kGroup) return;
    const char* from = source(member);
    expect(&transfers_[turn.slot], from ? bytes : 0);
    if (from)
      copy_bulk(slots_ + (turn.slot * kGroup + member) * piece_, from, bytes,
                &transfers_[turn.slot]);
  }

  // A ring without bulk copies counts its fills; this one need not.
  __device__ __forceinline__ void fill_nothing() {}

  __device__ __forceinline__ void wait(const Turn& turn) {
    while (!has_completed(&transfers_[turn.slot], turn.parity)) {
    }
  }

 private:
  char* slots_;
  Transfers* transfers_;
  int piece_;
};

#else

using Transfers = uint64_t;

// Every lane copies the chunks that it will read itself, and waits for its own copies only.
class Ring {
 public:
  static constexpr int kTransfers = 1;

  __device__ __forceinline__ Ring(char* slots, Transfers*, int piece)
      : slots_(slots), piece_(piece) {}

  __device__ __forceinline__ const char* slot(int index) const {
    return slots_ + index * kGroup * piece_;
  }

  template <class Source>
  __device__ __forceinline__ void fill(const Turn& turn, int bytes, Source&& source) {
    for (int member = 0; member < kGroup; ++member) {
      const char* from = source(member);
      if (!from) continue;
      char* target = slots_ + (turn.slot * kGroup + member) * piece_;
      for (int byte = threadIdx.x % kLanes * 16; byte < bytes; byte += kLanes * 16)
        copy_16_bytes(target + byte, from + byte);
    }
    close_group();
  }

  __device__ __forceinline__ void fill_nothing() { close_group(); }

  __device__ __forceinline__ void wait(const Turn&) { wait_for_groups<kSlots - 1>(); }

 private:
  char* slots_;
  int piece_;
};

#endif

}  // namespace multiexit::cuda
