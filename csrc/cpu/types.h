// Plain data that every unit shares. No torch, no pybind11, nothing compiled per instruction set.
#pragma once
#include <cstdint>

namespace multiexit::cpu {

enum class DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A weight matrix [rows, columns], row after row. Rows are read whole, so the layout that PyTorch
// stores already streams: packing would only cost memory (docs/cpu.md has the figures).
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, columns;
  // Of a quantized matrix, whose numbers are codes of 8 or 4 bits: quantized.inl has the layout.
  int bits = 0;
  const BFloat16* scales = nullptr;  // [rows, groups]
  int64_t group_size = 0;
  bool is_float = false;  // codes are numbers in e4m3, else integers

  int64_t row_bytes() const {
    if (bits) return (columns + kBlock - 1) / kBlock * kBlock * bits / 8;
    return columns * size_of(dtype);
  }
  const void* row(int64_t index) const {
    return static_cast<const char*>(data) + index * row_bytes();
  }
  int64_t groups() const { return (columns + group_size - 1) / group_size; }

  // Columns whose codes lie together; a row is padded to whole blocks.
  static constexpr int64_t kBlock = 32;
};

// Rows of 8-bit codes, of which each has a scale; a code is stored plus 128.
struct CodedRows {
  const uint8_t* codes;  // [rows, columns]
  const float* scales;

  CodedRows from(int64_t row, int64_t columns) const {
    return {codes + row * columns, scales + row};
  }
};

// A matrix of 8-bit codes with a scale for each row, in blocks of 16 rows: of each block first the
// columns 0 to 3 of all its rows, then 4 to 7. Columns are a multiple of 4, rows are padded.
struct CodedMatrix {
  static constexpr int64_t kLanes = 16;

  const int8_t* codes;
  const int32_t* starts;  // -128 times the sum of a row's codes
  const float* scales;
  int64_t rows, columns;
};

// What the scores of each query head gain by the place of a key beside its query: of `before` places
// before it and farther, ..., of the query's own place, ..., of `after` places behind it and farther.
struct DistanceBias {
  // Numbers on both sides of a head's own that equal its ends, so that a vector may reach past them.
  static constexpr int64_t kMargin = 16;

  const float* table = nullptr;  // [heads, row_size()]; null where there is no bias
  int64_t before = 0, after = 0;

  int64_t row_size() const { return before + 1 + after + 2 * kMargin; }

  // Of a key `places` behind its query, and of as many later ones as the margin has numbers.
  const float* at(int64_t head, int64_t places) const {
    const int64_t index = places + before + kMargin, last = row_size() - kMargin;
    return table + head * row_size() + (index < 0 ? 0 : index > last ? last : index);
  }
};

enum class Activation { kGelu = 0, kGeluTanh = 1, kQuickGelu = 2, kRelu = 3, kSilu = 4 };

}  // namespace multiexit::cpu
