#include "coded_tokens.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "ratios.h"

namespace multiexit::cpu {

namespace {

// Tokens and rows whose rough logits wait in the cache together, and rows for which there is room to
// remember what is near.
constexpr int64_t kPiece = 512, kRows = 32, kMostRows = 128;
// Near tokens that a thread remembers of a row, and that all of them may name together.
constexpr int64_t kMostNear = 4 * kPiece;
// Pairs of a row and a token that a thread takes at once.
constexpr int64_t kPairs = 16;
// Beyond it products might overflow that lie within the bounds.
constexpr double kGreatestSlack = 1e30;
// Exact scores of a contrast are rounded after a normaliser is taken off, which is not known here:
// nearer ones than this are left open.
constexpr float kRounding = 1e-4f;

// How a row's token is chosen: `margin` below the greatest lower end none of its tokens counts.
struct Plan {
  double margin;
  const LowerHead* lower;  // or null
  int64_t place;           // among the rows of `lower`
  Noise noise;             // of heat 0 where the row is greedy
  double noise_margin;     // as `margin`, of scores with noise

  bool is_sampled() const { return noise.heat > 0; }
  // Whether tokens can be chosen that are not plausible.
  bool has_outsiders() const { return lower && is_sampled(); }
  bool is_noisy() const { return !lower && is_sampled(); }
};

Plan plan_of(int64_t row, double slack, const Choice& choice) {
  const float heat = std::max(choice.temperature[row], 0.0f);
  Plan plan = {2 * slack, nullptr, 0, {heat, 0, 0}, 0.0};
  if (!plan.is_sampled()) return plan;
  plan.noise.seed = static_cast<uint64_t>(choice.seeds[row]);
  plan.noise.position = static_cast<uint32_t>(choice.positions[row]);
  // Scores are rounded when the noise is added, which is below 23.
  plan.noise_margin = plan.margin / heat + 1e-4;
  return plan;
}

// What a contrast asks of the same row; only sets that need one token are known.
void add_lower(const LowerHead& lower, int64_t place, Plan& plan) {
  const bool is_known = !lower.least || lower.least[place] == 1;
  plan.lower = &lower;
  plan.place = place;
  plan.margin += is_known ? 1e-4 - plausible_from(0.0f, lower.alpha[place]) : INFINITY;
}

// The tokens of one row that one thread has seen near its greatest lower end.
struct NearBest {
  float best;
  int32_t count;
  bool is_complete;
  Near found[kMostNear];

  void begin(const Plan& plan) {
    // Scores of -inf are never near.
    best = -FLT_MAX;
    count = 0;
    const double margin = std::max(plan.margin, plan.noise_margin);
    is_complete = std::isfinite(plan.margin) && margin < kGreatestSlack;
  }

  void take(const RoughLogits& x, const Plan& plan) {
    if (!is_complete) return;
    const Ends ends = kernels().sum_terms(x);
    if (plan.is_noisy()) return take_noisy(x, plan);
    best = std::max(best, ends.lower);
    const float border = least(plan.margin);
    if (!(ends.upper >= border) || !has_room(x.count, border)) return;
    count += static_cast<int32_t>(kernels().find_near(x, border, found + count));
  }

  // The terms are summed.
  void take_noisy(const RoughLogits& x, const Plan& plan) {
    if (!is_complete || !has_room(x.count, least(plan.noise_margin))) return;
    const float margin = std::nextafter(static_cast<float>(plan.noise_margin), INFINITY);
    count += static_cast<int32_t>(
        kernels().find_noisy_near(x, plan.noise, margin, &best, found + count));
  }

  bool has_room(int64_t more, float border) {
    if (count + more > kMostNear) keep(border);
    return is_complete = count + more <= kMostNear;
  }

  float least(double margin) const {
    return std::nextafter(static_cast<float>(best - margin), -INFINITY);
  }

  void keep(float border) {
    const auto is_far = [&](const Near& near) { return !(near.most >= border); };
    count = static_cast<int32_t>(std::remove_if(found, found + count, is_far) - found);
  }
};

// Near tokens of some rows, and their logits. A count is negative where a row's codes leave it open.
struct Found {
  int32_t* counts;
  int32_t* plausible;  // how many of them, the first ones
  int32_t* tokens;     // [rows, kMostNear]
  float* upper;        // as the next, exact logits
  float* lower;

  int32_t* tokens_of(int64_t row) const { return tokens + row * kMostNear; }

