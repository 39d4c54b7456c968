// Products with weight matrices, row after row of the matrix.

namespace multiexit::cpu::ISA_NAMESPACE {

// How weights of type W are multiplied: the type of the other factor, how many columns one vector
// holds, and what is added to each lane's sum.
template <class W>
struct Factor {
  using Input = float;
  using Vector = Vec;
  static constexpr int64_t kStep = kWidth;
  template <class T>
  static Vec get(const T* p) { return load(p); }
  template <class T>
  static Vec get_first(const T* p, int64_t count) { return load_first(p, count); }
  static Vec add(Vec weight, Vec input, Vec sum) { return fma(weight, input, sum); }
};

#if defined(MULTIEXIT_AVX512BF16)
// Pairs of columns: a lane adds two products to its sum.
template <>
struct Factor<BFloat16> {
  using Input = BFloat16;
  using Vector = __m512i;
  static constexpr int64_t kStep = 2 * kWidth;
  static __m512i get(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static __m512i get_first(const BFloat16* p, int64_t count) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p);
  }
  static Vec add(__m512i weight, __m512i input, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)input);
  }
};
#endif

// Weight rows and tokens of one tile: their accumulators fill the registers.
#if defined(MULTIEXIT_AVX512)
constexpr int kTileTokens = 8;
constexpr int tile_rows(int tokens) { return tokens <= 6 ? 4 : 3; }
#elif defined(MULTIEXIT_AVX2)
constexpr int kTileTokens = 4;
constexpr int tile_rows(int) { return 2; }
#else
constexpr int kTileTokens = 2;
constexpr int tile_rows(int) { return 2; }
#endif

// Of the input, what a pass over the weights reads again and again: it leaves room in the L1 cache
// (48 KB on CPUs with AVX-512, 32 KB on older ones) for the weights that come by.
#if defined(MULTIEXIT_AVX512)
constexpr int64_t kInputBytes = 32 << 10;
#else
constexpr int64_t kInputBytes = 24 << 10;
#endif
// Of the weights, what all passes read: two blocks of two threads fit in the L2 cache.
constexpr int64_t kWeightBytes = 128 << 10;
constexpr int64_t kMostRows = 24;  // of a block whose sums wait while other columns are read
constexpr int64_t kPrefetchAhead = 2048;

// The compiler would load it again for each product.
template <class V>
static inline void keep_in_register(V& vector) {
#if defined(MULTIEXIT_AVX512) || defined(MULTIEXIT_AVX2)
  asm("" : "+v"(vector));
#endif
}

// The place in memory that is fetched while a block of rows is multiplied: the next block. What only
// one pass reads leaves no trace in the L2 and L3 caches, which then keep what a step reads again.
struct Ahead {
  bool is_read_once;
  const char* place;
  int64_t stride;
};

// Lanes to numbers, then the bias: R numbers of token t.
template <int R, int T>
static inline void finish(const Vec (&sum)[R][T], int t, const float* bias, float* out) {
#if defined(MULTIEXIT_AVX512)
  const __mmask8 rows = (1 << R) - 1;
  const Vec none = fill(0.0f);
  const __m128 numbers = sums_of(sum[0][t], R > 1 ? sum[R > 1][t] : none,
                                 R > 2 ? sum[R > 2 ? 2 : 0][t] : none,
                                 R > 3 ? sum[R > 3 ? 3 : 0][t] : none);
  const __m128 shift = bias ? _mm_maskz_loadu_ps(rows, bias) : _mm_setzero_ps();
  _mm_mask_storeu_ps(out, rows, _mm_add_ps(numbers, shift));
#else
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) out[r] = sum_of(sum[r][t]) + (bias ? bias[r] : 0.0f);
#endif
}

// Of x and weight columns [first, stop) are added to the sums of a tile, which wait in `sums`
// between blocks of columns. Lanes first, then sum_of, then the bias: the order of every element
// of every tile.
template <class W, int R, int T>
static inline void tile(const typename Factor<W>::Input* x, const W* weight, int64_t columns,
                        int64_t first, int64_t stop, Vec* sums, Ahead& ahead, const float* bias,
                        float* out, int64_t out_stride) {
  using F = Factor<W>;
  Vec sum[R][T] = {};
  if (first > 0)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[r][t] = sums[r * T + t];
  const int64_t whole = stop / F::kStep * F::kStep;
  const char* place = ahead.place;
  for (int64_t i = first; i < whole; i += F::kStep) {
    typename F::Vector weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      ahead.is_read_once ? __builtin_prefetch(place, 0, 0) : __builtin_prefetch(place, 0, 3);
      place += ahead.stride;
      weights[r] = F::get(weight + r * columns + i);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      typename F::Vector input = F::get(x + t * columns + i);
      keep_in_register(input);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][t] = F::add(weights[r], input, sum[r][t]);
    }
  }
  ahead.place = place;
  if (stop < columns) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[r * T + t] = sum[r][t];
    return;
  }
  if (whole < columns)
    for (int r = 0; r < R; ++r) {
      const auto w = F::get_first(weight + r * columns + whole, columns - whole);
      for (int t = 0; t < T; ++t)
        sum[r][t] = F::add(w, F::get_first(x + t * columns + whole, columns - whole), sum[r][t]);
    }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) finish<R>(sum, t, bias, out + t * out_stride);
}

