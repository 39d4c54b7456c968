#include "heads.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>

#include "ratios.h"

namespace multiexit::cpu {

namespace {

// Tokens of a chunk. Sums over the vocabulary are made chunk by chunk, so this is part of the
// result and does not depend on the number of threads.
constexpr int64_t kChunk = 512;
// Candidates of a row that a thread takes at once, and the share of the vocabulary for each of the
// first four rows beyond which the whole lower head is read: see SPARSE_SHARE in ops/contrast.py.
constexpr int64_t kFetched = 16;
constexpr double kSparseShare = 0.25;

struct Row {
  float max, log_sum;
  int64_t argmax;
};

int64_t chunks_of(int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

// +inf counts as the largest finite number in a contrast.
RowStatistics finite_statistics(float* x, int64_t count) {
  const RowStatistics found = kernels().statistics(x, count);
  if (!(found.max > FLT_MAX)) return found;
  for (int64_t i = 0; i < count; ++i) x[i] = std::min(x[i], FLT_MAX);
  return kernels().statistics(x, count);
}

// Logits of a head, with what was found about each row's chunks on the way.
struct Streamed {
  int64_t vocab;
  float* logits;                    // [rows, vocab]
  const RowStatistics* statistics;  // [rows, chunks]

  float* row(int64_t index) const { return logits + index * vocab; }
  const RowStatistics* chunks_of_row(int64_t index) const {
    return statistics + index * chunks_of(vocab);
  }
};

// `is_contrasted(row)`: +inf is clamped there.
template <class IsContrasted>
Streamed stream_head(int threads, const float* hidden, int64_t rows, const Linear& head,
                     IsContrasted&& is_contrasted, float* logits) {
  const int64_t vocab = head.weight.rows, chunks = chunks_of(vocab);
  auto* found = Scratch::of_this_thread().room<RowStatistics>(Scratch::kSummaries, rows * chunks);
  const void* input = input_of(threads, hidden, rows, head.weight);
  in_chunks(threads, vocab, kChunk, [&](int64_t first, int64_t count, int) {
    kernels().product(input, rows, head.weight, first, count, head.bias, logits + first, vocab);
    for (int64_t row = 0; row < rows; ++row) {
      float* own = logits + row * vocab + first;
      RowStatistics& place = found[row * chunks + first / kChunk];
      place = is_contrasted(row) ? finite_statistics(own, count) : kernels().statistics(own, count);
      place.argmax += first;
    }
  });
  return {vocab, logits, found};
}

Row summary(const RowStatistics* chunks, int64_t count) {
  Row row = {chunks[0].max, 0.0f, chunks[0].argmax};
  for (int64_t i = 1; i < count; ++i)
    if (chunks[i].max > row.max) row.max = chunks[i].max, row.argmax = chunks[i].argmax;
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i)
    sum += chunks[i].sum * std::exp(static_cast<double>(chunks[i].max) - row.max);
  row.log_sum = static_cast<float>(row.max + std::log(sum));
  return row;
}

int64_t sample(int threads, const float* scores, int64_t vocab, float heat, int64_t seed,
               int64_t position) {
  auto* found = Scratch::of_this_thread().room<NoisyBest>(Scratch::kNoisy, chunks_of(vocab));
  in_chunks(threads, vocab, kChunk, [&](int64_t first, int64_t count, int) {
    found[first / kChunk] =
        kernels().noisy_best(scores + first, first, count, heat, static_cast<uint64_t>(seed),
                             static_cast<uint32_t>(position));
  });
  NoisyBest best = found[0];
  for (int64_t i = 1; i < chunks_of(vocab); ++i)
    if (found[i].value > best.value || found[i].value != found[i].value) best = found[i];
  return best.token;
}

int64_t sample(int threads, const float* scores, int64_t vocab, int64_t row, const Choice& choice) {
  return sample(threads, scores, vocab, choice.temperature[row], choice.seeds[row],
                choice.positions[row]);
}

// The plausible tokens of one row, with their upper logits and contrasted log-probabilities.
class Candidates {
 public:
  explicit Candidates(int64_t vocab)
      : tokens(scratch_.room<int32_t>(Scratch::kCandidates, vocab)),
        upper(scratch_.room(Scratch::kUpper, vocab)),
        shared(scratch_.room(Scratch::kShared, vocab)) {}