  // Adds what all threads found, in ascending order.
  void unite(int64_t row, NearBest* near, int64_t ranks, int64_t stride, double margin) {
    if (counts[row] < 0) return;
    float best = -FLT_MAX;
    bool is_complete = true;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      is_complete = is_complete && near[rank * stride].is_complete;
      best = std::max(best, near[rank * stride].best);
    }
    int64_t count = counts[row];
    for (int64_t rank = 0; rank < ranks && is_complete; ++rank) {
      NearBest& part = near[rank * stride];
      part.best = best;
      part.keep(part.least(margin));
      is_complete = count + part.count <= kMostNear;
      for (int32_t i = 0; i < part.count && is_complete; ++i)
        tokens_of(row)[count++] = part.found[i].token;
    }
    std::sort(tokens_of(row) + counts[row], tokens_of(row) + count);
    counts[row] = is_complete && count > 0 ? static_cast<int32_t>(count) : -1;
  }

  // The exact logits of some of a row's tokens.
  void multiply(int64_t row, int64_t place, int64_t some, const void* input, const Linear& head,
                float* logits) const {
    const int64_t first = row * kMostNear + place;
    kernels().gathered_product(input, head.weight, tokens + first, some, head.bias, logits + first);
  }

  // Brings those to the front that are, each part in ascending order.
  void part_plausible(int64_t row, float alpha) {
    int32_t* own = tokens_of(row);
    float* logits = upper + row * kMostNear;
    float* others = lower + row * kMostNear;  // not in use yet
    const float greatest = *std::max_element(logits, logits + counts[row]);
    const float border = std::max(plausible_from(greatest, alpha), -FLT_MAX);
    int32_t kept = 0, left = 0;
    int32_t passed[kMostNear];
    for (int32_t i = 0; i < counts[row]; ++i) {
      const bool is_in = logits[i] >= border;
      if (!is_in) passed[left] = own[i], others[left++] = logits[i];
      if (is_in) own[kept] = own[i], logits[kept++] = logits[i];
    }
    std::copy_n(passed, left, own + kept);
    std::copy_n(others, left, logits + kept);
    plausible[row] = kept;
  }

  int64_t best(int64_t row, const Plan& plan) const {
    if (plan.lower) return best_contrasted(row, plan);
    const float* logits = upper + row * kMostNear;
    NoisyBest best = {-INFINITY, -1};
    for (int32_t i = 0; i < counts[row]; ++i) {
      const float score = score_of(logits[i], tokens_of(row)[i], plan);
      if (score > best.value) best = {score, tokens_of(row)[i]};
    }
    return best.token;
  }

  int64_t best_contrasted(int64_t row, const Plan& plan) const {
    const int32_t count = plausible[row];
    const float* logits = upper + row * kMostNear;
    float* ratios = lower + row * kMostNear;
    double shift = 0.0;
    if (count == 1) {
      ratios[0] = logits[0];
    } else {
      const auto is_number = [](float x) { return std::isfinite(x); };
      if (!std::all_of(ratios, ratios + count, is_number)) return -1;
      to_ratios(logits, ratios, count);
      shift = shift_of_ratios(logits, ratios, count);
    }
    NoisyBest best = {-INFINITY, -1};
    float second = -INFINITY, size = 0.0f;
    for (int32_t i = 0; i < (plan.is_sampled() ? counts[row] : count); ++i) {
      const float logit = i < count ? static_cast<float>(ratios[i] + shift) : logits[i];
      const float score = score_of(logit, tokens_of(row)[i], plan);
      size = std::max(size, std::abs(logit));
      second = std::max(second, std::min(score, best.value));
      if (score > best.value) best = {score, tokens_of(row)[i]};
    }
    const float rounding = kRounding + size * 0x1p-20f / (plan.is_sampled() ? plan.noise.heat : 1);
    return best.value - second > rounding ? best.token : -1;
  }

