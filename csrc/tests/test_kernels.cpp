// Runs every kernel of every instruction set on buffers of exactly the size that it may touch, so
// that AddressSanitizer and UBSan see each step too far. Values are held against plain loops.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/block.h"
#include "cpu/coded_tokens.h"
#include "cpu/head_statistics.h"
#include "cpu/heads.h"
#include "cpu/packed_block.h"

using namespace multiexit::cpu;

namespace {

int failures = 0;

void expect_near(double actual, double expected, const char* what) {
  if (std::abs(actual - expected) <= 1e-4 * (1 + std::abs(expected))) return;
  std::printf("%s, %s: %g, expected %g\n", kernels().name, what, actual, expected);
  ++failures;
}

std::vector<float> numbers(int64_t count, float scale = 1.0f) {
  static uint32_t state = 1;
  std::vector<float> out(count);
  for (float& x : out) {
    state = state * 1664525u + 1013904223u;
    x = scale * (static_cast<float>(state >> 8) / (1 << 23) - 1.0f);
  }
  return out;
}

void products() {
  for (int64_t tokens : {1, 2, 5, 7, 13})
    for (int64_t columns : {1, 7, 16, 33, 100})
      for (int64_t rows : {1, 3, 9, 37}) {
        const auto x = numbers(tokens * columns), weight = numbers(rows * columns);
        const auto bias = numbers(rows);
        std::vector<float> out(tokens * rows);
        const Linear linear = {{weight.data(), DType::kFloat32, rows, columns}, bias.data()};
        multiply(3, x.data(), tokens, linear, out.data(), kNothingMore);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < rows; ++r) {
            double sum = bias[r];
            for (int64_t i = 0; i < columns; ++i)
              sum += double(x[t * columns + i]) * weight[r * columns + i];
            expect_near(out[t * rows + r], sum, "product");
          }
      }
}

// Codes of 1 and -3 in turn, with a scale of 1, 2, 3, ... for the groups of a row.
void quantized_products(int bits, int64_t group_size) {
  for (int64_t tokens : {1, 2, 3, 4, 9})
    for (int64_t columns : {1, 33, 64, 100, 550})
      for (int64_t rows : {1, 5, 19}) {
        Matrix matrix = {nullptr, DType::kFloat32, rows, columns, bits, nullptr, group_size};
        std::vector<uint8_t> codes(rows * matrix.row_bytes(), bits == 8 ? 0 : 0x88);
        std::vector<BFloat16> scales(rows * matrix.groups());
        for (int64_t i = 0; i < rows * matrix.groups(); ++i) {
          const float scale = i % matrix.groups() + 1;
          kernels().from_float(&scale, &scales[i], DType::kBFloat16, 1);
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c) {
            uint8_t* row = codes.data() + r * matrix.row_bytes();
            const int code = (r + c) % 2 ? 1 : -3;
            if (bits == 8)
              row[c] = static_cast<uint8_t>(code);
            else
              row[c / 32 * 16 + c % 16] += code * (c % 32 < 16 ? 1 : 16);
          }
        matrix.data = codes.data();
        matrix.scales = scales.data();
        const auto x = numbers(tokens * columns);
        std::vector<float> out(tokens * rows);
        multiply(3, x.data(), tokens, {matrix, nullptr}, out.data(), kNothingMore);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < rows; ++r) {
            double sum = 0.0;
            for (int64_t c = 0; c < columns; ++c)
              sum += x[t * columns + c] * ((r + c) % 2 ? 1.0 : -3.0) * (c / group_size + 1);
            expect_near(out[t * rows + r], sum, "quantized product");
          }
      }
}

void conversions() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16})
    for (int64_t count : {1, 8, 16, 17, 31}) {
      const auto x = numbers(count, 100.0f);
      std::vector<uint16_t> half(count);
      std::vector<float> back(count);
      kernels().from_float(x.data(), half.data(), dtype, count);
      kernels().to_float(half.data(), dtype, back.data(), count);
      for (int64_t i = 0; i < count; ++i)
        if (std::abs(back[i] - x[i]) > std::abs(x[i]) / 128) expect_near(back[i], x[i], "half");
    }
}

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

