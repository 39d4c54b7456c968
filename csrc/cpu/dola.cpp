#include "dola.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace multiexit::cpu {

namespace {

// Tokens of a piece. Sums are made piece by piece, so this is part of the result and does not
// depend on the number of threads.
constexpr int64_t kPiece = 512;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

int64_t pieces_of(int64_t vocab) { return (vocab + kPiece - 1) / kPiece; }

// +inf counts as the largest finite number.
RowStatistics finite_statistics(const float* x, int64_t count) {
  const RowStatistics found = kernels().statistics(x, count);
  if (!(found.max > kMostLogit)) return found;
  float room[kPiece];
  for (int64_t i = 0; i < count; ++i) room[i] = std::min(x[i], kMostLogit);
  return kernels().statistics(room, count);
}

// NaN where a piece is NaN, and where all are -inf.
LogSoftmax united(const RowStatistics* pieces, int64_t count) {
  float max = pieces[0].max;
  for (int64_t i = 1; i < count; ++i) max = std::max(max, pieces[i].max);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i)
    if (pieces[i].sum != 0.0f)
      sum += pieces[i].sum * std::exp(static_cast<double>(pieces[i].max) - max);
  return {max, static_cast<float>(std::log(sum))};
}

// What is known of each row of logits, the mature ones first.
class Layers {
 public:
  Layers(int threads, const LayerLogits& logits)
      : logits_(logits), pieces_(pieces_of(logits.vocab)) {
    const int64_t rows = (1 + logits.candidates) * logits.rows;
    Scratch& scratch = Scratch::of_this_thread();
    statistics_ = scratch.room<RowStatistics>(Scratch::kSummaries, rows * pieces_);
    softmax_ = scratch.room<LogSoftmax>(Scratch::kDistributions, rows);
    in_chunks(threads, logits.vocab, kPiece, [&](int64_t first, int64_t count, int) {
      for (int64_t row = 0; row < rows; ++row)
        statistics_[row * pieces_ + first / kPiece] =
            finite_statistics(numbers(row) + first, count);
    });
    for (int64_t row = 0; row < rows; ++row)
      softmax_[row] = united(statistics_ + row * pieces_, pieces_);
  }

  const float* numbers(int64_t row) const {
    const bool is_mature = row < logits_.rows;
    return is_mature ? logits_.mature + row * logits_.vocab
                     : logits_.premature + (row - logits_.rows) * logits_.vocab;
  }
  const LogSoftmax& softmax(int64_t row) const { return softmax_[row]; }
  float greatest(int64_t row, int64_t piece) const {
    return statistics_[row * pieces_ + piece].max;
  }
  int64_t premature(int64_t candidate, int64_t row) const {
    return (1 + candidate) * logits_.rows + row;
  }

 private:
  const LayerLogits& logits_;
  const int64_t pieces_;
  RowStatistics* statistics_;
  LogSoftmax* softmax_;
};

void find_divergences(int threads, const LayerLogits& logits, const Layers& layers,
                      bool is_published, float* out) {
  const int64_t pieces = pieces_of(logits.vocab), pairs = logits.candidates * logits.rows;
  float* parts = Scratch::of_this_thread().room(Scratch::kPieces, pairs * pieces);
  in_chunks(threads, logits.vocab, kPiece, [&](int64_t first, int64_t count, int) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t row = pair % logits.rows, lower = logits.rows + pair;
      parts[pair * pieces + first / kPiece] = kernels().divergence(
          layers.numbers(row) + first, layers.softmax(row), layers.numbers(lower) + first,
          layers.softmax(lower), is_published, count);
    }
  });
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double sum = 0.0;
    for (int64_t i = 0; i < pieces; ++i) sum += parts[pair * pieces + i];
    out[pair] = static_cast<float>(0.5 * sum / (is_published ? logits.vocab : 1));
  }
}

// Of equals the first; NaN before all, as the row then has no numbers.
int64_t most_different(const float* divergences, int64_t candidates, int64_t rows, int64_t row) {
  int64_t best = 0;
  for (int64_t i = 0; i < candidates; ++i) {
    const float own = divergences[i * rows + row];
    if (own != own) return i;
    if (own > divergences[best * rows + row]) best = i;
  }
  return best;
}

