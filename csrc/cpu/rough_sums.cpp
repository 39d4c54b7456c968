#include "rough_sums.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace multiexit::cpu {

namespace {

// Tokens that a thread multiplies at once; sums are made piece by piece.
constexpr int64_t kPiece = 512;
constexpr int64_t kBlocksOfPiece = kPiece / kRoughBlock;
// Lines of codes whose products with a piece wait in the cache together.
constexpr int64_t kLines = 32;
// Blocks whose greatest tokens are near, and near tokens that a row may have.
constexpr int64_t kNearBlocks = 32, kMostNear = kNearBlocks * kRoughBlock;
// Logits that wait together: 16 MB of them stay in a cache that cores share.
constexpr int64_t kWaiting = 4 << 20, kMostRows = 64;

// What one row's logits are summed from.
struct Row {
  const float* hidden;
  const void* input;    // as products with the head read it
  float* logits;        // [vocab] rough ones, less what all have in common
  const float* uppers;  // of each block of tokens, what one of its rough logits can be at most
  float reach;
};

double dot(const float* x, const float* y, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += double(x[i]) * y[i];
  return sum;
}

// At least `kNearBlocks` tokens reach it, if there are so many blocks.
float border_of(const float* uppers, int64_t blocks) {
  if (blocks <= kNearBlocks) return -INFINITY;
  float* order = Scratch::of_this_thread().room(Scratch::kOrder, blocks);
  std::copy_n(uppers, blocks, order);
  std::nth_element(order, order + kNearBlocks - 1, order + blocks, std::greater<>());
  return order[kNearBlocks - 1];
}

// The tokens that reach the border, ascending; more than there is room for are -1.
int64_t find_all_near(const Row& row, const RoughHead& rough, float border, int32_t* near) {
  Near found[kRoughBlock];
  int64_t count = 0;
  for (int64_t first = 0; first < rough.codes.rows; first += kRoughBlock) {
    if (!(row.uppers[first / kRoughBlock] >= border)) continue;
    const int64_t size = std::min(kRoughBlock, rough.codes.rows - first);
    const int64_t some = kernels().find_near(
        {row.logits + first, nullptr, nullptr, rough.errors + first, row.reach, first, size},
        border, found);
    if (count + some > kMostNear) return -1;
    for (int64_t i = 0; i < some; ++i) near[count++] = found[i].token;
  }
  return count;
}

void sum_row(const Row& row, const RoughHead& rough, const Linear& head, const float* mean,
             int64_t* token, double* out) {
  const int64_t vocab = rough.codes.rows;
  const float border = border_of(row.uppers, (vocab + kRoughBlock - 1) / kRoughBlock);
  int32_t near[kMostNear];
  float exact[kMostNear];
  const int64_t count = find_all_near(row, rough, border, near);
  *token = 0;
  std::fill_n(out, RoughSums::kNumbers, std::numeric_limits<double>::quiet_NaN());
  if (count < 1) return;
  kernels().gathered_product(row.input, head.weight, near, count, head.bias, exact);
  int64_t place = 0;
  for (int64_t i = 0; i < count; ++i) {
    row.logits[near[i]] = -INFINITY;
    if (exact[i] > exact[place]) place = i;
  }
  const double best = exact[place];
  double second = -INFINITY, near_sum = 0.0, near_drops = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    if (i != place) second = std::max<double>(second, exact[i]);
    const double drop = std::max(exact[i] - best, -1e3), share = std::exp(drop);
    near_sum += share;
    near_drops += share * drop;
  }
  const double shift = dot(row.hidden, mean, head.weight.columns) - best;
  double sums[5] = {};
  for (int64_t first = 0; first < vocab; first += kPiece) {
    const ExpSums piece = kernels().exp_sums(row.logits + first, static_cast<float>(shift),
                                             std::min(kPiece, vocab - first));
    const float parts[5] = {piece.sum, piece.drops, piece.squares, piece.square_drops,
                            piece.squared_drops};
    for (int i = 0; i < 5; ++i) sums[i] += parts[i];
  }
  *token = near[place];
  out[0] = best;
  out[1] = second - best;
  out[2] = near_sum;
  out[3] = near_drops;
  out[4] = border + shift;
  std::copy_n(sums, 5, out + 5);
}

