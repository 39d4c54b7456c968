// Blocks over a cache and over packed texts, and their attention.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/block.h"
#include "cpu/packed_block.h"
#include "tests/kernels/tests.h"

namespace multiexit::cpu {

// A model of one block, run over two sequences token by token and at once.
// BART's blocks, besides, read three keys of a source from blocks 3 and 4 of the cache.
void blocks(bool is_gated, bool is_bart, int64_t head_dim, int64_t window) {
  const int64_t heads = 4, kv_heads = 2, hidden = 24, inner = 20, tokens = 5, block_size = 2;
  const int64_t qkv = (heads + 2 * kv_heads) * head_dim, up = is_gated ? 2 * inner : inner;
  const auto scale = numbers(hidden), shift = numbers(hidden), head_scale = numbers(head_dim);
  const auto w_qkv = numbers(qkv * hidden), w_out = numbers(hidden * heads * head_dim);
  const auto w_up = numbers(up * hidden), w_down = numbers(hidden * inner), b_up = numbers(up);
  const auto cos = numbers(3 * (head_dim / 2)), sin = numbers(3 * (head_dim / 2));
  const Norm norm = {scale.data(), is_gated ? nullptr : shift.data(), 1e-5f};
  const Norm head_norm = {is_gated ? head_scale.data() : nullptr, nullptr, 1e-5f};
  const bool turns = is_gated && head_dim % 2 == 0;
  const auto w_query = numbers(heads * head_dim * hidden);
  std::optional<CrossAttention> cross;
  if (is_bart)
    cross = {norm,
             {{w_query.data(), DType::kFloat32, heads * head_dim, hidden}, nullptr},
             {{w_out.data(), DType::kFloat32, hidden, heads * head_dim}, nullptr},
             0.2f};
  const Block block = {is_bart, norm, norm, head_norm, head_norm,
                       {{w_qkv.data(), DType::kFloat32, qkv, hidden}, nullptr},
                       {{w_out.data(), DType::kFloat32, hidden, heads * head_dim}, nullptr},
                       {{w_up.data(), DType::kFloat32, up, hidden}, b_up.data()},
                       {{w_down.data(), DType::kFloat32, hidden, inner}, nullptr},
                       is_gated, Activation::kSilu, heads, kv_heads, head_dim, window, 0.3f,
                       {}, turns ? cos.data() : nullptr, turns ? sin.data() : nullptr, cross};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t slot = kv_heads * head_dim, source = 3 * block_size * slot;
  std::vector<float> keys(5 * block_size * slot, nan);
  const auto source_keys = numbers(3 * slot);
  std::copy(source_keys.begin(), source_keys.end(), keys.begin() + source);
  std::vector<float> values = keys;
  const Cache cache = {keys.data(), values.data(), DType::kFloat32, block_size, kv_heads, head_dim};
  const Span span = {{block}, {cache}};
  const auto input = numbers(tokens * hidden);
  std::vector<float> whole(tokens * hidden), single(hidden);
  const std::vector<int32_t> starts = {0, 3, 5}, contexts = {3, 2}, tables = {2, 0, 1, -1};
  const std::vector<int64_t> positions = {0, 1, 2, 0, 1}, slots = {4, 5, 0, 2, 3};
  const Layout layout = {tokens, 2, starts.data(), contexts.data(), tables.data(), 2, 3};
  const std::vector<int32_t> each = {0, 1, 2, 3, 4, 5}, lengths(tokens, 3);
  const std::vector<int32_t> sources = {3, 4, 3, 4, 3, 4, 3, 4, 3, 4};
  const auto beside = [&](int64_t count) {
    return Layout{count, count, each.data(), lengths.data(), sources.data(), 2, 3};
  };
  run_blocks(3, span, {layout, positions.data(), slots.data(), beside(tokens)}, input.data(),
             whole.data(), DType::kFloat32);
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<int32_t> start = {0, 1}, context = {static_cast<int32_t>(positions[t] + 1)};
    const Layout one = {1, 1, start.data(), context.data(), tables.data() + (t < 3 ? 0 : 2), 2,
                        positions[t] + 1};
    run_blocks(1, span, {one, &positions[t], &slots[t], beside(1)}, input.data() + t * hidden,
               single.data(), DType::kFloat32);
    for (int64_t i = 0; i < hidden; ++i)
      if (single[i] != whole[t * hidden + i])
        expect_near(single[i], whole[t * hidden + i] + 1e9, "a token alone has other bits");
  }
}

