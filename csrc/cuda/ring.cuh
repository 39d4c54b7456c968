// A warp's ring of slots in shared memory: weights arrive in some while others are multiplied.
//
// A slot holds a piece of each of kGroup matrix rows. Knows nothing of what the numbers mean.
#pragma once
#include "cuda/target.cuh"

namespace multiexit::cuda {

constexpr int kLanes = 32;
constexpr int kGroup = 4;  // matrix rows that a warp multiplies at once
constexpr int kSlots = 4;  // of a ring; wait_for_groups needs it as a constant

// Rows of bytes that lie one behind the other.
struct Rows {
  const char* data;
  int count, bytes;
};

// Where a warp stands on its way through a part of a matrix: a group of rows, of which `offset`
// bytes are done, and the slot that holds the next piece.
struct Place {
  int group, offset = 0, slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ bool ends_group(int row_bytes, int piece) const {
    return offset + piece >= row_bytes;
  }
  __device__ __forceinline__ void advance(int row_bytes, int piece, int next_group) {
    if (ends_group(row_bytes, piece)) {
      group += next_group;
      offset = 0;
    } else {
      offset += piece;
    }
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

  // By all lanes; those of the warp have read what the slot held.
  __device__ __forceinline__ void fill(const Place& place, const Rows& matrix) {
    const int member = threadIdx.x % kLanes, row = place.group * kGroup + member;
    if (member >= kGroup) return;
    const int bytes = row < matrix.count ? min(piece_, matrix.bytes - place.offset) : 0;
    expect(&transfers_[place.slot], bytes);
    if (bytes)
      copy_bulk(slots_ + (place.slot * kGroup + member) * piece_,
                matrix.data + static_cast<int64_t>(row) * matrix.bytes + place.offset, bytes,
                &transfers_[place.slot]);
  }

  // A ring without bulk copies counts its fills; this one need not.
  __device__ __forceinline__ void fill_nothing() {}

  __device__ __forceinline__ void wait(const Place& place) {
    while (!has_completed(&transfers_[place.slot], place.parity)) {
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

  __device__ __forceinline__ void fill(const Place& place, const Rows& matrix) {
    const int bytes = min(piece_, matrix.bytes - place.offset);
    for (int member = 0; member < kGroup; ++member) {
      const int row = place.group * kGroup + member;
      if (row >= matrix.count) break;
      char* target = slots_ + (place.slot * kGroup + member) * piece_;
      const char* source = matrix.data + static_cast<int64_t>(row) * matrix.bytes + place.offset;
      for (int byte = threadIdx.x % kLanes * 16; byte < bytes; byte += kLanes * 16)
        copy_16_bytes(target + byte, source + byte);
    }
    close_group();
  }

  __device__ __forceinline__ void fill_nothing() { close_group(); }

  __device__ __forceinline__ void wait(const Place&) { wait_for_groups<kSlots - 1>(); }

 private:
  char* slots_;
  int piece_;
};

#endif

}  // namespace multiexit::cuda