  static float score_of(float logit, int64_t token, const Plan& plan) {
    if (!plan.is_sampled()) return logit;
    const Noise& noise = plan.noise;
    return kernels().noisy_best(&logit, token, 1, noise.heat, noise.seed, noise.position).value;
  }
};

// Calls body(row, first, count) for spans of places that cover each row's own count.
template <class Count, class Body>
void in_pairs(int threads, int64_t rows, Count&& count_of, Body&& body) {
  auto* starts = Scratch::of_this_thread().room<int64_t>(Scratch::kOffsets, rows + 1);
  starts[0] = 0;
  for (int64_t row = 0; row < rows; ++row)
    starts[row + 1] = starts[row] + std::max<int64_t>(count_of(row), 0);
  in_chunks(threads, starts[rows], kPairs, [&](int64_t first, int64_t count, int) {
    int64_t row = std::upper_bound(starts, starts + rows + 1, first) - starts - 1;
    for (int64_t stop = first + count; first < stop; ++row) {
      const int64_t some = std::min(stop, starts[row + 1]) - first;
      if (some > 0) body(row, first - starts[row], some);
      first += some;
    }
  });
}

// Finds which tokens that are not plausible can win: with noise, by the logits that were kept.
void add_outsiders(int threads, const RoughRows& rows, const RoughHead& rough, const Plan* plans,
                   float* const* kept, NearBest* near, Found& found) {
  const int64_t ranks = std::clamp(threads, 1, kMaxThreads), vocab = rough.codes.rows;
  for (int64_t row = 0; row < rows.rows; ++row) {
    if (!kept[row] || found.counts[row] < 0) continue;
    for (int32_t i = 0; i < found.counts[row]; ++i)
      kept[row][found.tokens_of(row)[i]] = -INFINITY;
    for (int64_t rank = 0; rank < ranks; ++rank) near[rank * rows.rows + row].begin(plans[row]);
    in_chunks(threads, vocab, kPiece, [&](int64_t first, int64_t count, int rank) {
      near[rank * rows.rows + row].take_noisy(
          {kept[row] + first, nullptr, nullptr, rough.errors + first, rows.reaches[row], first,
           count},
          plans[row]);
    });
    found.unite(row, near + row, ranks, rows.rows, plans[row].noise_margin);
  }
}

// Room for all rough logits of the rows that need them a second time, null for others.
float** kept_rows(int64_t rows, int64_t vocab, const Plan* plans) {
  Scratch& scratch = Scratch::of_this_thread();
  float** kept = scratch.room<float*>(Scratch::kKept, rows);
  const auto needs = [](const Plan& plan) { return plan.has_outsiders(); };
  float* room = scratch.room(Scratch::kLogits, std::count_if(plans, plans + rows, needs) * vocab);
  for (int64_t row = 0; row < rows; ++row) {
    kept[row] = needs(plans[row]) ? room : nullptr;
    room += needs(plans[row]) ? vocab : 0;
  }
  return kept;
}

// The lower logits of plausible tokens, of the rows from `row` on that share its lower head; returns
// how many follow it.
int64_t add_lower_logits(int threads, int64_t rows, const Plan* plans, int64_t row, Found& found) {
  const LowerHead& lower = *plans->lower;
  const int64_t count = std::min(rows, lower.count - plans->place);
  const int64_t start = plans->place * lower.head.weight.columns;
  const Inputs inputs(threads, lower.hidden + start, count, lower.head.weight);
  in_pairs(threads, count,
           [&](int64_t i) { return found.plausible[row + i] > 1 ? found.plausible[row + i] : 0; },
           [&](int64_t i, int64_t place, int64_t some) {
             found.multiply(row + i, place, some, inputs.row(i), lower.head, found.lower);
           });
  return count - 1;
}

// `plans` and what is chosen are of these rows, of which the first is `first` of all.
void some_tokens(int threads, const RoughRows& rows, const RoughHead& rough, const Linear& head,
                 const Plan* plans, int64_t first_row, const Choice& choice) {
  Scratch& scratch = Scratch::of_this_thread();
  const int64_t ranks = std::clamp(threads, 1, kMaxThreads), terms = rows.terms;
  const int64_t columns = rough.codes.columns;
  float* rooms = scratch.room(Scratch::kPieces, ranks * terms * kRows * kPiece);
  auto* near = scratch.room<NearBest>(Scratch::kNearBest, ranks * rows.rows);
  float** kept = kept_rows(rows.rows, rough.codes.rows, plans);
  for (int64_t i = 0; i < ranks * rows.rows; ++i) near[i].begin(plans[i % rows.rows]);
  in_chunks(threads, rough.codes.rows, kPiece, [&](int64_t first, int64_t count, int rank) {
    float* logits = rooms + rank * terms * kRows * kPiece;
    for (int64_t row = 0; row < rows.rows; row += kRows) {
      const int64_t some = std::min(kRows, rows.rows - row);
      kernels().coded_product(rows.codes.from(row * terms, columns), some * terms, rough.codes,
                              first, count, nullptr, logits, kPiece);
      for (int64_t i = row; i < row + some; ++i) {
        float* own = logits + (i - row) * terms * kPiece;
        near[rank * rows.rows + i].take(
            {own, terms > 1 ? own + kPiece : nullptr, head.bias ? head.bias + first : nullptr,
             rough.errors + first, rows.reaches[i], first, count},
            plans[i]);
        if (kept[i]) std::copy_n(own, count, kept[i] + first);
      }
    }
  });
  int32_t* numbers = scratch.room<int32_t>(Scratch::kNear, rows.rows * (kMostNear + 2));
  float* exact = scratch.room(Scratch::kExact, 2 * rows.rows * kMostNear);
  Found found = {numbers, numbers + rows.rows, numbers + 2 * rows.rows, exact,
                 exact + rows.rows * kMostNear};
  std::fill_n(numbers, 2 * rows.rows, 0);
  in_chunks(threads, rows.rows, 1, [&](int64_t row, int64_t, int) {
    const double margin = plans[row].is_noisy() ? plans[row].noise_margin : plans[row].margin;
    found.unite(row, near + row, ranks, rows.rows, margin);
  });
  add_outsiders(threads, rows, rough, plans, kept, near, found);
  const Inputs inputs(threads, rows.hidden, rows.rows, head.weight);
  in_pairs(threads, rows.rows, [&](int64_t row) { return found.counts[row]; },
           [&](int64_t row, int64_t place, int64_t count) {
             found.multiply(row, place, count, inputs.row(row), head, found.upper);
           });
  for (int64_t row = 0; row < rows.rows; ++row) {
    const LowerHead* lower = plans[row].lower;
    if (lower && found.counts[row] > 0) found.part_plausible(row, lower->alpha[plans[row].place]);
    if (choice.num_candidates) choice.num_candidates[first_row + row] = found.plausible[row];
  }
  for (int64_t row = 0; row < rows.rows; ++row)
    if (plans[row].lower) row += add_lower_logits(threads, rows.rows - row, plans + row, row, found);
  for (int64_t row = 0; row < rows.rows; ++row)
    choice.tokens[first_row + row] = found.counts[row] > 0 ? found.best(row, plans[row]) : -1;
}

}  // namespace

