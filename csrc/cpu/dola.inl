// How much two distributions of a piece of the vocabulary differ.

namespace multiexit::cpu::ISA_NAMESPACE {

static inline Vec log_probs(const float* x, int64_t count, const LogSoftmax& of) {
  const Vec v = load_some(x, count), most = fill(kMostLogit);
  return (v > most ? most : v) - of.max - of.log_sum;
}

// No product with log 0, which is infinite: what has no weight counts for nothing.
static inline Vec weighed(Vec weight, Vec distance) {
  return weight == 0.0f ? fill(0.0f) : weight * distance;
}

static float divergence(const float* x, const LogSoftmax& of_x, const float* y,
                        const LogSoftmax& of_y, bool is_published, int64_t count) {
  Vec sums = fill(0.0f);
  each_vector(count, [&](int64_t i, int64_t n) {
    const Vec log_p = log_probs(x + i, n, of_x), log_q = log_probs(y + i, n, of_y);
    const Vec p = exp(log_p), q = exp(log_q), mean = 0.5f * (p + q), log_mean = log(mean);
    Vec terms = is_published ? weighed(mean, log_mean - log_p) + weighed(mean, log_mean - log_q)
                             : weighed(p, log_p - log_mean) + weighed(q, log_q - log_mean);
    if (n < kWidth)
      for (int64_t j = n; j < kWidth; ++j) terms[j] = 0.0f;
    sums += terms;
  });
  return sum_of(sums);
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