// Three texts, of the second no row goes on; the first and the last read a source. The rows that go
// on, alone and beside the others, and a whole text.
void packed_texts(bool is_bart, bool is_gated, int64_t head_dim) {
  const int64_t heads = 2, hidden = 10, inner = 20, width = heads * head_dim;
  const auto scale = numbers(hidden), shift = numbers(hidden);
  const auto w_qkv = numbers(3 * width * hidden), w_out = numbers(hidden * width);
  const auto w_query = numbers(width * hidden), w_up = numbers(2 * inner * hidden);
  const auto w_down = numbers(hidden * inner), b_qkv = numbers(3 * width);
  const auto matrix = [](const std::vector<float>& weight, int64_t rows, int64_t columns) {
    return Matrix{weight.data(), DType::kFloat32, rows, columns};
  };
  const Norm norm = {scale.data(), is_gated ? nullptr : shift.data(), 1e-5f};
  const Norm none = {nullptr, nullptr, 0.0f};
  std::optional<CrossAttention> cross;
  if (is_bart)
    cross = {norm, {matrix(w_query, width, hidden), nullptr},
             {matrix(w_out, hidden, width), nullptr}, 0.2f};
  const Block block = {is_bart, norm, norm, none, none, {matrix(w_qkv, 3 * width, hidden), b_qkv.data()},
                       {matrix(w_out, hidden, width), nullptr},
                       {matrix(w_up, (is_gated ? 2 : 1) * inner, hidden), nullptr},
                       {matrix(w_down, hidden, inner), nullptr},
                       is_gated, Activation::kGelu, heads, heads, head_dim, 0, 0.3f, {}, nullptr,
                       nullptr, cross};
  const auto keys_values = numbers(7 * 2 * width);
  const auto input = numbers(9 * hidden);
  const auto run = [&](const PackedTexts& texts, const PackedSources& sources, int64_t first,
                       int64_t count) {
    std::vector<float> states(count * hidden);
    run_packed_blocks(3, {block}, texts, is_bart ? &sources : nullptr, false,
                      {input.data() + first * hidden, DType::kFloat32}, states.data());
    return states;
  };
  const std::vector<int64_t> rows = {0, 3, 7, 8}, own = {1, 2};
  const auto whole = run({{{4, 2, 3}, {4, 2, 3}}, nullptr},
                         {keys_values.data(), 2 * width, {{4, 2, 3}, {3, 1, 3}}}, 0, 9);
  const auto some = run({{{2, 0, 2}, {4, 2, 3}}, rows.data()},
                        {keys_values.data(), 2 * width, {{2, 0, 2}, {3, 1, 3}}}, 0, 9);
  const auto alone = run({{{2}, {3}}, own.data()},
                         {keys_values.data() + 4 * 2 * width, 2 * width, {{2}, {3}}}, 6, 3);
  for (int64_t row = 0; row < 9; ++row) {
    const bool goes_on = std::count(rows.begin(), rows.end(), row) > 0;
    for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
      if (some[i] != (goes_on ? whole[i] : input[i])) expect_near(some[i], 1e9, "a row of some");
      if (row >= 6 && alone[i - 6 * hidden] != some[i])
        expect_near(alone[i - 6 * hidden], 1e9, "a text alone");
    }
  }
}

// One sequence over the borders of splits: a prompt's tokens at once, and its last one alone. With
// a reach scores have a bias, which is the same from so many places before the query on.
void attention(int64_t tokens, int64_t context, int64_t window, int64_t group, int64_t head_dim,
               int64_t reach) {
  const int64_t kv_heads = 3, heads = kv_heads * group, block_size = 5, width = heads * head_dim;
  const int64_t blocks = (context + block_size - 1) / block_size, stride = kv_heads * head_dim;
  auto keys = numbers(blocks * block_size * stride), values = numbers(keys.size());
  std::vector<int32_t> table(blocks);
  for (int64_t i = 0; i < blocks; ++i) table[i] = blocks - 1 - i;
  const auto offset = [&](int64_t key, int64_t head) {
    return (table[key / block_size] * block_size + key % block_size) * stride + head * head_dim;
  };
  for (int64_t key = context; key < blocks * block_size; ++key)
    for (int64_t i = 0; i < stride; ++i) keys[offset(key, 0) + i] = values[offset(key, 0) + i] = NAN;
  const auto query = numbers(tokens * width);
  DistanceBias bias = {nullptr, reach, 0};
  auto biases = numbers(heads * bias.row_size());
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < DistanceBias::kMargin; ++i) {
      float* row = biases.data() + head * bias.row_size() + DistanceBias::kMargin;
      row[-1 - i] = row[0];
      row[reach + 1 + i] = row[reach];
    }
  if (reach) bias.table = biases.data();
  const Cache cache = {keys.data(), values.data(), DType::kFloat32, block_size, kv_heads, head_dim};
  const std::vector<int32_t> starts = {0, static_cast<int32_t>(tokens)}, one_start = {0, 1};
  const int32_t length = static_cast<int32_t>(context);
  std::vector<float> out(tokens * width, NAN), alone(width, NAN);
  paged_attention(3, query.data(), width, heads, cache,
                  {tokens, 1, starts.data(), &length, table.data(), blocks, context}, 0.3f, window,
                  bias, out.data());
  const int64_t last = (tokens - 1) * width;
  paged_attention(1, query.data() + last, width, heads, cache,
                  {1, 1, one_start.data(), &length, table.data(), blocks, context}, 0.3f, window,
                  bias, alone.data());
  for (int64_t i = 0; i < width; ++i)
    if (alone[i] != out[last + i])
      expect_near(alone[i], out[last + i] + 1e9, "a token's attention alone has other bits");
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t head = 0; head < heads; ++head) {
      const float* own = query.data() + token * width + head * head_dim;
      const int64_t stop = context - tokens + token + 1;
      double mass = 0.0;
      std::vector<double> sums(head_dim, 0.0);
      for (int64_t key = window ? std::max<int64_t>(0, stop - window) : 0; key < stop; ++key) {
        double score = 0.0;
        for (int64_t i = 0; i < head_dim; ++i)
          score += double(own[i]) * keys[offset(key, head / group) + i];
        const double gain = reach ? *bias.at(head, key + 1 - stop) : 0.0;
        const double weight = std::exp(0.3 * score + gain);
        mass += weight;
        for (int64_t i = 0; i < head_dim; ++i)
          sums[i] += weight * values[offset(key, head / group) + i];
      }
      for (int64_t i = 0; i < head_dim; ++i)
        expect_near(out[token * width + head * head_dim + i], sums[i] / mass, "attention");
    }
}

}  // namespace multiexit::cpu
