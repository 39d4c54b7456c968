// The weights of a block, matrix after matrix and layer after layer: each warp's ring is filled
// with what it multiplies next, whatever the grid waits for meanwhile.
#pragma once
#include "cuda/layer_task.cuh"
#include "cuda/product.cuh"

namespace multiexit::cuda {

// Where a warp stands on its way through the weights of its block: in a part of a group of rows,
// of which `offset` bytes are done. The parts of all matrices are dealt out to warps in turn.
struct Progress {
  int layer = 0, matrix = 0, unit, offset = 0;
  int group = 0, start = 0, bytes = 0;  // of the block's; of a row, before this part; of this part
  Turn turn = {};

  __device__ __forceinline__ Progress(const LayersTask& task, const LayersShared& shared)
      : unit(threadIdx.x / kLanes) {
    settle(task, shared);
  }

  __device__ __forceinline__ bool is_at(int this_layer, int this_matrix) const {
    return layer == this_layer && matrix == this_matrix;
  }
  __device__ __forceinline__ int piece_bytes(const Matrix& own) const {
    return min(own.piece, bytes - offset);
  }

  // To the next piece; gives whether it was the last one of a part.
  __device__ __forceinline__ bool advance(const LayersTask& task, const LayersShared& shared) {
    turn.advance();
    offset += task.matrices[matrix].piece;
    if (offset < bytes) return false;
    offset = 0;
    unit += kWarps;
    settle(task, shared);
    return true;
  }

 private:
  // Beyond the last part of a matrix come those of the next one.
  __device__ __forceinline__ void settle(const LayersTask& task, const LayersShared& shared) {
    while (layer < task.num_layers && unit >= shared.shares[matrix].units) {
      unit -= shared.shares[matrix].units;
      if (++matrix == kMatrices) {
        matrix = 0;
        ++layer;
      }
    }
    const Matrix& own = task.matrices[matrix];
    group = unit / own.splits;
    start = (unit - group * own.splits) * own.split_bytes;
    bytes = min(own.split_bytes, own.row_bytes - start);
  }
};

// A warp's ring, what it is filled with and what is taken from it.
class WeightStream {
 public:
  __device__ __forceinline__ WeightStream(const LayersTask& task, LayersShared& shared,
                                          const MultiexitLayer* layers, char* rings)
      : task_(task),
        shared_(shared),
        layers_(layers),
        ring_(rings + threadIdx.x / kLanes * kSlots * task.slot_bytes,
              shared.transfers[threadIdx.x / kLanes], task.slot_bytes / kGroup),
        here_(task, shared),
        ahead_(here_) {
    find_source();
    for (int slot = 0; slot < kSlots; ++slot) fill();
  }

  // The warp's parts of a layer's matrix times the states: sums[part][member][row] in `room`.
  template <class Number, int ROWS>
  __device__ __forceinline__ void multiply_matrix(int layer, int name, const char* states,
                                                  float* room) {
    constexpr int kSums = kGroup * ROWS, kEchoes = kLanes / kSums;
    const Matrix& own = task_.matrices[name];
    const int lane = threadIdx.x % kLanes, piece = task_.slot_bytes / kGroup;
    while (here_.is_at(layer, name)) {
      const int unit = here_.unit;
      float sums[kSums] = {};
      bool is_done = false;
      while (!is_done) {
        ring_.wait(here_.turn);
        const char* slot = ring_.slot(here_.turn.slot);
        multiply<Number, ROWS>({slot, slot + piece, slot + 2 * piece, slot + 3 * piece},
                               states + here_.start + here_.offset, own.row_bytes,
                               here_.piece_bytes(own), sums);
        __syncwarp();
        fill();
        is_done = here_.advance(task_, shared_);
      }
      const float total = totals(sums);
      if (lane % kEchoes == 0) room[unit * kSums + lane / kEchoes] = total;
    }
  }

 private:
  // Asks for the next piece, for the slot that was read last.
  __device__ __forceinline__ void fill() {
    if (ahead_.layer == task_.num_layers) {
      ring_.fill_nothing();
      return;
    }
    const Matrix& own = task_.matrices[ahead_.matrix];
    const char* from = source_ + ahead_.offset;
    ring_.fill(ahead_.turn, ahead_.piece_bytes(own), [&](int member) -> const char* {
      return from + static_cast<int64_t>(own.rows_on(member)) * own.row_bytes;
    });
    if (ahead_.advance(task_, shared_)) find_source();
  }

  // Of the part that is asked for: its first row.
  __device__ __forceinline__ void find_source() {
    if (ahead_.layer == task_.num_layers) return;
    const Matrix& own = task_.matrices[ahead_.matrix];
    const int row = own.first_row(shared_.shares[ahead_.matrix].first + ahead_.group);
    source_ = reinterpret_cast<const char*>(
                  layers_[ahead_.layer].matrices[ahead_.matrix].weight) +
              static_cast<int64_t>(row) * own.row_bytes + ahead_.start;
  }

  const LayersTask& task_;
  LayersShared& shared_;
  const MultiexitLayer* layers_;
  Ring ring_;
  Progress here_, ahead_;
  const char* source_ = nullptr;
};

}  // namespace multiexit::cuda