// A piece's logits of some rows, and the upper ends of its blocks.
void multiply_piece(const RoughRows& rows, const RoughHead& rough, const float* bias,
                    int64_t first, int64_t count, float* room, float* logits, float* uppers,
                    int64_t blocks) {
  const int64_t columns = rough.codes.columns, vocab = rough.codes.rows;
  const int64_t together = kLines / rows.terms;
  for (int64_t row = 0; row < rows.rows; row += together) {
    const int64_t some = std::min(together, rows.rows - row);
    kernels().coded_product(rows.codes.from(row * rows.terms, columns), some * rows.terms,
                            rough.codes, first, count, nullptr, room, kPiece);
    if (rough.finer.codes) {
      float* added = room + kLines * kPiece;
      kernels().coded_product(rows.codes.from(row * rows.terms, columns), some * rows.terms,
                              rough.finer, first, count, nullptr, added, kPiece);
      for (int64_t line = 0; line < some * rows.terms; ++line)
        kernels().add(added + line * kPiece, room + line * kPiece, count);
    }
    for (int64_t i = row; i < row + some; ++i) {
      float* own = room + (i - row) * rows.terms * kPiece;
      kernels().sum_blocks({own, rows.terms > 1 ? own + kPiece : nullptr,
                            bias ? bias + first : nullptr, rough.errors + first, rows.reaches[i],
                            first, count},
                           logits + i * vocab + first, uppers + i * blocks + first / kRoughBlock);
    }
  }
}

void sum_rows(int threads, const RoughRows& rows, const RoughHead& rough, const Linear& head,
              const float* mean, const RoughSums& out) {
  Scratch& scratch = Scratch::of_this_thread();
  const int64_t ranks = std::clamp(threads, 1, kMaxThreads), vocab = rough.codes.rows;
  const int64_t blocks = (vocab + kPiece - 1) / kPiece * kBlocksOfPiece;
  const int64_t room_size = (rough.finer.codes ? 2 : 1) * kLines * kPiece;
  float* rooms = scratch.room(Scratch::kPieces, ranks * room_size);
  float* logits = scratch.room(Scratch::kLogits, rows.rows * vocab);
  float* uppers = scratch.room(Scratch::kUppers, rows.rows * blocks);
  in_chunks(threads, vocab, kPiece, [&](int64_t first, int64_t count, int rank) {
    multiply_piece(rows, rough, head.bias, first, count, rooms + rank * room_size, logits, uppers,
                   blocks);
  });
  const Inputs inputs(threads, rows.hidden, rows.rows, head.weight);
  in_chunks(threads, rows.rows, 1, [&](int64_t row, int64_t, int) {
    sum_row({rows.hidden + row * head.weight.columns, inputs.row(row), logits + row * vocab,
             uppers + row * blocks, rows.reaches[row]},
            rough, head, mean, out.tokens + row, out.numbers + row * RoughSums::kNumbers);
  });
}

}  // namespace

void rough_head_sums(int threads, const RoughRows& rows, const RoughHead& rough,
                     const Linear& head, const float* mean, const RoughSums& out) {
  const int64_t together = std::clamp<int64_t>(kWaiting / rough.codes.rows, 1, kMostRows);
  for (int64_t first = 0; first < rows.rows; first += together)
    sum_rows(threads,
             rows.from(first, std::min(together, rows.rows - first), head.weight.columns,
                       rough.codes.columns),
             rough, head, mean,
             {out.tokens + first, out.numbers + first * RoughSums::kNumbers});
}

}  // namespace multiexit::cpu
