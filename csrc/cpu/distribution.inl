// What a gate asks of a piece of a row of logits.

namespace multiexit::cpu::ISA_NAMESPACE {

// The two greatest of all lanes, each lane having its own two; a number that occurs twice counts
// twice.
static inline void two_greatest(Vec first, Vec second, float* best, float* next) {
#if defined(MULTIEXIT_AVX512)
  const auto unite = [&](auto turned) {
    const Vec other = (Vec)turned((__m512)first), rest = (Vec)turned((__m512)second);
    const Vec smaller = first < other ? first : other, larger = second > rest ? second : rest;
    first = first > other ? first : other;
    second = smaller > larger ? smaller : larger;
  };
  unite([](__m512 v) { return _mm512_shuffle_f32x4(v, v, 0x4e); });
  unite([](__m512 v) { return _mm512_shuffle_f32x4(v, v, 0xb1); });
  unite([](__m512 v) { return _mm512_permute_ps(v, 0x4e); });
  unite([](__m512 v) { return _mm512_permute_ps(v, 0xb1); });
  *best = first[0];
  *next = second[0];
#else
  *best = *next = -__builtin_inff();
  for (int64_t lane = 0; lane < kWidth; ++lane) {
    const bool is_best = first[lane] > *best;
    const float smaller = is_best ? *best : first[lane];
    if (is_best) *best = first[lane];
    if (smaller > *next) *next = smaller;
    if (second[lane] > *next) *next = second[lane];
  }
#endif
}

// The place of the first number that equals `wanted`; the last place where none does.
static inline int64_t place_of(float wanted, const float* x, int64_t count) {
  int64_t place = 0;
#if defined(MULTIEXIT_AVX512)
  const __m512 same = (__m512)fill(wanted);
  for (; place + kWidth <= count; place += kWidth) {
    const __mmask16 found =
        _mm512_cmp_ps_mask(_mm512_loadu_ps(x + place), same, _CMP_EQ_OQ);
    if (found) return place + __builtin_ctz(found);
  }
  if (place == count) return count - 1;
#endif
  while (place + 1 < count && x[place] != wanted) ++place;
  return place;
}

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
  two_greatest(first, second, &found.max, &found.second);
  found.argmax = place_of(found.max, x, count);
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

static ExpSums exp_sums(const float* x, float shift, int64_t count) {
  Vec sums = fill(0.0f), drops = fill(0.0f), squares = fill(0.0f), square_drops = fill(0.0f),
      squared_drops = fill(0.0f);
  each_vector(count, [&](int64_t i, int64_t n) {
    const Vec distance = load_some(x + i, n) + shift;
    const Vec y = distance < -100.0f ? fill(-100.0f) : distance;
    Vec weight = exp(y);
    if (n < kWidth)
      for (int64_t j = n; j < kWidth; ++j) weight[j] = 0.0f;
    const Vec drop = weight * y;
    sums += weight;
    drops += drop;
    squares = fma(weight, weight, squares);
    square_drops = fma(weight, drop, square_drops);
    squared_drops = fma(drop, drop, squared_drops);
  });
  return {sum_of(sums), sum_of(drops), sum_of(squares), sum_of(square_drops),
          sum_of(squared_drops)};
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
