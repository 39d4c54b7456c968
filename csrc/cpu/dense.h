// Products and elementwise work shared out over the team.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace multiexit::cpu {

struct Linear {
  Matrix weight;
  const float* bias;  // [rows] or null
};

// Some rows of a weight, with their bias.
inline Linear part_of(const Linear& linear, int64_t first, int64_t count) {
  Linear part = linear;
  part.weight.data = linear.weight.row(first);
  part.weight.rows = count;
  if (linear.weight.scales) part.weight.scales += first * linear.weight.groups();
  if (linear.bias) part.bias += first;
  return part;
}

// Weight rows that a thread takes at once: about 64 KB, but enough to keep a pass over many tokens
// worth its start.
inline int64_t rows_of_chunk(const Matrix& weight, int64_t tokens) {
  const int64_t row_bytes = std::max<int64_t>(1, weight.row_bytes());
  const int64_t bytes = tokens > 8 ? 256 << 10 : 128 << 10;
  return std::max<int64_t>(tokens > 8 ? 24 : 12, bytes / row_bytes / 12 * 12);
}

// Tokens that are multiplied with the whole matrix before the next ones are: what each of its rows
// reads again stays in the cache.
constexpr int64_t kSlabTokens = 256;

// Calls body(first, count) for chunks of `total` things, `size` at a time.
template <class Body>
void in_chunks(int threads, int64_t total, int64_t size, Body&& body) {
  parallel_for(threads, (total + size - 1) / size, [&](int64_t chunk, int rank) {
    body(chunk * size, std::min(size, total - chunk * size), rank);
  });
}

// x [tokens, columns] as products with this weight read it: x itself, or rounded in scratch.
inline const void* input_of(int threads, const float* x, int64_t tokens, const Matrix& weight,
                            Scratch::Slot slot = Scratch::kRounded) {
  const Kernels& k = kernels();
  const DType dtype = k.input_dtype(weight.dtype);
  if (dtype == DType::kFloat32) return x;
  const int64_t bytes = tokens * weight.columns * size_of(dtype);
  auto* rounded = Scratch::of_this_thread().room<char>(slot, bytes);
  in_chunks(threads, tokens, 16, [&](int64_t first, int64_t count, int) {
    const int64_t start = first * weight.columns;
    k.from_float(x + start, rounded + start * size_of(dtype), dtype, count * weight.columns);
  });
  return rounded;
}

// Rows as products with a weight read them.
class Inputs {
 public:
  Inputs(int threads, const float* hidden, int64_t rows, const Matrix& weight,
         Scratch::Slot slot = Scratch::kRounded)
      : hidden_(static_cast<const char*>(input_of(threads, hidden, rows, weight, slot))),
        bytes_(weight.columns * size_of(kernels().input_dtype(weight.dtype))) {}

  const void* row(int64_t index) const { return hidden_ + index * bytes_; }

 private:
  const char* hidden_;
  int64_t bytes_;
};

// Calls body(token, tokens, first, count) for rectangles that cover `tokens` rows of input times
// `rows` rows of the weight, `size` of the latter at a time.
template <class Body>
void in_rectangles(int threads, int64_t tokens, int64_t rows, int64_t size, Body&& body) {
  const int64_t slabs = (tokens + kSlabTokens - 1) / kSlabTokens;
  const int64_t chunks = (rows + size - 1) / size;
  parallel_for(threads, slabs * chunks, [&](int64_t index, int) {
    const int64_t slab = index / chunks, first = index % chunks * size;
    const int64_t token = tokens * slab / slabs, many = tokens * (slab + 1) / slabs - token;
    body(token, many, first, std::min(size, rows - first));
  });
}

// For `multiply` where nothing follows.
inline constexpr auto kNothingMore = [](int64_t, int64_t, int64_t, int64_t) {};

// out[t, :] = x[t] @ weight.T + bias; then(token, tokens, first, count) runs for each finished
// rectangle: of so many tokens the columns [first, first + count).
template <class Then>
void multiply(int threads, const float* x, int64_t tokens, const Linear& linear, float* out,
              Then&& then) {
  const Kernels& k = kernels();
  const Matrix& weight = linear.weight;
  const Inputs inputs(threads, x, tokens, weight);
  in_rectangles(threads, tokens, weight.rows, rows_of_chunk(weight, tokens),
                [&](int64_t token, int64_t many, int64_t first, int64_t count) {
                  k.product(inputs.row(token), many, weight, first, count, linear.bias,
                            out + token * weight.rows + first, weight.rows);
                  then(token, many, first, count);
                });
}

// x itself where it is float32, else a float32 copy in scratch.
inline const float* as_float(const void* x, DType dtype, int64_t count, Scratch::Slot slot) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(x);
  float* copy = Scratch::of_this_thread().room(slot, count);
  kernels().to_float(x, dtype, copy, count);
  return copy;
}

}  // namespace multiexit::cpu
