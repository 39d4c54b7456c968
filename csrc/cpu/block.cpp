#include "block.h"

#include <cstring>

namespace multiexit::cpu {

namespace {

// Rows that a thread takes at once of work that costs little for each.
constexpr int64_t kRowsOfChunk = 16;

void norm_row(const float* x, const Norm& norm, float* out, int64_t size) {
  const Kernels& k = kernels();
  if (norm.bias)
    k.layer_norm(x, norm.weight, norm.bias, norm.eps, out, size);
  else
    k.rms_norm(x, norm.weight, norm.eps, out, size);
}

// Norms and turns the heads of one token's queries and keys, then stores keys and values.
void place_token(const Block& block, const Cache& cache, float* qkv, int64_t position,
                 int64_t slot) {
  const int64_t dim = block.head_dim, query_heads = block.heads;
  for (int64_t head = 0; head < query_heads + block.kv_heads; ++head) {
    float* own = qkv + head * dim;
    const Norm& norm = head < query_heads ? block.query_norm : block.key_norm;
    if (norm.weight) norm_row(own, norm, own, dim);
    if (block.cos)
      kernels().rotate(own, block.cos + position * (dim / 2), block.sin + position * (dim / 2),
                       dim / 2);
  }
  const float* key = qkv + query_heads * dim;
  store_token(key, key + block.kv_heads * dim, cache, slot);
}

class Runner {
 public:
  Runner(int threads, const Rows& rows, float* residual)
      : threads_(threads), tokens_(rows.layout.tokens), rows_(rows), residual_(residual) {}

  void run(const Block& block, const Cache& cache) {
    attention(block, cache);
    if (block.cross) cross_attention(*block.cross, block, cache);
    feed_forward(block);
  }

 private:
  void attention(const Block& block, const Cache& cache) {
    const float* input = before(block, block.attention_norm);
    const int64_t width = block.qkv.weight.rows;
    float* qkv = scratch_.room(Scratch::kWide, tokens_ * width);
    multiply(threads_, input, tokens_, block.qkv, qkv, kNothingMore);
    in_chunks(threads_, tokens_, kRowsOfChunk, [&](int64_t first, int64_t count, int) {
      for (int64_t t = first; t < first + count; ++t)
        place_token(block, cache, qkv + t * width, rows_.positions[t], rows_.slots[t]);
    });
    float* mixed = scratch_.room(Scratch::kMixed, tokens_ * block.heads * block.head_dim);
    paged_attention(threads_, qkv, width, block.heads, cache, rows_.layout, block.scale,
                    block.window, mixed);
    add_product(mixed, block.output);
    after(block, block.attention_norm);
  }

  void cross_attention(const CrossAttention& cross, const Block& block, const Cache& cache) {
    const float* input = before(block, cross.norm);
    const int64_t width = cross.query.weight.rows;
    float* query = scratch_.room(Scratch::kWide, tokens_ * width);
    multiply(threads_, input, tokens_, cross.query, query, kNothingMore);
    float* mixed = scratch_.room(Scratch::kMixed, tokens_ * width);
    paged_attention(threads_, query, width, block.heads, cache, *rows_.sources, cross.scale, 0,
                    mixed);
    add_product(mixed, cross.output);
    after(block, cross.norm);
  }

  void feed_forward(const Block& block) {
    const float* x = before(block, block.mlp_norm);
    const int64_t inner = block.down.weight.columns;
    float* wide = scratch_.room(Scratch::kWide, tokens_ * inner);
    float* up = block.is_gated ? scratch_.room(Scratch::kUp, tokens_ * inner) : nullptr;
    const Kernels& k = kernels();
    const Matrix& weight = block.up.weight;
    const void* input = input_of(threads_, x, tokens_, weight);
    in_chunks(threads_, inner, rows_of_chunk(weight, tokens_), [&](int64_t first, int64_t count, int) {
      k.product(input, tokens_, weight, first, count, block.up.bias, wide + first, inner);
      // The bias of row inner + first stands at that place of the same vector.
      if (up)
        k.product(input, tokens_, weight, inner + first, count, block.up.bias, up + first, inner);
      for (int64_t t = 0; t < tokens_; ++t)
        k.activate(wide + t * inner + first, up ? up + t * inner + first : nullptr,
                   block.activation, count);
    });
    add_product(wide, block.down);
    after(block, block.mlp_norm);
  }

  // What a part of the block reads.
  const float* before(const Block& block, const Norm& norm) {
    if (block.is_post_norm) return residual_;
    const int64_t size = block.qkv.weight.columns;
    float* out = scratch_.room(Scratch::kNormed, tokens_ * size);
    normalise(threads_, residual_, norm, out, tokens_, size);
    return out;
  }

  // What follows once the part's result is in the residual.
  void after(const Block& block, const Norm& norm) {
    if (block.is_post_norm)
      normalise(threads_, residual_, norm, residual_, tokens_, block.qkv.weight.columns);
  }

  void add_product(const float* x, const Linear& linear) {
    const int64_t size = linear.weight.rows;
    float* product = scratch_.room(Scratch::kNormed, tokens_ * size);
    const auto add = [&](int64_t token, int64_t many, int64_t first, int64_t count) {
      for (int64_t t = token; t < token + many; ++t)
        kernels().add(product + t * size + first, residual_ + t * size + first, count);
    };
    multiply(threads_, x, tokens_, linear, product, add);
  }

  const int threads_;
  const int64_t tokens_;
  const Rows& rows_;
  float* const residual_;
  Scratch& scratch_ = Scratch::of_this_thread();
};

}  // namespace

void normalise(int threads, const float* x, const Norm& norm, float* out, int64_t count,
               int64_t size) {
  in_chunks(threads, count, kRowsOfChunk, [&](int64_t first, int64_t many, int) {
    for (int64_t row = first; row < first + many; ++row)
      norm_row(x + row * size, norm, out + row * size, size);
  });
}

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
