#include "stream.h"

namespace multiexit::cpu {

namespace {

void norm_row(const float* x, const Norm& norm, float* out, int64_t size) {
  const Kernels& k = kernels();
  if (norm.bias)
    k.layer_norm(x, norm.weight, norm.bias, norm.eps, out, size);
  else
    k.rms_norm(x, norm.weight, norm.eps, out, size);
}

}  // namespace

void Stream::feed_forward(const Block& block) {
  const float* x = before(block, block.mlp_norm);
  const int64_t inner = block.down.weight.columns;
  float* wide = scratch_.room(Scratch::kWide, rows_ * inner);
  float* up = block.is_gated ? scratch_.room(Scratch::kUp, rows_ * inner) : nullptr;
  const Kernels& k = kernels();
  const Matrix& weight = block.up.weight;
  const auto* input = static_cast<const char*>(input_of(threads_, x, rows_, weight));
  const int64_t row_bytes = weight.columns * size_of(k.input_dtype(weight.dtype));
  in_rectangles(
      threads_, rows_, inner, rows_of_chunk(weight, rows_),
      [&](int64_t row, int64_t many, int64_t first, int64_t count) {
        const char* own = input + row * row_bytes;
        const int64_t place = row * inner + first;
        k.product(own, many, weight, first, count, block.up.bias, wide + place, inner);
        // The bias of row inner + first stands at that place of the same vector.
        if (up)
          k.product(own, many, weight, inner + first, count, block.up.bias, up + place, inner);
        for (int64_t i = 0; i < many; ++i)
          k.activate(wide + place + i * inner, up ? up + place + i * inner : nullptr,
                     block.activation, count);
      });
  add_product(wide, block.down);
  after(block, block.mlp_norm);
}

const float* Stream::before(const Block& block, const Norm& norm) {
  if (block.is_post_norm) return residual_;
  const int64_t size = block.qkv.weight.columns;
  float* out = scratch_.room(Scratch::kNormed, rows_ * size);
  normalise(threads_, residual_, norm, out, rows_, size);
  return out;
}

void Stream::after(const Block& block, const Norm& norm) {
  if (block.is_post_norm)
    normalise(threads_, residual_, norm, residual_, rows_, block.qkv.weight.columns);
}

void Stream::add_product(const float* x, const Linear& linear) {
  const int64_t size = linear.weight.rows;
  float* product = scratch_.room(Scratch::kNormed, rows_ * size);
  const auto add = [&](int64_t token, int64_t many, int64_t first, int64_t count) {
    for (int64_t t = token; t < token + many; ++t)
      kernels().add(product + t * size + first, residual_ + t * size + first, count);
  };
  multiply(threads_, x, rows_, linear, product, add);
}

void normalise(int threads, const float* x, const Norm& norm, float* out, int64_t count,
               int64_t size) {
  in_chunks(threads, count, kRowsOfChunk, [&](int64_t first, int64_t many, int) {
    for (int64_t row = first; row < first + many; ++row)
      norm_row(x + row * size, norm, out + row * size, size);
  });
}

}  // namespace multiexit::cpu
