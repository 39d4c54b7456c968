// What a matrix is multiplied with, brought to shared memory by the whole block: rows normed, rows
// of the feed-forward layer as they are, and what attention found, its parts joined.
#pragma once
#include "cuda/layer_task.cuh"

namespace multiexit::cuda {

__device__ __forceinline__ float4 four_of(const float* numbers) {
  return read_written(reinterpret_cast<const float4*>(numbers));
}

template <class Number>
__device__ __forceinline__ float4 widened(uint2 words) {
  const float2 first = Number::widen(words.x), second = Number::widen(words.y);
  return {first.x, first.y, second.x, second.y};
}

template <class Number>
__device__ __forceinline__ void put_four(char* states, int row, int row_bytes, int column,
                                         float4 four) {
  *reinterpret_cast<uint2*>(states + row * row_bytes + 2 * column) = {
      Number::narrow(four.x, four.y), Number::narrow(four.z, four.w)};
}

// Sums over the block of a number for each row; the order is the same whoever else is there.
template <int ROWS>
__device__ __forceinline__ void sum_in_block(float (&values)[ROWS],
                                             float (&room)[kWarps][kMostRows]) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2)
      values[row] += __shfl_xor_sync(~0u, values[row], mask);
    if (threadIdx.x % kLanes == 0) room[threadIdx.x / kLanes][row] = values[row];
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    values[row] = room[0][row];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) values[row] += room[warp][row];
  }
}

// Bytes that NormedRows needs: the states, the rows as they come, and the norm's own numbers.
__host__ __device__ constexpr int64_t norm_bytes(int rows, int64_t width) {
  return width * (rows * static_cast<int64_t>(2 + sizeof(float)) + 2 * 2);
}

// LayerNorm, or RMSNorm, of all rows: each thread has four columns of every 1024, and keeps what it
// reads again in shared memory, as registers would not do for every width. Made before the rows are
// there, it has the norm's own numbers on their way.
template <class Number, int ROWS>
class NormedRows {
 public:
  __device__ __forceinline__ NormedRows(const LayersTask& task, const MultiexitNorm& norm,
                                        char* states)
      : task_(task),
        states_(states),
        rows_(reinterpret_cast<float*>(states + ROWS * 2 * task.width)),
        gain_(reinterpret_cast<uint2*>(rows_ + ROWS * task.width)),
        shift_(gain_ + task.width / 4) {
    for (int column = first_column(); column < task.width; column += kColumns) {
      gain_[column / 4] = *reinterpret_cast<const uint2*>(norm.gain + 2 * column);
      if (task.has_shift)
        shift_[column / 4] = *reinterpret_cast<const uint2*>(norm.shift + 2 * column);
    }
  }

  __device__ __forceinline__ void load(const float* stream, float epsilon, LayersShared& shared) {
    float means[ROWS] = {}, squares[ROWS] = {}, scales[ROWS];
    const float width = static_cast<float>(task_.width);
#pragma unroll 4
    for (int column = first_column(); column < task_.width; column += kColumns) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        float4 own = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row < task_.rows) own = four_of(stream + static_cast<int64_t>(row) * task_.width + column);
        kept(row, column) = own;
        means[row] += (own.x + own.y) + (own.z + own.w);
      }
    }
    if (task_.has_shift) sum_in_block<ROWS>(means, shared.sums[0]);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) means[row] = task_.has_shift ? means[row] / width : 0.0f;
    for (int column = first_column(); column < task_.width; column += kColumns) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const float4 own = centred(row, column, means[row]);
        squares[row] += fmaf(own.x, own.x, own.y * own.y) + fmaf(own.z, own.z, own.w * own.w);
      }
    }
    sum_in_block<ROWS>(squares, shared.sums[1]);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) scales[row] = rsqrtf(squares[row] / width + epsilon);
    for (int column = first_column(); column < task_.width; column += kColumns) {
      const float4 gain = widened<Number>(gain_[column / 4]);
      float4 shift = {0.0f, 0.0f, 0.0f, 0.0f};
      if (task_.has_shift) shift = widened<Number>(shift_[column / 4]);
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const float4 own = centred(row, column, means[row]);
        const float scale = scales[row];
        put_four<Number>(
            states_, row, 2 * task_.width, column,
            {fmaf(own.x * scale, gain.x, shift.x), fmaf(own.y * scale, gain.y, shift.y),
             fmaf(own.z * scale, gain.z, shift.z), fmaf(own.w * scale, gain.w, shift.w)});
      }
    }
    __syncthreads();
  }

 private:
  static constexpr int kColumns = 4 * kThreads;

  static __device__ __forceinline__ int first_column() { return 4 * static_cast<int>(threadIdx.x); }

  __device__ __forceinline__ float4& kept(int row, int column) const {
    return *reinterpret_cast<float4*>(rows_ + row * task_.width + column);
  }
  __device__ __forceinline__ float4 centred(int row, int column, float mean) const {
    const float4 own = kept(row, column);
    return {own.x - mean, own.y - mean, own.z - mean, own.w - mean};
  }

  const LayersTask& task_;
  char* states_;
  float* rows_;
  uint2 *gain_, *shift_;
};

// Rows of numbers as they lie in memory, `row_bytes` long; zeros for rows that are not there.
template <int ROWS>
__device__ __forceinline__ void load_rows(const LayersTask& task, const uint16_t* rows,
                                          int row_bytes, char* states) {
  for (int row = 0; row < ROWS; ++row)
    for (int byte = threadIdx.x * 16; byte < row_bytes; byte += kThreads * 16) {
      const char* from =
          reinterpret_cast<const char*>(rows) + static_cast<int64_t>(row) * row_bytes + byte;
      const uint4 none = {0, 0, 0, 0};
      *reinterpret_cast<uint4*>(states + row * row_bytes + byte) =
          row < task.rows ? read_written(reinterpret_cast<const uint4*>(from)) : none;
    }
  __syncthreads();
}

}  // namespace multiexit::cuda
