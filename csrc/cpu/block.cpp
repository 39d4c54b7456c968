#include "block.h"

#include "stream.h"

namespace multiexit::cpu {

namespace {

// Norms and turns the heads of one token's queries, if it has any, and keys, then stores keys and
// values.
void place_token(const Block& block, const Cache& cache, float* qkv, int64_t query_heads,
                 int64_t position, int64_t slot) {
  const int64_t dim = block.head_dim;
  for (int64_t head = 0; head < query_heads + block.kv_heads; ++head) {
    float* own = qkv + head * dim;
    const Norm& norm = head < query_heads ? block.query_norm : block.key_norm;
    if (norm.weight) normalise(1, own, norm, own, 1, dim);
    if (block.cos)
      kernels().rotate(own, block.cos + position * (dim / 2), block.sin + position * (dim / 2),
                       dim / 2);
  }
  const float* key = qkv + query_heads * dim;
  store_token(key, key + block.kv_heads * dim, cache, slot);
}

class Runner : Stream {
 public:
  Runner(int threads, const Rows& rows, float* residual)
      : Stream(threads, rows.layout.tokens, residual), step_(rows) {}

  void run(const Block& block, const Cache& cache) {
    // first, so that attention finds them, and their part of the weights in the processor's cache
    if (step_.copied) copy(*step_.copied, block, cache);
    attention(block, cache);
    if (block.cross) cross_attention(*block.cross, block, cache);
    feed_forward(block);
  }

 private:
  void copy(const CopiedRows& rows, const Block& block, const Cache& cache) {
    const float* input = rows.states;
    const int64_t size = block.qkv.weight.columns;
    if (!block.is_post_norm) {
      float* normed = scratch_.room(Scratch::kNormed, rows.count * size);
      normalise(threads_, input, block.attention_norm, normed, rows.count, size);
      input = normed;
    }
    const int64_t first = block.heads * block.head_dim, width = block.qkv.weight.rows - first;
    float* keys_values = scratch_.room(Scratch::kWide, rows.count * width);
    multiply(threads_, input, rows.count, part_of(block.qkv, first, width), keys_values,
             kNothingMore);
    for (int64_t t = 0; t < rows.count; ++t)
      place_token(block, cache, keys_values + t * width, 0, rows.positions[t], rows.slots[t]);
  }

  void attention(const Block& block, const Cache& cache) {
    const float* input = before(block, block.attention_norm);
    const int64_t width = block.qkv.weight.rows;
    float* qkv = scratch_.room(Scratch::kWide, rows_ * width);
    multiply(threads_, input, rows_, block.qkv, qkv, kNothingMore);
    in_chunks(threads_, rows_, kRowsOfChunk, [&](int64_t first, int64_t count, int) {
      for (int64_t t = first; t < first + count; ++t)
        place_token(block, cache, qkv + t * width, block.heads, step_.positions[t],
                    step_.slots[t]);
    });
    float* mixed = scratch_.room(Scratch::kMixed, rows_ * block.heads * block.head_dim);
    paged_attention(threads_, qkv, width, block.heads, cache, step_.layout, block.scale,
                    block.window, block.bias, mixed);
    add_product(mixed, block.output);
    after(block, block.attention_norm);
  }

  void cross_attention(const CrossAttention& cross, const Block& block, const Cache& cache) {
    const float* input = before(block, cross.norm);
    const int64_t width = cross.query.weight.rows;
    float* query = scratch_.room(Scratch::kWide, rows_ * width);
    multiply(threads_, input, rows_, cross.query, query, kNothingMore);
    float* mixed = scratch_.room(Scratch::kMixed, rows_ * width);
    paged_attention(threads_, query, width, block.heads, cache, *step_.sources, cross.scale, 0,
                    {}, mixed);
    add_product(mixed, cross.output);
    after(block, cross.norm);
  }

  const Rows& step_;
};

}  // namespace

void run_blocks(int threads, const Span& span, const Rows& rows, const void* hidden, void* out,
                DType dtype) {
  const int64_t count = rows.layout.tokens * span.blocks.front().qkv.weight.columns;
  float* residual = dtype == DType::kFloat32
                        ? static_cast<float*>(out)
                        : Scratch::of_this_thread().room(Scratch::kResidual, count);
  kernels().to_float(hidden, dtype, residual, count);
  Runner runner(threads, rows, residual);
  for (size_t i = 0; i < span.blocks.size(); ++i) runner.run(span.blocks[i], span.caches[i]);
  if (dtype != DType::kFloat32) kernels().from_float(residual, out, dtype, count);
}

}  // namespace multiexit::cpu
