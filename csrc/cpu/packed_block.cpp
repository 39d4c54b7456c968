#include "packed_block.h"

#include <algorithm>
#include <numeric>

#include "stream.h"

namespace multiexit::cpu {

namespace {

int64_t sum_of(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

// The texts some of whose rows go on, and all their rows.
struct Alive {
  explicit Alive(const PackedLens& all) {
    int64_t first = 0;
    for (size_t i = 0; i < all.keys.size(); ++i, first += all.keys[i - 1]) {
      if (all.queries[i] == 0) continue;
      lens.queries.push_back(all.queries[i]);
      lens.keys.push_back(all.keys[i]);
      for (int64_t row = first; row < first + all.keys[i]; ++row) rows.push_back(row);
    }
  }

  PackedLens lens;
  std::vector<int64_t> rows;
};

// The rows that go on are a stream of their own, beside the states of all.
class PackedRunner : Stream {
 public:
  PackedRunner(int threads, const PackedTexts& texts, const PackedSources* sources,
               int64_t rows, int64_t size, float* states)
      : Stream(threads, rows,
               texts.rows ? Scratch::of_this_thread().room(Scratch::kResidual, rows * size)
                          : states),
        texts_(texts), sources_(sources), alive_(texts.lens), size_(size), states_(states) {}

  void run(const Block& block, int64_t place, bool is_attended) {
    if (texts_.rows)
      for (int64_t i = 0; i < rows_; ++i)
        std::copy_n(states_ + texts_.rows[i] * size_, size_, residual_ + i * size_);
    if (!is_attended) attention(block);
    if (block.cross) cross_attention(*block.cross, block, place);
    feed_forward(block);
    if (texts_.rows)
      for (int64_t i = 0; i < rows_; ++i)
        std::copy_n(residual_ + i * size_, size_, states_ + texts_.rows[i] * size_);
  }

 private:
  void attention(const Block& block) {
    const int64_t width = block.heads * block.head_dim;
    PackedRows query, key;
    if (texts_.rows) {
      key = {keys_of_all(block, width), 2 * width};
      const float* input = before(block, block.attention_norm);
      query = {product_of(input, part_of(block.qkv, 0, width)), width};
    } else {
      const float* product = product_of(before(block, block.attention_norm), block.qkv);
      query = {product, 3 * width};
      key = {product + width, 3 * width};
    }
    const PackedRows value = {static_cast<const float*>(key.data) + width, key.stride};
    attend(query, key, value, alive_.lens, block, block.scale, block.bias);
    add_product(mixed_, block.output);
    after(block, block.attention_norm);
  }

  void cross_attention(const CrossAttention& cross, const Block& block, int64_t place) {
    const int64_t width = block.heads * block.head_dim;
    const float* query = product_of(before(block, cross.norm), cross.query);
    const float* keys = sources_->keys_values + place * 2 * width;
    attend({query, width}, {keys, sources_->stride}, {keys + width, sources_->stride},
           sources_->lens, block, cross.scale, {});
    add_product(mixed_, cross.output);
    after(block, cross.norm);
  }

  // Keys and values of all rows of the texts that go on.
  const float* keys_of_all(const Block& block, int64_t width) {
    const int64_t count = alive_.rows.size();
    float* input = scratch_.room(Scratch::kNormed, count * size_);
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(states_ + alive_.rows[i] * size_, size_, input + i * size_);
    if (!block.is_post_norm)
      normalise(threads_, input, block.attention_norm, input, count, size_);
    float* out = scratch_.room(Scratch::kUp, count * 2 * width);
    multiply(threads_, input, count, part_of(block.qkv, width, 2 * width), out, kNothingMore);
    return out;
  }

  const float* product_of(const float* input, const Linear& linear) {
    float* out = scratch_.room(Scratch::kWide, rows_ * linear.weight.rows);
    multiply(threads_, input, rows_, linear, out, kNothingMore);
    return out;
  }

  void attend(const PackedRows& query, const PackedRows& key, const PackedRows& value,
              const PackedLens& lens, const Block& block, float scale, const DistanceBias& bias) {
    mixed_ = scratch_.room(Scratch::kMixed, rows_ * block.heads * block.head_dim);
    packed_attention(threads_, query, key, value, DType::kFloat32, lens, block.heads,
                     block.head_dim, scale, bias, mixed_);
  }

  const PackedTexts& texts_;
  const PackedSources* const sources_;
  const Alive alive_;
  const int64_t size_;
  float* const states_;
  float* mixed_ = nullptr;
};

}  // namespace

void run_packed_blocks(int threads, const std::vector<Block>& blocks, const PackedTexts& texts,
                       const PackedSources* sources, bool is_attended, const Stored& hidden,
                       float* out) {
  const int64_t size = blocks.front().qkv.weight.columns;
  const auto* stored = static_cast<const char*>(hidden.data);
  in_chunks(threads, sum_of(texts.lens.keys), kRowsOfChunk,
            [&](int64_t first, int64_t count, int) {
              const int64_t start = first * size;
              kernels().to_float(stored + start * size_of(hidden.dtype), hidden.dtype, out + start,
                                 count * size);
            });
  const int64_t rows = sum_of(texts.lens.queries);
  if (rows == 0) return;
  PackedRunner runner(threads, texts, sources, rows, size, out);
  for (size_t i = 0; i < blocks.size(); ++i) runner.run(blocks[i], i, is_attended && i == 0);
}

}  // namespace multiexit::cpu