// Codes of the head [vocab, columns] and of the states, with scales of powers of two.
void coded_heads(int64_t vocab, int64_t rows, int64_t columns) {
  const int64_t lanes = CodedMatrix::kLanes, padded = (vocab + lanes - 1) / lanes * lanes;
  std::vector<int8_t> codes(padded * columns);
  std::vector<int32_t> starts(padded);
  std::vector<float> scales(padded, 0.0f), logits(vocab);
  const auto code_at = [&](int64_t row, int64_t column) -> int8_t& {
    return codes[row / lanes * lanes * columns + column / 4 * lanes * 4 + row % lanes * 4 +
                 column % 4];
  };
  for (int64_t row = 0; row < vocab; ++row) {
    scales[row] = 1.0f / 1024;
    for (int64_t i = 0; i < columns; ++i) {
      code_at(row, i) = static_cast<int8_t>((row * 7 + i * 13) % 255 - 127);
      starts[row] -= 128 * code_at(row, i);
    }
  }
  std::vector<uint8_t> hidden(rows * columns);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = static_cast<uint8_t>(i * 31);
  const std::vector<float> hidden_scales(rows, 1.0f / 64);
  const auto bias = numbers(vocab);
  std::vector<int64_t> likely(rows);
  std::vector<float> first(rows), second(rows), log_sum(rows), entropy(rows);
  coded_head_statistics(2, {hidden.data(), hidden_scales.data()}, 1, rows,
                        {codes.data(), starts.data(), scales.data(), vocab, columns}, bias.data(),
                        {likely.data(), first.data(), second.data(), log_sum.data(),
                         entropy.data()});
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t v = 0; v < vocab; ++v) {
      int64_t sum = 0;
      for (int64_t i = 0; i < columns; ++i) sum += (hidden[row * columns + i] - 128) * code_at(v, i);
      logits[v] = sum / 65536.0f + bias[v];
    }
    const int64_t best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    double mass = 0.0;
    for (float logit : logits) mass += std::exp(double(logit) - logits[best]);
    expect_near(likely[row], best, "likely token of codes");
    expect_near(first[row], -std::log(mass), "its log-probability");
  }
  // Errors so large that all tokens are near, and so small that only exact equals are.
  const auto states = numbers(rows * columns), weight = numbers(vocab * columns);
  const Linear head = {{weight.data(), DType::kFloat32, vocab, columns}, bias.data()};
  std::vector<uint8_t> coded(rows * 2 * columns);
  std::vector<float> coded_scales(rows * 2), heats(rows, 0.0f), log_probs(rows);
  std::vector<double> norms(rows), slacks(rows);
  const std::vector<float> factors(columns, 1.0f);
  code_rows(2, states.data(), factors.data(), rows, columns,
            {2, coded.data(), coded_scales.data(), norms.data(), slacks.data()});
  coded_head_statistics(2, {coded.data(), coded_scales.data()}, 2, rows,
                        {codes.data(), starts.data(), scales.data(), vocab, columns}, bias.data(),
                        {likely.data(), first.data(), second.data(), log_sum.data(),
                         entropy.data()});
  for (int64_t row = 0; row < rows; ++row) {
    double best = -INFINITY;
    for (int64_t v = 0; v < vocab; ++v) {
      double logit = bias[v];
      for (int64_t i = 0; i < columns; ++i) logit += states[row * columns + i] * code_at(v, i) / 1024.0;
      best = std::max(best, logit);
    }
    expect_near(first[row] + log_sum[row], best, "greatest logit of two terms");
  }
  const std::vector<float> reaches(rows, 1.0f), alphas(rows, 0.1f);
  const std::vector<int64_t> seeds(rows, 5);
  std::vector<int32_t> counts(rows);
  const LowerHead lower = {rows / 2, rows - rows / 2, states.data(), head, alphas.data(), nullptr};
  for (float heat : {0.0f, 0.8f})
    for (double slack : {1e6, 0.0})
      for (bool is_contrasted : {false, true}) {
        std::fill(slacks.begin(), slacks.end(), slack);
        std::fill(heats.begin(), heats.begin() + (rows + 1) / 2, heat);
        const std::vector<float> errors(padded, slack > 0.0 ? 1.0f : 0.0f);
        const std::vector<LowerHead> lowers(is_contrasted ? 1 : 0, lower);
        coded_head_tokens(
            2, {states.data(), {coded.data(), coded_scales.data()}, 2, reaches.data(), slacks.data(),
                rows},
            {{codes.data(), starts.data(), scales.data(), vocab, columns}, errors.data()}, head,
            lowers,
            {heats.data(), seeds.data(), seeds.data(), likely.data(), log_probs.data(),
             counts.data()});
        for (int64_t token : likely)
          if (token < -1 || token >= vocab) expect_near(token, 0, "token by codes");
      }
}

