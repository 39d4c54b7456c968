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
// Pairs of a row and a token that a thread multiplies at once.
constexpr int64_t kPairs = 4;
// Beyond it products might overflow that lie within the bounds.
constexpr double kGreatestSlack = 1e30;

// How a row's token is chosen: `margin` below the greatest lower end none of its tokens counts.
struct Plan {
  double margin;
  const LowerHead* lower;  // or null
  int64_t place;           // among the rows of `lower`
  Noise noise;             // of heat 0 where the row is greedy
  bool is_sampled() const { return noise.heat > 0; }
};

Plan plan_of(int64_t row, double slack, const Choice& choice) {
  const float heat = std::max(choice.temperature[row], 0.0f);
  Plan plan = {2 * slack, nullptr, 0, {heat, 0, 0}};
  if (!plan.is_sampled()) return plan;
  plan.noise.seed = static_cast<uint64_t>(choice.seeds[row]);
  plan.noise.position = static_cast<uint32_t>(choice.positions[row]);
  // Scores are rounded when the noise is added, which is below 23.
  plan.margin = plan.margin / heat + 1e-4;
  return plan;
}

// What a contrast asks of the same row; only greedy rows whose sets need one token are known.
void add_lower(const LowerHead& lower, int64_t place, Plan& plan) {
  const bool is_known = !plan.is_sampled() && (!lower.least || lower.least[place] == 1);
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
    best = -INFINITY;
    count = 0;
    is_complete = std::isfinite(plan.margin) && plan.margin < kGreatestSlack;
  }

  void take(const RoughLogits& x, const Plan& plan) {
    if (!is_complete) return;
    const Ends ends = kernels().sum_terms(x);
    if (!plan.is_sampled()) best = std::max(best, ends.lower);
    const float border = least(plan.margin);
    if (!plan.is_sampled() && !(ends.upper >= border)) return;
    if (count + x.count > kMostNear) keep(border);
    is_complete = count + x.count <= kMostNear;
    if (!is_complete) return;
    const Kernels& k = kernels();
    const float margin = std::nextafter(static_cast<float>(plan.margin), INFINITY);
    count += static_cast<int32_t>(
        plan.is_sampled() ? k.find_noisy_near(x, plan.noise, margin, &best, found + count)
                          : k.find_near(x, border, found + count));
  }

  float least(double margin) const {
    return std::nextafter(static_cast<float>(best - margin), -INFINITY);
  }

  void keep(float border) {
    const auto is_far = [&](const Near& near) { return !(near.most >= border); };
    count = static_cast<int32_t>(std::remove_if(found, found + count, is_far) - found);
  }
};

// Near tokens of some rows in ascending order, and numbers of each: count is negative where a row's
// codes leave it open.
struct Found {
  int32_t* counts;
  int32_t* tokens;  // [rows, kMostNear]
  float* upper;     // as the next, exact logits
  float* lower;

  void unite(int64_t row, NearBest* near, int64_t ranks, int64_t stride, double margin) {
    float best = -INFINITY;
    counts[row] = -1;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      if (!near[rank * stride].is_complete) return;
      best = std::max(best, near[rank * stride].best);
    }
    int32_t* own = tokens + row * kMostNear;
    int64_t count = 0;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      NearBest& part = near[rank * stride];
      part.best = best;
      part.keep(part.least(margin));
      if (count + part.count > kMostNear) return;
      for (int32_t i = 0; i < part.count; ++i) own[count++] = part.found[i].token;
    }
    std::sort(own, own + count);
    counts[row] = count ? static_cast<int32_t>(count) : -1;
  }

  // Leaves the plausible ones, and writes the number of them.
  void keep_plausible(int64_t row, float alpha) {
    int32_t* own = tokens + row * kMostNear;
    float* logits = upper + row * kMostNear;
    const float greatest = *std::max_element(logits, logits + counts[row]);
    const float border = std::max(plausible_from(greatest, alpha), -FLT_MAX);
    int32_t count = 0;
    for (int32_t i = 0; i < counts[row]; ++i)
      if (logits[i] >= border) {
        own[count] = own[i];
        logits[count++] = logits[i];
      }
    counts[row] = count;
  }

  int64_t best(int64_t row, const Plan& plan) {
    const float* logits = upper + row * kMostNear;
    const int32_t* own = tokens + row * kMostNear;
    if (plan.lower) {
      float* other = lower + row * kMostNear;
      if (counts[row] < 2) return own[0];
      const auto is_number = [](float x) { return std::isfinite(x); };
      if (!std::all_of(other, other + counts[row], is_number)) return -1;
      return own[to_ratios(logits, other, counts[row])];
    }
    NoisyBest best = {-INFINITY, -1};
    for (int32_t i = 0; i < counts[row]; ++i) {
      const float score = plan.is_sampled()
                              ? kernels().noisy_best(logits + i, own[i], 1, plan.noise.heat,
                                                     plan.noise.seed, plan.noise.position).value
                              : logits[i];
      if (score > best.value) best = {score, own[i]};
    }
    return best.token;
  }
};