void code_rows(int threads, const float* x, const float* factors, int64_t rows, int64_t columns,
               const CodedOut& out) {
  const int64_t padded = (columns + 3) / 4 * 4, ranks = std::clamp(threads, 1, kMaxThreads);
  float* rooms = Scratch::of_this_thread().room(Scratch::kPieces, factors ? ranks * columns : 0);
  in_chunks(threads, rows, 8, [&](int64_t first, int64_t count, int rank) {
    for (int64_t row = first; row < first + count; ++row) {
      const float* own = x + row * columns;
      if (factors) {
        float* scaled = rooms + rank * columns;
        for (int64_t i = 0; i < columns; ++i) scaled[i] = own[i] * factors[i];
        own = scaled;
      }
      uint8_t* codes = out.codes + row * out.terms * padded;
      const CodedRow found = kernels().code_row(own, columns, padded, codes,
                                                out.terms > 1 ? codes + padded : nullptr);
      out.scales[row * out.terms] = found.scale;
      if (out.terms > 1) out.scales[row * out.terms + 1] = found.second_scale;
      out.norms[row] = found.norm;
      out.errors[row] = found.error;
    }
  });
}

void coded_head_tokens(int threads, const RoughRows& rows, const RoughHead& rough,
                       const Linear& head, const std::vector<LowerHead>& lowers,
                       const Choice& choice) {
  auto* plans = Scratch::of_this_thread().room<Plan>(Scratch::kPlans, rows.rows);
  for (int64_t row = 0; row < rows.rows; ++row)
    plans[row] = plan_of(row, rows.slacks[row], choice);
  for (const LowerHead& lower : lowers)
    for (int64_t place = 0; place < lower.count; ++place)
      add_lower(lower, place, plans[lower.row(place)]);
  for (int64_t first = 0; first < rows.rows; first += kMostRows)
    some_tokens(threads,
                rows.from(first, std::min(kMostRows, rows.rows - first), head.weight.columns,
                          rough.codes.columns),
                rough, head, plans + first, first, choice);
}

}  // namespace multiexit::cpu
