// Transposing a square of kWidth x kWidth numbers in registers.

namespace multiexit::cpu::ISA_NAMESPACE {

#if defined(MULTIEXIT_AVX512)
// Exchanges the lanes of rows i and i + kStep whose index has this bit with those that have not.
template <int kStep>
static inline void exchange(Vec* rows) {
  VecInt low, high;
  for (int lane = 0; lane < kWidth; ++lane) {
    const bool is_upper = lane & kStep;
    low[lane] = is_upper ? kWidth + lane - kStep : lane;
    high[lane] = is_upper ? kWidth + lane : lane + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    const __m512 a = (__m512)rows[i], b = (__m512)rows[i + kStep];
    rows[i] = (Vec)_mm512_permutex2var_ps(a, (__m512i)low, b);
    rows[i + kStep] = (Vec)_mm512_permutex2var_ps(a, (__m512i)high, b);
  }
}

static inline void transpose(Vec* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  exchange<8>(rows);
}
#elif defined(MULTIEXIT_AVX2)
static inline void transpose(Vec* rows) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = (Vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = (Vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}
#else
static inline void transpose(Vec* rows) {
  float numbers[kWidth][kWidth], turned[kWidth][kWidth];
  __builtin_memcpy(numbers, rows, sizeof numbers);
  for (int64_t i = 0; i < kWidth; ++i)
    for (int64_t j = 0; j < kWidth; ++j) turned[j][i] = numbers[i][j];
  __builtin_memcpy(rows, turned, sizeof turned);
}
#endif

}  // namespace multiexit::cpu::ISA_NAMESPACE