  void collect(const float* logits, int64_t vocab, const RowStatistics* chunks, float threshold) {
    count = 0;
    for (int64_t chunk = 0; chunk < chunks_of(vocab); ++chunk) {
      if (!(chunks[chunk].max >= threshold)) continue;
      const int64_t stop = std::min(vocab, (chunk + 1) * kChunk);
      for (int64_t v = chunk * kChunk; v < stop; ++v)
        if (logits[v] >= threshold) {
          tokens[count] = static_cast<int32_t>(v);
          upper[count++] = logits[v];
        }
    }
  }

  // `shared` holds the lower logits before, the log-probabilities after.
  void share(const Row& row) {
    if (count == 1) shared[0] = upper[0] - row.log_sum;
    if (count < 2) return;
    to_ratios(upper, shared, count);
    const double shift = shift_of_ratios(upper, shared, count) - row.log_sum;
    for (int64_t i = 0; i < count; ++i) shared[i] = static_cast<float>(shared[i] + shift);
  }

  int64_t best() const {
    int64_t found = 0;
    for (int64_t i = 1; i < count; ++i)
      if (shared[i] > shared[found]) found = i;
    return found;
  }

 private:
  Scratch& scratch_ = Scratch::of_this_thread();

 public:
  int32_t* const tokens;
  float* const upper;
  float* const shared;
  int64_t count = 0;
};

// Least logit of a plausible token; `room` holds vocab numbers.
float threshold_of(const Row& row, float alpha, int64_t least, const float* logits, int64_t vocab,
                   float* room) {
  float threshold = plausible_from(row.max, alpha);
  if (least <= 0 || least > vocab) return -FLT_MAX;
  if (least > 1 && row.log_sum == row.log_sum) {
    std::copy_n(logits, vocab, room);
    std::nth_element(room, room + least - 1, room + vocab, std::greater<float>());
    threshold = std::min(threshold, room[least - 1]);
  }
  return std::max(threshold, -FLT_MAX);
}

// Calls finish(row, summary, candidates, logits of the row) for each row of a lower head, one
// after the other.
template <class Finish>
void contrast(int threads, const Streamed& upper, const LowerHead& lower, Finish&& finish) {
  const int64_t vocab = upper.vocab;
  Candidates candidates(vocab);
  const auto collect = [&](int64_t place) {
    const int64_t row = lower.row(place);
    const RowStatistics* chunks = upper.chunks_of_row(row);
    const Row found = summary(chunks, chunks_of(vocab));
    const float threshold =
        threshold_of(found, lower.alpha[place], lower.least ? lower.least[place] : 1,
                     upper.row(row), vocab, candidates.shared);
    candidates.collect(upper.row(row), vocab, chunks, threshold);
    return found;
  };
  int64_t pairs = 0;
  for (int64_t place = 0; place < lower.count; ++place) {
    collect(place);
    pairs += candidates.count > 1 ? candidates.count : 0;
  }
  const float* logits = nullptr;
  if (pairs > kSparseShare * vocab * std::min<int64_t>(lower.count, 4)) {
    float* all = Scratch::of_this_thread().room(Scratch::kLower, lower.count * vocab);
    head_logits(threads, lower.hidden, lower.count, lower.head, all);
    logits = all;
  }
  const Kernels& k = kernels();
  const Matrix& weight = lower.head.weight;
  const Inputs inputs(threads, lower.hidden, lower.count, weight, Scratch::kLowerRounded);
  for (int64_t place = 0; place < lower.count; ++place) {
    const Row found = collect(place);
    if (candidates.count > 1 && logits) {
      for (int64_t i = 0; i < candidates.count; ++i)
        candidates.shared[i] = logits[place * vocab + candidates.tokens[i]];
    } else if (candidates.count > 1) {
      in_chunks(threads, candidates.count, kFetched, [&](int64_t first, int64_t count, int) {
        k.gathered_product(inputs.row(place), weight, candidates.tokens + first, count,
                           lower.head.bias, candidates.shared + first);
      });
    }
    candidates.share(found);
    const int64_t row = lower.row(place);
    finish(row, found, candidates, upper.row(row));
  }
}

void write_log_probs(const Row& row, const Candidates& candidates, float* logits, int64_t vocab) {
  for (int64_t v = 0; v < vocab; ++v) logits[v] -= row.log_sum;
  for (int64_t i = 0; i < candidates.count; ++i)
    logits[candidates.tokens[i]] = candidates.shared[i];
}

void choose(int threads, const Streamed& head, int64_t row, const Choice& choice) {
  const Row found = summary(head.chunks_of_row(row), chunks_of(head.vocab));
  const float* own = head.row(row);
  const int64_t token = choice.temperature[row] > 0
                            ? sample(threads, own, head.vocab, row, choice)
                            : found.argmax;
  choice.tokens[row] = token;
  choice.log_probs[row] = own[token] - found.log_sum;
  if (choice.num_candidates) choice.num_candidates[row] = 0;
}

void choose_contrasted(int threads, const Streamed& upper, const LowerHead& lower,
                       const Choice& choice) {
  const int64_t vocab = upper.vocab;
  contrast(threads, upper, lower,
           [&](int64_t row, const Row& found, const Candidates& candidates, float* own) {
             if (choice.num_candidates)
               choice.num_candidates[row] = static_cast<int32_t>(candidates.count);
             // A candidate is always the best: the largest share is at least alpha * max p.
             if (!(choice.temperature[row] > 0) && candidates.count > 0) {
               const int64_t best = candidates.best();
               choice.tokens[row] = candidates.tokens[best];
               choice.log_probs[row] = candidates.shared[best];
               return;
             }
             write_log_probs(found, candidates, own, vocab);
             const int64_t token = candidates.count ? sample(threads, own, vocab, row, choice) : 0;
             choice.tokens[row] = token;
             choice.log_probs[row] = own[token];
           });
}

}  // namespace

void head_logits(int threads, const float* hidden, int64_t rows, const Linear& head, float* out) {
  multiply(threads, hidden, rows, head, out, kNothingMore);
}

void head_tokens(int threads, const float* hidden, int64_t rows, const Linear& head,
                 const Choice& choice) {
  float* logits = Scratch::of_this_thread().room(Scratch::kLogits, rows * head.weight.rows);
  const Streamed streamed =
      stream_head(threads, hidden, rows, head, [](int64_t) { return false; }, logits);
  for (int64_t row = 0; row < rows; ++row) choose(threads, streamed, row, choice);
}

void contrast_tokens(int threads, const HeadPair& heads, int64_t rows, const Choice& choice) {
  shared_head_tokens(threads, heads.upper_hidden, rows, {heads.upper, nullptr}, {heads.lower},
                     choice);
}

void shared_head_tokens(int threads, const float* hidden, int64_t rows, const Linear& head,
                        const std::vector<LowerHead>& lowers, const Choice& choice) {
  Scratch& scratch = Scratch::of_this_thread();
  float* logits = scratch.room(Scratch::kLogits, rows * head.weight.rows);
  auto* is_contrasted = scratch.room<char>(Scratch::kContrasted, rows);
  std::fill_n(is_contrasted, rows, 0);
  for (const LowerHead& lower : lowers)
    for (int64_t place = 0; place < lower.count; ++place) is_contrasted[lower.row(place)] = 1;
  const Streamed streamed =
      stream_head(threads, hidden, rows, head,
                  [&](int64_t row) { return is_contrasted[row] != 0; }, logits);
  for (int64_t row = 0; row < rows; ++row)
    if (!is_contrasted[row]) choose(threads, streamed, row, choice);
  for (const LowerHead& lower : lowers) choose_contrasted(threads, streamed, lower, choice);
}

void sample_tokens(int threads, const float* scores, int64_t rows, int64_t vocab,
                   const int64_t* seeds, const int64_t* positions, int64_t* tokens) {
  for (int64_t row = 0; row < rows; ++row)
    tokens[row] = sample(threads, scores + row * vocab, vocab, 1.0f, seeds[row], positions[row]);
}

void contrast_heads(int threads, const HeadPair& heads, int64_t rows, float* out,
                    int32_t* num_candidates) {
  const Streamed upper = stream_head(threads, heads.upper_hidden, rows, {heads.upper, nullptr},
                                     [](int64_t) { return true; }, out);
  contrast(threads, upper, heads.lower,
           [&](int64_t row, const Row& found, const Candidates& candidates, float* own) {
             if (num_candidates) num_candidates[row] = static_cast<int32_t>(candidates.count);
             write_log_probs(found, candidates, own, upper.vocab);
           });
}

}  // namespace multiexit::cpu