// One sequence over the borders of splits: a prompt's tokens at once, and its last one alone. With
// a reach scores have a bias, which is the same from so many places before the query on.
void attention(int64_t tokens, int64_t context, int64_t window, int64_t group, int64_t head_dim,
               int64_t reach = 0) {
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

void heads(int64_t vocab) {
  const int64_t rows = 3, columns = 9;
  const auto hidden = numbers(rows * columns), weight = numbers(vocab * columns, 2.0f);
  const Matrix matrix = {weight.data(), DType::kFloat32, vocab, columns};
  const std::vector<float> alpha(rows, 0.1f), temperature = {0.0f, 1.0f, 0.5f};
  const std::vector<int64_t> state = {1, -2, 3};
  std::vector<int64_t> tokens(rows);
  std::vector<int32_t> counts(rows), again(rows);
  std::vector<float> log_probs(rows), logits(rows * vocab), contrasted(rows * vocab);
  const Choice choice = {temperature.data(), state.data(), state.data(), tokens.data(),
                         log_probs.data(), counts.data()};
  const HeadPair pair = {
      hidden.data(), matrix, {0, rows, hidden.data(), {matrix, nullptr}, alpha.data(), nullptr}};
  head_logits(2, hidden.data(), rows, {matrix, nullptr}, logits.data());
  head_tokens(2, hidden.data(), rows, {matrix, nullptr}, choice);
  int64_t best = 0;
  for (int64_t v = 1; v < vocab; ++v)
    if (logits[v] > logits[best]) best = v;
  expect_near(tokens[0], best, "greedy token");
  std::vector<int64_t> likely(rows);
  std::vector<float> first(rows), second(rows), log_sum(rows), entropy(rows);
  head_statistics(2, hidden.data(), rows, {matrix, nullptr},
                  {likely.data(), first.data(), second.data(), log_sum.data(), entropy.data()});
  double mass = 0.0, surprise = 0.0;
  for (int64_t v = 0; v < vocab; ++v) mass += std::exp(double(logits[v]));
  for (int64_t v = 0; v < vocab; ++v)
    surprise += std::exp(double(logits[v])) / mass * (std::log(mass) - logits[v]);
  expect_near(likely[0], best, "likely token");
  expect_near(first[0], logits[best] - std::log(mass), "its log-probability");
  expect_near(log_sum[0], std::log(mass), "log of the sum of exponentials");
  expect_near(entropy[0], surprise, "entropy");
  std::nth_element(logits.begin(), logits.begin() + 1, logits.begin() + vocab, std::greater<>());
  if (vocab > 1) expect_near(second[0], logits[1] - std::log(mass), "second log-probability");
  contrast_tokens(2, pair, rows, choice);
  contrast_heads(2, pair, rows, contrasted.data(), again.data());
  for (int64_t row = 0; row < rows; ++row) {
    expect_near(counts[row], again[row], "candidates");
    double sum = 0.0;
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(double(contrasted[row * vocab + v]));
    expect_near(sum, 1.0, "mass of a contrast");
    expect_near(contrasted[row * vocab + tokens[row]], log_probs[row], "log-probability");
  }
}

// A number of e4m3 by its definition.
double meaning(int code) {
  const int exponent = code >> 3 & 15;
  const double size = exponent ? std::ldexp(8 + (code & 7), exponent - 10) : std::ldexp(code & 7, -9);
  return code & 128 ? -size : size;
}

// Every number of e4m3 in every lane, one scale for a row.
void floats_of_8_bits() {
  constexpr int64_t kRows = 3, kColumns = 550;
  Matrix matrix = {nullptr, DType::kFloat32, kRows, kColumns, 8, nullptr, 576, true};
  std::vector<uint8_t> codes(kRows * matrix.row_bytes(), 0);
  std::vector<BFloat16> scales(kRows);
  for (int64_t r = 0; r < kRows; ++r) {
    const float scale = 1.0f / (r + 1);
    kernels().from_float(&scale, &scales[r], DType::kBFloat16, 1);
    for (int64_t c = 0; c < kColumns; ++c)
      codes[r * matrix.row_bytes() + c] = (c + 37 * r) % 128 == 127 ? 0 : (c + 37 * r) % 256;
  }
  matrix.data = codes.data();
  matrix.scales = scales.data();
  for (int64_t tokens : {1, 9}) {
    const auto x = numbers(tokens * kColumns);
    std::vector<float> out(tokens * kRows);
    multiply(3, x.data(), tokens, {matrix, nullptr}, out.data(), kNothingMore);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < kRows; ++r) {
        float scale;
        kernels().to_float(&scales[r], DType::kBFloat16, &scale, 1);
        double sum = 0.0;
        for (int64_t c = 0; c < kColumns; ++c)
          sum += x[t * kColumns + c] * scale * meaning(codes[r * matrix.row_bytes() + c]);
        expect_near(out[t * kRows + r] / 448, sum / 448, "product of numbers of 8 bits");
      }
  }
}

}  // namespace

int main() {
  for (const char* isa : {"scalar", "avx2", "avx512", "avx512bf16"}) {
    if (!choose_isa(isa)) continue;
    products();
    for (int bits : {8, 4})
      for (int64_t group_size : {32, 64}) quantized_products(bits, group_size);
    floats_of_8_bits();
    conversions();
    for (int64_t head_dim : {1, 6, 16, 70})
      for (int64_t window : {0, 2})
        for (bool is_gated : {false, true})
          for (bool is_bart : {false, true}) blocks(is_gated, is_bart, head_dim, window);
    for (int64_t group : {1, 3})
      for (int64_t window : {0, 1, 150}) {
        attention(1, 1, window, group, 7);
        attention(3, 129, window, group, 80);
        attention(70, 300, window, group, 18);
        for (int64_t reach : {1, 30, 500}) attention(70, 300, window, group, 18, reach);
      }
    for (int64_t vocab : {1, 7, 513, 1031}) heads(vocab);
    for (int64_t head_dim : {1, 6, 16, 20})
      for (bool is_bart : {false, true})
        for (bool is_gated : {false, true}) packed_texts(is_bart, is_gated, head_dim);
    for (int64_t vocab : {1, 16, 530})
      for (int64_t rows : {1, 12, 27}) coded_heads(vocab, rows, 36);
  }
  std::printf("%d failures\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