// Calls body(row, place) for each place below a row's count, unless it is left out.
template <class IsIn, class Body>
void in_pairs(int threads, int64_t rows, const int32_t* counts, IsIn&& is_in, Body&& body) {
  auto* starts = Scratch::of_this_thread().room<int64_t>(Scratch::kOffsets, rows + 1);
  starts[0] = 0;
  for (int64_t row = 0; row < rows; ++row)
    starts[row + 1] = starts[row] + (is_in(row) ? std::max(counts[row], 0) : 0);
  in_chunks(threads, starts[rows], kPairs, [&](int64_t first, int64_t count, int) {
    int64_t row = std::upper_bound(starts, starts + rows + 1, first) - starts - 1;
    for (int64_t pair = first; pair < first + count; ++pair) {
      while (pair >= starts[row + 1]) ++row;
      body(row, pair - starts[row]);
    }
  });
}

// `plans` and what is chosen are of these rows, of which the first is `first` of all.
void some_tokens(int threads, const RoughRows& rows, const RoughHead& rough, const Linear& head,
                 const Plan* plans, int64_t first_row, const Choice& choice) {
  Scratch& scratch = Scratch::of_this_thread();
  const int64_t ranks = std::clamp(threads, 1, kMaxThreads), terms = rows.terms;
  const int64_t columns = rough.codes.columns;
  float* rooms = scratch.room(Scratch::kPieces, ranks * terms * kRows * kPiece);
  auto* near = scratch.room<NearBest>(Scratch::kNearBest, ranks * rows.rows);
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
      }
    }
  });
  int32_t* numbers = scratch.room<int32_t>(Scratch::kNear, rows.rows * (kMostNear + 1));
  float* exact = scratch.room(Scratch::kExact, 2 * rows.rows * kMostNear);
  Found found = {numbers, numbers + rows.rows, exact, exact + rows.rows * kMostNear};
  in_chunks(threads, rows.rows, 1, [&](int64_t row, int64_t, int) {
    found.unite(row, near + row, ranks, rows.rows, plans[row].margin);
  });
  const auto logit = [&](const Linear& own, const float* hidden, int64_t place, float* out) {
    kernels().product(hidden, 1, own.weight, found.tokens[place], 1, own.bias, out + place, 1);
  };
  in_pairs(threads, rows.rows, found.counts, [](int64_t) { return true; },
           [&](int64_t row, int64_t i) {
             logit(head, rows.hidden + row * head.weight.columns, row * kMostNear + i, found.upper);
           });
  for (int64_t row = 0; row < rows.rows; ++row) {
    const LowerHead* lower = plans[row].lower;
    if (lower && found.counts[row] > 0) found.keep_plausible(row, lower->alpha[plans[row].place]);
    if (choice.num_candidates)
      choice.num_candidates[first_row + row] = lower ? std::max(found.counts[row], 0) : 0;
  }
  in_pairs(threads, rows.rows, found.counts,
           [&](int64_t row) { return plans[row].lower && found.counts[row] > 1; },
           [&](int64_t row, int64_t i) {
             const LowerHead& lower = *plans[row].lower;
             const float* hidden = lower.hidden + plans[row].place * lower.head.weight.columns;
             logit(lower.head, hidden, row * kMostNear + i, found.lower);
           });
  for (int64_t row = 0; row < rows.rows; ++row)
    choice.tokens[first_row + row] = found.counts[row] > 0 ? found.best(row, plans[row]) : -1;
}

}  // namespace

void code_rows(int threads, const float* x, int64_t rows, int64_t columns, const CodedOut& out) {
  const int64_t padded = (columns + 3) / 4 * 4;
  in_chunks(threads, rows, 8, [&](int64_t first, int64_t count, int) {
    for (int64_t row = first; row < first + count; ++row) {
      uint8_t* codes = out.codes + row * out.terms * padded;
      const CodedRow found = kernels().code_row(x + row * columns, columns, padded, codes,
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
