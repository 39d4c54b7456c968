// Tokens and statistics of heads, exact and by 8-bit codes.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/coded_tokens.h"
#include "cpu/head_statistics.h"
#include "cpu/heads.h"
#include "cpu/rough_sums.h"
#include "tests/kernels/tests.h"

namespace multiexit::cpu {

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

// Codes of the head [vocab, columns] and of the states, with scales of powers of two.
void coded_heads(int64_t vocab, int64_t rows, int64_t columns) {
  const int64_t lanes = CodedMatrix::kLanes, padded = (vocab + lanes - 1) / lanes * lanes;
  std::vector<int8_t> codes(padded * columns);
  std::vector<int32_t> starts(padded);
  std::vector<float> scales(padded, 0.0f);
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
  const auto bias = numbers(vocab);
  std::vector<int64_t> likely(rows);
  // Errors so large that all tokens are near, and so small that only exact equals are.
  const auto states = numbers(rows * columns), weight = numbers(vocab * columns);
  const Linear head = {{weight.data(), DType::kFloat32, vocab, columns}, bias.data()};
  std::vector<uint8_t> coded(rows * 2 * columns);
  std::vector<float> coded_scales(rows * 2), heats(rows, 0.0f), log_probs(rows);
  std::vector<double> norms(rows), slacks(rows);
  const std::vector<float> factors(columns, 1.0f);
  code_rows(2, states.data(), factors.data(), rows, columns,
            {2, coded.data(), coded_scales.data(), norms.data(), slacks.data()});
  const std::vector<float> reaches(rows, 1.0f), alphas(rows, 0.1f), mean(columns, 0.0f);
  const std::vector<float> nothing(padded, 0.0f);
  std::vector<double> sums(rows * RoughSums::kNumbers);
  rough_head_sums(
      2, {states.data(), {coded.data(), coded_scales.data()}, 2, reaches.data(), slacks.data(), rows},
      {{codes.data(), starts.data(), scales.data(), vocab, columns}, nothing.data()}, head,
      mean.data(), {likely.data(), sums.data()});
  for (int64_t row = 0; row < rows; ++row) {
    const double* own = sums.data() + row * RoughSums::kNumbers;
    double near = -INFINITY, rest = 0.0;
    for (int64_t v = 0; v < vocab; ++v) {
      double rough = bias[v], exact = bias[v];
      for (int64_t i = 0; i < columns; ++i) {
        rough += states[row * columns + i] * code_at(v, i) / 1024.0;
        exact += double(states[row * columns + i]) * weight[v * columns + i];
      }
      if (rough - own[0] >= own[4] - 2e-5) near = std::max(near, exact);
      else rest += std::exp(rough - own[0]);
    }
    expect_near(own[0], near, "greatest exact logit near");
    // Which of two equals is near is a matter of rounding.
    if (!(std::abs(own[5] - rest) <= 1e-2 * (1 + rest))) expect_near(own[5], rest, "rough sum");
  }
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

}  // namespace multiexit::cpu