// The best token of a piece, and its part of the sum over scores.
struct Found {
  NoisyBest best;
  float score, max, sum;
};

// A row against its premature layer.
struct Difference {
  const float* mature;
  const float* premature;
  LogSoftmax above, below;
  float threshold;  // the least log-probability of a plausible token

  float log_prob(float logit) const {
    return std::min(logit, kMostLogit) - above.max - above.log_sum;
  }
  float score(int64_t token) const {
    const float below_it = std::min(premature[token], kMostLogit) - below.max - below.log_sum;
    // a premature head that rules a token out makes its score large, not infinite
    return log_prob(mature[token]) - std::max(below_it, -kMostLogit);
  }
};

Found best_of(const Difference& row, int64_t first, int64_t count, const Noise& noise) {
  float scores[kPiece];
  for (int64_t i = 0; i < count; ++i) {
    const bool is_plausible = row.log_prob(row.mature[first + i]) >= row.threshold;
    scores[i] = is_plausible ? row.score(first + i) : kNothing;
  }
  const RowStatistics found = kernels().statistics(scores, count);
  NoisyBest best = {found.max, first + found.argmax};
  if (noise.heat > 0)
    best = kernels().noisy_best(scores, first, count, noise.heat, noise.seed, noise.position);
  return {best, scores[best.token - first], found.max, found.sum};
}

void choose(const Found* pieces, int64_t count, int64_t row, const Choice& choice) {
  const Found* best = pieces;
  float max = pieces->max;
  for (const Found* piece = pieces; piece < pieces + count; ++piece) {
    max = std::max(max, piece->max);
    if (piece->best.value > best->best.value) best = piece;
  }
  double sum = 0.0;
  for (const Found* piece = pieces; piece < pieces + count; ++piece)
    if (piece->sum != 0.0f) sum += piece->sum * std::exp(static_cast<double>(piece->max) - max);
  choice.tokens[row] = best->best.token;
  choice.log_probs[row] = static_cast<float>(best->score - max - std::log(sum));
}

}  // namespace

void js_divergences(int threads, const LayerLogits& logits, bool is_published, float* out) {
  find_divergences(threads, logits, Layers(threads, logits), is_published, out);
}

void dola_tokens(int threads, const LayerLogits& logits, const float* relative_top,
                 bool is_published, const Choice& choice, int64_t* places) {
  const int64_t rows = logits.rows, pieces = pieces_of(logits.vocab);
  const Layers layers(threads, logits);
  Scratch& scratch = Scratch::of_this_thread();
  float* divergences = scratch.room(Scratch::kOffsets, logits.candidates * rows);
  const bool is_compared = logits.candidates > 1;
  if (is_compared) find_divergences(threads, logits, layers, is_published, divergences);
  auto* differences = scratch.room<Difference>(Scratch::kPlans, rows);
  for (int64_t row = 0; row < rows; ++row) {
    places[row] = is_compared ? most_different(divergences, logits.candidates, rows, row) : 0;
    const int64_t lower = layers.premature(places[row], row);
    const LogSoftmax& above = layers.softmax(row);
    const float threshold = std::log(relative_top[row]) - above.log_sum;
    differences[row] = {layers.numbers(row), layers.numbers(lower), above, layers.softmax(lower),
                        std::max(threshold, -kMostLogit)};
  }
  auto* found = scratch.room<Found>(Scratch::kNoisy, rows * pieces);
  in_chunks(threads, logits.vocab, kPiece, [&](int64_t first, int64_t count, int) {
    const int64_t piece = first / kPiece;
    for (int64_t row = 0; row < rows; ++row) {
      const Difference& own = differences[row];
      const Noise noise = {choice.temperature[row], static_cast<uint64_t>(choice.seeds[row]),
                           static_cast<uint32_t>(choice.positions[row])};
      Found& place = found[row * pieces + piece];
      const bool has_plausible = own.log_prob(layers.greatest(row, piece)) >= own.threshold;
      place = has_plausible ? best_of(own, first, count, noise)
                            : Found{{kNothing, first}, kNothing, kNothing, 0.0f};
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    choose(found + row * pieces, pieces, row, choice);
    const Difference& own = differences[row];
    const float sums = own.above.log_sum + own.below.log_sum;
    if (sums != sums) choice.log_probs[row] = sums;
  }
}

}  // namespace multiexit::cpu
