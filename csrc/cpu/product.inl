// Products with weight matrices, row after row of the matrix.

namespace multiexit::cpu::ISA_NAMESPACE {

// Weight rows and tokens of one tile: their accumulators fill the registers.
#if defined(MULTIEXIT_AVX512)
constexpr int kTileRows = 4, kTileTokens = 6;
#elif defined(MULTIEXIT_AVX2)
constexpr int kTileRows = 2, kTileTokens = 4;
#else
constexpr int kTileRows = 2, kTileTokens = 2;
#endif

constexpr int64_t kPrefetchAhead = 2048;  // bytes beyond the tile

// Lanes first, then sum_of, then the bias: the order of every element of every tile.
template <class W, int R, int T>
static inline void tile(const float* x, const W* weight, int64_t columns, const float* bias,
                        float* out, int64_t out_stride) {
  Vec sums[R][T] = {};
  const int64_t whole = columns / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    Vec inputs[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) inputs[t] = load(x + t * columns + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // The next tile, swept in the order of its addresses: R rows at once are too many short
      // streams for the hardware. One Zen-5 core, [50257, 768], GB/s without, with each row's own
      // place of the next tile, with this, and of a plain read: float32 42, 36, 43, 47; bfloat16
      // 21, 40, 46, 48. Four tokens: float32 23, 32, 35; bfloat16 18, 32, 33.
      __builtin_prefetch(reinterpret_cast<const char*>(weight + R * columns + i * R + r * kWidth) +
                             kPrefetchAhead, 0, 3);
      const Vec w = load(weight + r * columns + i);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[r][t] = fma(w, inputs[t], sums[r][t]);
    }
  }
  if (whole < columns)
    for (int r = 0; r < R; ++r) {
      const Vec w = load_first(weight + r * columns + whole, columns - whole);
      for (int t = 0; t < T; ++t)
        sums[r][t] = fma(w, load_first(x + t * columns + whole, columns - whole), sums[r][t]);
    }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      out[t * out_stride + r] = sum_of(sums[r][t]) + (bias ? bias[r] : 0.0f);
}

template <class W, int T>
static void tiles(const float* x, const W* weight, int64_t columns, int64_t count,
                  const float* bias, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + kTileRows <= count; r += kTileRows)
    tile<W, kTileRows, T>(x, weight + r * columns, columns, bias ? bias + r : nullptr, out + r,
                          out_stride);
  for (; r < count; ++r)
    tile<W, 1, T>(x, weight + r * columns, columns, bias ? bias + r : nullptr, out + r, out_stride);
}

template <class W, int T>
static void tokens_of_tiles(int64_t tokens, const float* x, const W* weight, int64_t columns,
                            int64_t count, const float* bias, float* out, int64_t out_stride) {
  if constexpr (T > 0) {
    if (tokens == T) return tiles<W, T>(x, weight, columns, count, bias, out, out_stride);
    tokens_of_tiles<W, T - 1>(tokens, x, weight, columns, count, bias, out, out_stride);
  }
}

template <class W>
static void product_of(const float* x, int64_t tokens, const Matrix& matrix, int64_t first,
                       int64_t count, const float* bias, float* out, int64_t out_stride) {
  const W* weight = static_cast<const W*>(matrix.row(first));
  if (bias) bias += first;
  const int64_t parts = (tokens + kTileTokens - 1) / kTileTokens;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t start = tokens * part / parts, stop = tokens * (part + 1) / parts;
    tokens_of_tiles<W, kTileTokens>(stop - start, x + start * matrix.columns, weight,
                                    matrix.columns, count, bias, out + start * out_stride,
                                    out_stride);
  }
}

static void product(const float* x, int64_t tokens, const Matrix& weight, int64_t first,
                    int64_t count, const float* bias, float* out, int64_t out_stride) {
  switch (weight.dtype) {
    case DType::kFloat32:
      return product_of<float>(x, tokens, weight, first, count, bias, out, out_stride);
    case DType::kBFloat16:
      return product_of<BFloat16>(x, tokens, weight, first, count, bias, out, out_stride);
    case DType::kFloat16:
      return product_of<Float16>(x, tokens, weight, first, count, bias, out, out_stride);
  }
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
