#include "coded_tokens.h"

#include <algorithm>
#include <cmath>

namespace multiexit::cpu {

namespace {

// Tokens and rows whose rough logits wait in the cache together, and rows for which there is room to
// remember what is near.
constexpr int64_t kPiece = 512, kRows = 32, kMostRows = 128;
constexpr int64_t kMostNear = 2 * kPiece;

struct Near {
  float logit;
  int32_t token;
};

// The tokens of one row whose rough logits are near the best one that a thread has seen.
struct NearBest {
  float best;
  int32_t count;
  bool is_complete;
  Near found[kMostNear];

  void begin(double error) {
    best = -INFINITY;
    count = 0;
    is_complete = std::isfinite(error);
  }

  void take(const float* logits, int64_t first, int64_t size, double margin) {
    if (!is_complete) return;
    const float own = kernels().greatest(logits, size);
    if (!(own >= least(margin))) return;
    best = std::max(best, own);
    const float border = least(margin);
    if (count + size > kMostNear) keep(border);
    is_complete = count + size <= kMostNear;
    for (int64_t i = 0; is_complete && i < size; ++i)
      if (logits[i] >= border) found[count++] = {logits[i], static_cast<int32_t>(first + i)};
  }

  // Below it no token can be the best one.
  float least(double margin) const {
    return std::nextafter(static_cast<float>(best - margin), -INFINITY);
  }

  void keep(float border) {
    const auto is_far = [&](const Near& near) { return !(near.logit >= border); };
    count = static_cast<int32_t>(std::remove_if(found, found + count, is_far) - found);
  }
};

// The best of what all threads found near a row, by exact logits; -1 where they do not know it all.
int64_t best_of(NearBest* near, int64_t ranks, int64_t stride, double margin, const Linear& head,
                const float* hidden) {
  float best = -INFINITY, greatest = -INFINITY;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    if (!near[rank * stride].is_complete) return -1;
    best = std::max(best, near[rank * stride].best);
  }
  int64_t token = -1;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    NearBest& own = near[rank * stride];
    own.best = best;
    own.keep(own.least(margin));
    for (const Near* each = own.found; each < own.found + own.count; ++each) {
      float logit;
      kernels().product(hidden, 1, head.weight, each->token, 1, head.bias, &logit, 1);
      if (!(logit > greatest || (logit == greatest && each->token < token))) continue;
      greatest = logit;
      token = each->token;
    }
  }
  return token;
}

void some_tokens(int threads, const RoughRows& rows, const CodedMatrix& rough, const Linear& head,
                 int64_t* tokens) {
  Scratch& scratch = Scratch::of_this_thread();
  const int64_t ranks = std::clamp(threads, 1, kMaxThreads);
  float* rooms = scratch.room(Scratch::kPieces, ranks * kRows * kPiece);
  auto* near = scratch.room<NearBest>(Scratch::kNearBest, ranks * rows.rows);
  for (int64_t i = 0; i < ranks * rows.rows; ++i) near[i].begin(rows.errors[i % rows.rows]);
  in_chunks(threads, rough.rows, kPiece, [&](int64_t first, int64_t count, int rank) {
    float* logits = rooms + rank * kRows * kPiece;
    for (int64_t row = 0; row < rows.rows; row += kRows) {
      const int64_t some = std::min(kRows, rows.rows - row);
      kernels().coded_product(rows.codes.from(row, rough.columns), some, rough, first, count,
                              head.bias, logits, kPiece);
      for (int64_t i = row; i < row + some; ++i)
        near[rank * rows.rows + i].take(logits + (i - row) * kPiece, first, count,
                                        2 * rows.errors[i]);
    }
  });
  in_chunks(threads, rows.rows, 1, [&](int64_t row, int64_t, int) {
    tokens[row] = best_of(near + row, ranks, rows.rows, 2 * rows.errors[row], head,
                          rows.hidden + row * head.weight.columns);
  });
}

}  // namespace

void code_rows(int threads, const float* x, int64_t rows, int64_t columns, const CodedOut& out) {
  const int64_t padded = (columns + 3) / 4 * 4;
  in_chunks(threads, rows, 8, [&](int64_t first, int64_t count, int) {
    for (int64_t row = first; row < first + count; ++row) {
      const CodedRow found =
          kernels().code_row(x + row * columns, columns, padded, out.codes + row * padded);
      out.scales[row] = found.scale;
      out.norms[row] = found.norm;
      out.errors[row] = found.error;
    }
  });
}

void coded_head_tokens(int threads, const RoughRows& rows, const CodedMatrix& rough,
                       const Linear& head, int64_t* tokens) {
  for (int64_t first = 0; first < rows.rows; first += kMostRows)
    some_tokens(threads,
                {rows.hidden + first * head.weight.columns, rows.codes.from(first, rough.columns),
                 rows.errors + first, std::min(kMostRows, rows.rows - first)},
                rough, head, tokens + first);
}

}  // namespace multiexit::cpu
