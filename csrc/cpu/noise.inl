// Gumbel noise of ops/sampling.py: a function of seed, position and token alone.

namespace multiexit::cpu::ISA_NAMESPACE {

constexpr int64_t kNoiseBlock = 64;

// First words of Philox-4x32-10 for the tokens first, first + 1, ... (Salmon et al. 2011).
static inline void philox(uint64_t seed, uint32_t position, uint32_t first, uint32_t* words) {
  uint32_t c0[kNoiseBlock], c1[kNoiseBlock], c2[kNoiseBlock], c3[kNoiseBlock];
  for (int64_t i = 0; i < kNoiseBlock; ++i) {
    c0[i] = first + static_cast<uint32_t>(i);
    c1[i] = position;
    c2[i] = c3[i] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
    for (int64_t i = 0; i < kNoiseBlock; ++i) {
      const uint64_t one = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
      const uint64_t two = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(two >> 32) ^ c1[i] ^ key0;
      c1[i] = static_cast<uint32_t>(two);
      c2[i] = static_cast<uint32_t>(one >> 32) ^ c3[i] ^ key1;
      c3[i] = static_cast<uint32_t>(one);
    }
  __builtin_memcpy(words, c0, sizeof c0);
}

static inline float gumbel(uint32_t word) {
  float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  if (v > 1.0f - 0x1p-24f) v = 1.0f - 0x1p-24f;
  return -__builtin_logf(-__builtin_log1pf(-v));
}

constexpr float kMostNoise = 22.9f;

// Noise is below -log(v), and v is at least 2^-(zeros + 1): most tokens need no logarithm.
static inline float noise_limit(uint32_t word) {
  return 0.6932f * (word ? __builtin_clz(word) + 1 : 34);
}

// NaN if one is among them.
static inline float largest_or_nan(const float* x, int64_t count) {
  Vec top = load_some(x, count < kWidth ? count : kWidth);
  each_vector(count, [&](int64_t i, int64_t n) {
    // zeros behind a part of a vector can only make the bound looser
    const Vec v = load_some(x + i, n);
    top = (v > top) | (v != v) ? v : top;
  });
  float best = top[0];
  for (int64_t i = 1; i < kWidth; ++i) best = top[i] > best || top[i] != top[i] ? top[i] : best;
  return best;
}

static NoisyBest noisy_best(const float* scores, int64_t first, int64_t count, float heat,
                            uint64_t seed, uint32_t position) {
  NoisyBest best = {-__builtin_inff(), first};
  uint32_t words[kNoiseBlock];
  for (int64_t start = 0; start < count; start += kNoiseBlock) {
    const int64_t stop = start + kNoiseBlock < count ? start + kNoiseBlock : count;
    const float bound = largest_or_nan(scores + start, stop - start) / heat + kMostNoise;
    if (bound != bound) {
      int64_t place = start;
      while (scores[place] == scores[place]) ++place;
      return {bound, first + place};
    }
    if (bound <= best.value) continue;
    philox(seed, position, static_cast<uint32_t>(first + start), words);
    for (int64_t i = start; i < stop; ++i) {
      const float score = scores[i] / heat;
      const uint32_t word = words[i - start];
      if (score + noise_limit(word) <= best.value) continue;
      const float value = score + gumbel(word);
      if (value > best.value) best = {value, first + i};
    }
  }
  return best;
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
