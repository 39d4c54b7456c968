// Products of 8-bit codes with 8-bit codes, exact in 32-bit integers, then scaled.

namespace multiexit::cpu::ISA_NAMESPACE {

constexpr int64_t kLanes = CodedMatrix::kLanes;

// B blocks of weight rows times T tokens: sums[b * T + t] are those of a block's rows.
#if defined(MULTIEXIT_AVX512BF16)
constexpr int kCodedTokens = 12, kCodedBlocks = 2;

// `ahead` is fetched meanwhile: `step` bytes for each load of a block.
template <int B, int T>
static void coded_tile(const uint8_t* x, int64_t columns, const int8_t* codes,
                       const int32_t* starts, const char* ahead, int64_t step, int32_t* sums) {
  __m512i sum[B][T];
#pragma GCC unroll 2
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) sum[b][t] = _mm512_loadu_si512(starts + b * kLanes);
  for (int64_t i = 0; i < columns; i += 4) {
    __m512i weights[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) {
      __builtin_prefetch(ahead, 0, 3);
      ahead += step;
      weights[b] = _mm512_loadu_si512(codes + b * columns * kLanes + i * kLanes);
    }
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
                       const int32_t* starts, const char*, int64_t, int32_t* sums) {
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
                        const int32_t* starts, const char* ahead, int64_t step, int32_t* sums) {
  if constexpr (T > 0) {
    if (tokens == T) return coded_tile<B, T>(x, columns, codes, starts, ahead, step, sums);
    coded_tiles<B, T - 1>(tokens, x, columns, codes, starts, ahead, step, sums);
  }
}

// The first `count` of a block's sums to logits.
static inline void scale_sums(const int32_t* sums, const float* scales, float scale,
                              const float* bias, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t some = count - i < kWidth ? count - i : kWidth;
    VecInt own;
    __builtin_memcpy(&own, sums + i, sizeof own);
    Vec v = __builtin_convertvector(own, Vec) * load(scales + i) * scale;
    if (bias) v += load_some(bias + i, some);
    store_some(out + i, v, some);
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
    const int64_t passes = (tokens + kCodedTokens - 1) / kCodedTokens, step = 4 * kLanes / passes;
    const char* ahead = reinterpret_cast<const char*>(codes) + blocks * kLanes * weight.columns;
    for (int64_t from = 0; from < tokens; from += kCodedTokens) {
      const int64_t some = tokens - from < kCodedTokens ? tokens - from : kCodedTokens;
      const auto run =
          is_pair ? coded_tiles<kCodedBlocks, kCodedTokens> : coded_tiles<1, kCodedTokens>;
      run(some, x.codes + from * weight.columns, weight.columns, codes, weight.starts + row,
          ahead + from / kCodedTokens * step * blocks * (weight.columns / 4), step, sums);
      for (int b = 0; b < blocks; ++b) {
        const int64_t place = start + b * kLanes;
        const int64_t left = count - place < kLanes ? count - place : kLanes;
        for (int64_t t = 0; t < some; ++t)
          scale_sums(sums + (b * some + t) * kLanes, weight.scales + first + place,
                     x.scales[from + t], bias ? bias + first + place : nullptr, left,
                     out + (from + t) * out_stride + place);
      }
    }
    start += blocks * kLanes;
  }
}

static inline void store_code(uint8_t* codes, int64_t place, float code) {
  codes[place] = static_cast<uint8_t>(code + 128.0f);
}

// Columns behind `size` up to `padded` get the code of 0.
static CodedRow code_row(const float* x, int64_t size, int64_t padded, uint8_t* codes,
                         uint8_t* second) {
  Vec greatest = fill(0.0f), nothing = fill(0.0f);
  each_vector(size, [&](int64_t i, int64_t n) {
    const Vec v = load_some(x + i, n), magnitude = v < 0.0f ? -v : v;
    greatest = magnitude > greatest ? magnitude : greatest;
    nothing += v - v;
  });
  // NaN where a number is none, or not finite.
  const float scale = max_of(greatest) / 127.0f + sum_of(nothing), second_scale = scale / 254.0f;
  const Vec divisor = fill(scale == 0.0f ? 1.0f : scale), magic = fill(12582912.0f);
  const double second_divisor = second_scale == 0.0f ? 1.0 : second_scale;
  double norm = 0.0, error = 0.0;
  for (int64_t i = 0; i < padded; i += kWidth) {
    const int64_t some = size - i < kWidth ? (size > i ? size - i : 0) : kWidth;
    const Vec v = some > 0 ? load_some(x + i, some) : fill(0.0f);
    // The sum with the magic number is rounded to the nearest, ties to even.
    Vec code = (v / divisor + magic) - magic;
    code = code == code ? code : fill(0.0f);
    const int64_t room = padded - i < kWidth ? padded - i : kWidth;
    for (int64_t j = 0; j < room; ++j) store_code(codes, i + j, code[j]);
    for (int64_t j = 0; j < room; ++j) {
      double lacking = double(v[j]) - double(code[j]) * scale;
      norm += double(v[j]) * v[j];
      if (second) {
        float less = static_cast<float>(__builtin_rint(lacking / second_divisor));
        less = less > 127.0f ? 127.0f : less > -127.0f ? less : less == less ? -127.0f : 0.0f;
        store_code(second, i + j, less);
        lacking -= double(less) * second_scale;
      }
      error += lacking * lacking;
    }
  }
  return {scale, second_scale, __builtin_sqrt(norm), __builtin_sqrt(error)};
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
