// Tokens whose exact logits, or noisy scores, can be the greatest, told by rough logits.

namespace multiexit::cpu::ISA_NAMESPACE {

// A bit for each of the first n numbers that is at least `border`.
static inline uint32_t reaching(Vec v, float border, int64_t n) {
  const VecInt is_reached = v >= fill(border);
#if defined(MULTIEXIT_AVX512)
  const uint32_t bits = _mm512_movepi32_mask((__m512i)is_reached);
#else
  uint32_t bits = 0;
  for (int64_t i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(is_reached[i] & 1) << i;
#endif
  return bits & ((1u << n) - 1);
}

static Ends sum_terms(const RoughLogits& x) {
  const float lowest = -__builtin_inff();
  Vec lower = fill(lowest), upper = fill(lowest);
  each_vector(x.count, [&](int64_t i, int64_t n) {
    Vec v = load_some(x.logits + i, n);
    if (x.second) v += load_some(x.second + i, n);
    if (x.bias) v += load_some(x.bias + i, n);
    store_some(x.logits + i, v, n);
    const Vec error = load_some(x.errors + i, n) * x.reach;
    Vec least = v - error, most = v + error;
    if (n < kWidth)
      for (int64_t j = n; j < kWidth; ++j) least[j] = most[j] = lowest;
    lower = least > lower ? least : lower;
    upper = most > upper ? most : upper;
  });
  return {max_of(lower), max_of(upper)};
}

static void sum_blocks(const RoughLogits& x, float* out, float* uppers) {
  const float lowest = -__builtin_inff();
  for (int64_t start = 0; start < x.count; start += kRoughBlock) {
    Vec upper = fill(lowest);
    each_vector(x.count - start < kRoughBlock ? x.count - start : kRoughBlock,
                [&](int64_t place, int64_t n) {
                  const int64_t i = start + place;
                  Vec v = load_some(x.logits + i, n);
                  if (x.second) v += load_some(x.second + i, n);
                  if (x.bias) v += load_some(x.bias + i, n);
                  store_some(out + i, v, n);
                  Vec most = v + load_some(x.errors + i, n) * x.reach;
                  if (n < kWidth)
                    for (int64_t j = n; j < kWidth; ++j) most[j] = lowest;
                  upper = most > upper ? most : upper;
                });
#if defined(MULTIEXIT_AVX512)
    uppers[start / kRoughBlock] = _mm512_reduce_max_ps((__m512)upper);
#else
    uppers[start / kRoughBlock] = max_of(upper);
#endif
  }
}

static int64_t find_near(const RoughLogits& x, float border, Near* out) {
  int64_t found = 0;
  each_vector(x.count, [&](int64_t i, int64_t n) {
    const Vec most = load_some(x.logits + i, n) + load_some(x.errors + i, n) * x.reach;
    for (uint32_t bits = reaching(most, border, n); bits; bits &= bits - 1) {
      const int64_t place = __builtin_ctz(bits);
      out[found++] = {most[place], static_cast<int32_t>(x.first + i + place)};
    }
  });
  return found;
}

static int64_t find_noisy_near(const RoughLogits& x, const Noise& noise, float margin, float* best,
                               Near* out) {
  int64_t found = 0;
  uint32_t words[kNoiseBlock];
  float upper[kNoiseBlock];
  for (int64_t start = 0; start < x.count; start += kNoiseBlock) {
    const int64_t size = x.count - start < kNoiseBlock ? x.count - start : kNoiseBlock;
    Vec top = fill(-__builtin_inff());
    each_vector(size, [&](int64_t i, int64_t n) {
      const int64_t place = start + i;
      Vec most = load_some(x.logits + place, n) + load_some(x.errors + place, n) * x.reach;
      most /= noise.heat;
      store_some(upper + i, most, n);
      if (n < kWidth)
        for (int64_t j = n; j < kWidth; ++j) most[j] = top[j];
      top = most > top ? most : top;
    });
    if (!(max_of(top) + kMostNoise >= *best - margin)) continue;
    philox(noise.seed, noise.position, static_cast<uint32_t>(x.first + start), words);
    for (int64_t i = 0; i < size; ++i) {
      if (!(upper[i] + noise_limit(words[i]) >= *best - margin)) continue;
      const float own = gumbel(words[i]), error = x.errors[start + i] * x.reach;
      const float least = (x.logits[start + i] - error) / noise.heat + own;
      *best = least > *best ? least : *best;
      if (upper[i] + own >= *best - margin)
        out[found++] = {upper[i] + own, static_cast<int32_t>(x.first + start + i)};
    }
  }
  return found;
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
