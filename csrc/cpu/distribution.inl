// What a gate asks of a piece of a row of logits.

namespace multiexit::cpu::ISA_NAMESPACE {

static Distribution distribution(const float* x, int64_t count) {
  const float lowest = -__builtin_inff();
  // The two greatest of every lane, then of all lanes: a number that occurs twice counts twice.
  Vec first = fill(lowest), second = fill(lowest);
  each_vector(count, [&](int64_t i, int64_t n) {
    Vec v = load_some(x + i, n);
    if (n < kWidth)
      for (int64_t j = n; j < kWidth; ++j) v[j] = lowest;
    const Vec smaller = v < first ? v : first;
    first = v > first ? v : first;
    second = smaller > second ? smaller : second;
  });
  Distribution found = {lowest, lowest, 0.0f, 0.0f, 0};
  for (int64_t lane = 0; lane < kWidth; ++lane) {
    const bool is_best = first[lane] > found.max;
    const float smaller = is_best ? found.max : first[lane];
    if (is_best) found.max = first[lane];
    if (smaller > found.second) found.second = smaller;
  }
  for (int64_t lane = 0; lane < kWidth; ++lane)
    if (second[lane] > found.second) found.second = second[lane];
  while (found.argmax + 1 < count && x[found.argmax] != found.max) ++found.argmax;
  // Of nothing but -inf the sums are 0, not NaN.
  const float top = found.max < -3.4e38f ? -3.4028234e38f : found.max;
  Vec sums = fill(0.0f), drops = fill(0.0f);
  each_vector(count, [&](int64_t i, int64_t n) {
    const Vec distance = load_some(x + i, n) - top;
    // Where e^distance is 0 its product is, too: -inf counts for nothing.
    const Vec bounded = distance < -100.0f ? fill(-100.0f) : distance;
    Vec weight = exp(bounded);
    if (n < kWidth)
      for (int64_t j = n; j < kWidth; ++j) weight[j] = 0.0f;
    sums += weight;
    drops = fma(weight, bounded, drops);
  });
  found.sum = sum_of(sums);
  found.drops = sum_of(drops);
  return found;
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
