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

  const void* row(int64_t index) const {
    return static_cast<const char*>(data) + index * columns * size_of(dtype);
  }
};

enum class Activation { kGelu = 0, kGeluTanh = 1, kQuickGelu = 2, kRelu = 3, kSilu = 4 };

}  // namespace multiexit::cpu
