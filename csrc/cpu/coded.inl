// Products of 8-bit codes with 8-bit codes, exact in 32-bit integers, then scaled.

namespace multiexit::cpu::ISA_NAMESPACE {

constexpr int64_t kLanes = CodedMatrix::kLanes;

// B blocks of weight rows times T tokens: sums[b * T + t] are those of a block's rows.
#if defined(MULTIEXIT_AVX512BF16)
constexpr int kCodedTokens = 12, kCodedBlocks = 2;

template <int B, int T>
static void coded_tile(const uint8_t* x, int64_t columns, const int8_t* codes,
                       const int32_t* starts, int32_t* sums) {
  __m512i sum[B][T];
#pragma GCC unroll 2
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) sum[b][t] = _mm512_loadu_si512(starts + b * kLanes);
  for (int64_t i = 0; i < columns; i += 4) {
    __m512i weights[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b)
      weights[b] = _mm512_loadu_si512(codes + b * columns * kLanes + i * kLanes);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      int32_t four;
      __builtin_memcpy(&four, x + t * columns + i, 4);
      const __m512i input = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) sum[b][t] = _mm512_dpbusd_epi32(sum[b][t], input, weights[b]);
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) _mm512_storeu_si512(sums + (b * T + t) * kLanes, sum[b][t]);
}
#else
constexpr int kCodedTokens = 4, kCodedBlocks = 1;

template <int B, int T>
static void coded_tile(const uint8_t* x, int64_t columns, const int8_t* codes,
                       const int32_t* starts, int32_t* sums) {
  for (int t = 0; t < T; ++t) {
    int32_t sum[kLanes];
    __builtin_memcpy(sum, starts, sizeof sum);
    for (int64_t i = 0; i < columns; i += 4)
      for (int64_t lane = 0; lane < kLanes; ++lane)
        for (int64_t j = 0; j < 4; ++j)
          sum[lane] += x[t * columns + i + j] * codes[i * kLanes + lane * 4 + j];
    __builtin_memcpy(sums + t * kLanes, sum, sizeof sum);
  }
}
#endif

template <int B, int T>
static void coded_tiles(int64_t tokens, const uint8_t* x, int64_t columns, const int8_t* codes,
                        const int32_t* starts, int32_t* sums) {
  if constexpr (T > 0) {
    if (tokens == T) return coded_tile<B, T>(x, columns, codes, starts, sums);
    coded_tiles<B, T - 1>(tokens, x, columns, codes, starts, sums);
  }
}

static void coded_product(const CodedRows& x, int64_t tokens, const CodedMatrix& weight,
                          int64_t first, int64_t count, const float* bias, float* out,
                          int64_t out_stride) {
  alignas(64) int32_t sums[kCodedBlocks * kCodedTokens * kLanes];
  for (int64_t start = 0; start < count;) {
    const int64_t row = first + start;
    const bool is_pair = kCodedBlocks == 2 && count - start > kLanes;
    const int blocks = is_pair ? 2 : 1;
    const int8_t* codes = weight.codes + row * weight.columns;
    for (int64_t from = 0; from < tokens; from += kCodedTokens) {
      const int64_t some = tokens - from < kCodedTokens ? tokens - from : kCodedTokens;
      const auto run =
          is_pair ? coded_tiles<kCodedBlocks, kCodedTokens> : coded_tiles<1, kCodedTokens>;
      run(some, x.codes + from * weight.columns, weight.columns, codes, weight.starts + row, sums);
      for (int b = 0; b < blocks; ++b) {
        const int64_t place = start + b * kLanes;
        const int64_t left = count - place < kLanes ? count - place : kLanes;
        for (int64_t t = 0; t < some; ++t) {
          const int32_t* own = sums + (b * some + t) * kLanes;
          float* target = out + (from + t) * out_stride + place;
          for (int64_t i = 0; i < left; ++i)
            target[i] = own[i] * weight.scales[first + place + i] * x.scales[from + t] +
                        (bias ? bias[first + place + i] : 0.0f);
        }
      }
    }
    start += blocks * kLanes;
  }
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