// T tokens times a block of weight rows, `step` columns at a time.
template <class W, int T>
static void pass(const typename Factor<W>::Input* x, const W* weight, int64_t columns,
                 int64_t step, int64_t count, Vec* sums, Ahead& ahead, const float* bias,
                 float* out, int64_t out_stride) {
  constexpr int R = tile_rows(T);
  int64_t first = 0;
  do {
    const int64_t stop = first + step < columns ? first + step : columns;
    int64_t r = 0;
    for (; r + R <= count; r += R)
      tile<W, R, T>(x, weight + r * columns, columns, first, stop, sums + r * T, ahead,
                    bias ? bias + r : nullptr, out + r, out_stride);
    for (; r < count; ++r)
      tile<W, 1, T>(x, weight + r * columns, columns, first, stop, sums + r * T, ahead,
                    bias ? bias + r : nullptr, out + r, out_stride);
    first = stop;
  } while (first < columns);
}

template <class W, int T, class... Rest>
static void pass_of(int64_t tokens, Rest&&... rest) {
  if constexpr (T > 0) {
    if (tokens == T) return pass<W, T>(rest...);
    pass_of<W, T - 1>(tokens, rest...);
  }
}

template <class W>
static void product_of(const void* input, int64_t tokens, const Matrix& matrix, int64_t first,
                       int64_t count, const float* bias, float* out, int64_t out_stride) {
  using F = Factor<W>;
  const auto* x = static_cast<const typename F::Input*>(input);
  const int64_t columns = matrix.columns, row_bytes = columns * int64_t{sizeof(W)};
  const int64_t passes = (tokens + kTileTokens - 1) / kTileTokens;
  const int64_t width = (tokens + passes - 1) / passes;
  const int64_t step = kInputBytes / (width * sizeof(*x)) / F::kStep * F::kStep;
  const bool is_whole = columns <= step;
  int64_t rows = tile_rows(width);
  if (!is_whole || passes > 1) {
    rows = kWeightBytes / row_bytes / 12 * 12;
    if (rows < 12) rows = 12;
    if (!is_whole) rows = kMostRows;
  }
  alignas(64) Vec sums[kMostRows * kTileTokens];
  for (int64_t start = first; start < first + count; start += rows) {
    const int64_t many = start + rows < first + count ? rows : first + count - start;
    const W* weight = static_cast<const W*>(matrix.row(start));
    Ahead ahead = {passes == 1, reinterpret_cast<const char*>(weight + many * columns) + kPrefetchAhead,
                   F::kStep * int64_t{sizeof(W)} / passes};
    for (int64_t part = 0; part < passes; ++part) {
      const int64_t from = tokens * part / passes, to = tokens * (part + 1) / passes;
      pass_of<W, kTileTokens>(to - from, x + from * columns, weight, columns, step, many, sums,
                              ahead, bias ? bias + start : nullptr,
                              out + from * out_stride + start - first, out_stride);
    }
  }
}

static void quantized_product(const void* x, int64_t tokens, const Matrix& weight, int64_t first,
                              int64_t count, const float* bias, float* out, int64_t out_stride);

static void product(const void* x, int64_t tokens, const Matrix& weight, int64_t first,
                    int64_t count, const float* bias, float* out, int64_t out_stride) {
  if (weight.bits)
    return quantized_product(x, tokens, weight, first, count, bias, out, out_stride);
  switch (weight.dtype) {
    case DType::kFloat32:
      return product_of<float>(x, tokens, weight, first, count, bias, out, out_stride);
    case DType::kBFloat16:
      return product_of<BFloat16>(x, tokens, weight, first, count, bias, out, out_stride);
    case DType::kFloat16:
      return product_of<Float16>(x, tokens, weight, first, count, bias, out, out_stride);
  }
}

static DType input_dtype(DType weight) {
#if defined(MULTIEXIT_AVX512BF16)
  if (weight == DType::kBFloat16) return weight;
#endif
  (void)weight;
  return DType::kFloat32;
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
