#include "head_statistics.h"

#include <algorithm>
#include <cmath>

namespace multiexit::cpu {

namespace {

// Tokens of a piece. Sums are made piece by piece, so this is part of the result and does not
// depend on the number of threads.
constexpr int64_t kPiece = 512;

void unite(const Distribution* pieces, int64_t count, int64_t row, const HeadStatistics& out) {
  const Distribution* best = pieces;
  for (const Distribution* piece = pieces; piece < pieces + count; ++piece)
    if (piece->max > best->max) best = piece;
  const double max = best->max;
  double second = best->second, sum = 0.0, drops = 0.0;
  for (const Distribution* piece = pieces; piece < pieces + count; ++piece) {
    if (piece != best) second = std::max<double>(second, piece->max);
    if (piece->sum == 0.0f) continue;
    const double drop = piece->max - max, share = std::exp(drop);
    sum += share * piece->sum;
    drops += share * (piece->drops + drop * piece->sum);
  }
  // NaN where a piece is NaN, where a logit is +inf, and where all are -inf.
  const double log_sum = std::log(sum), entropy = log_sum - drops / sum;
  const double blank = entropy - entropy;
  out.tokens[row] = best->argmax;
  out.log_probs[row] = static_cast<float>(blank - log_sum);
  out.second_log_probs[row] = static_cast<float>(blank + second - max - log_sum);
  out.log_sum_exp[row] = static_cast<float>(blank + max + log_sum);
  out.entropy[row] = static_cast<float>(std::max(entropy, 0.0) + blank);
}

// Rows whose logits of a piece wait in the cache together.
constexpr int64_t kRows = 32;
// Rows whose pieces a thread unites at once: some 2 us each.
constexpr int64_t kRowsOfUnion = 4;

}  // namespace

void head_statistics(int threads, const float* hidden, int64_t rows, const Linear& head,
                     const HeadStatistics& out) {
  const Kernels& k = kernels();
  const auto* input = static_cast<const char*>(input_of(threads, hidden, rows, head.weight));
  const int64_t row_bytes = head.weight.columns * size_of(k.input_dtype(head.weight.dtype));
  const int64_t vocab = head.weight.rows;
  const int64_t pieces = (vocab + kPiece - 1) / kPiece;
  Scratch& scratch = Scratch::of_this_thread();
  const int64_t ranks = std::clamp(threads, 1, kMaxThreads);
  float* rooms = scratch.room(Scratch::kPieces, ranks * kRows * kPiece);
  auto* found = scratch.room<Distribution>(Scratch::kDistributions, rows * pieces);
  in_chunks(threads, vocab, kPiece, [&](int64_t first, int64_t count, int rank) {
    float* logits = rooms + rank * kRows * kPiece;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t some = std::min(kRows, rows - row);
      k.product(input + row * row_bytes, some, head.weight, first, count, head.bias, logits,
                kPiece);
      for (int64_t i = 0; i < some; ++i) {
        Distribution& piece = found[(row + i) * pieces + first / kPiece];
        piece = k.distribution(logits + i * kPiece, count);
        piece.argmax += first;
      }
    }
  });
  in_chunks(threads, rows, kRowsOfUnion, [&](int64_t first, int64_t count, int) {
    for (int64_t row = first; row < first + count; ++row)
      unite(found + row * pieces, pieces, row, out);
  });
}

}  // namespace multiexit::cpu
