// Products with quantized weight matrices: each block of columns is dequantized in registers.
//
// A code times its scale is exact in float32 (8 bits, or 4, times the 8 of a bfloat16), and the sums have
// the order of product.inl, so the result has the bits of the dequantized matrix's product.
//
// Layout of a row: blocks of 32 columns, then the padding of the last one, whose codes mean 0. A
// block of 8-bit codes is 32 signed bytes. A block of 4-bit codes is 16 bytes: byte i holds column
// i in its low half and column 16 + i in its high half, each as the code plus 8. A block of fp8 is 32
// numbers of 8 bits: a sign, 4 of exponent with bias 7, 3 of mantissa (e4m3).

namespace multiexit::cpu::ISA_NAMESPACE {

constexpr int64_t kBlock = Matrix::kBlock;
constexpr int kBlockVecs = kBlock / kWidth;

// Tokens that are multiplied as codes stream by. More of them take rows that were dequantized once
// into the cache: from there on conversions would cost more than a store and a load.
#if defined(MULTIEXIT_AVX512)
constexpr int kStreamTokens = 8, kSingleRows = 8;
constexpr int stream_rows(int tokens) { return tokens <= 4 ? 4 : tokens <= 6 ? 3 : 2; }
#elif defined(MULTIEXIT_AVX2)
constexpr int kStreamTokens = 3, kSingleRows = 4;
constexpr int stream_rows(int) { return 2; }
#else
constexpr int kStreamTokens = 2, kSingleRows = 2;
constexpr int stream_rows(int) { return 2; }
#endif

constexpr int64_t kDequantizedBytes = 64 << 10;  // a small part of the L2 cache

// kWidth bytes as numbers. In words of the instruction set, because g++ 12 takes the bytes apart
// one by one where it is left to convert them.
#if defined(MULTIEXIT_AVX512)
static inline VecInt widen(const int8_t* p) {
  return (VecInt)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline VecInt widen(const uint8_t* p) {
  return (VecInt)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#elif defined(MULTIEXIT_AVX2)
static inline VecInt widen(const int8_t* p) {
  return (VecInt)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline VecInt widen(const uint8_t* p) {
  return (VecInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
#else
template <class Byte>
static inline VecInt widen(const Byte* p) {
  VecInt wide;
  for (int64_t i = 0; i < kWidth; ++i) wide[i] = p[i];
  return wide;
}
#endif

struct Codes8 {
  static constexpr int64_t kBytes = kBlock;

  static inline void dequantize(const uint8_t* p, float scale, Vec* out) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlockVecs; ++v) {
      const VecInt codes = widen(reinterpret_cast<const int8_t*>(p) + v * kWidth);
      out[v] = __builtin_convertvector(codes, Vec) * scale;
    }
  }
};

struct Codes4 {
  static constexpr int64_t kBytes = kBlock / 2;

#if defined(MULTIEXIT_AVX512)
  static inline void dequantize(const uint8_t* p, float scale, Vec* out) {
    // A look-up takes the lowest four bits of each number and multiplies on the way.
    const Vec values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const __m512 scaled = (__m512)(values * scale);
    const __m512i codes = (__m512i)widen(p);
    out[0] = (Vec)_mm512_permutexvar_ps(codes, scaled);
    out[1] = (Vec)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), scaled);
  }
#else
  static inline void dequantize(const uint8_t* p, float scale, Vec* out) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlockVecs / 2; ++v) {
      const VecInt pairs = widen(p + v * kWidth);
      out[v] = __builtin_convertvector((pairs & 15) - 8, Vec) * scale;
      out[v + kBlockVecs / 2] = __builtin_convertvector((pairs >> 4) - 8, Vec) * scale;
    }
  }
#endif
};

// Shifted to where float16 has its exponent and mantissa, a number of e4m3 is 2^-8 of itself, those
// without a leading 1 too.
struct CodesFloat8 {
  static constexpr int64_t kBytes = kBlock;

  static inline void dequantize(const uint8_t* p, float scale, Vec* out) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlockVecs; ++v) out[v] = halves(p + v * kWidth) * (scale * 256.0f);
  }

 private:
#if defined(MULTIEXIT_AVX512)
  static inline Vec halves(const uint8_t* p) {
    const __m256i codes =
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return (Vec)_mm512_cvtph_ps(
        _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16((short)0xbf80)));
  }
#elif defined(MULTIEXIT_AVX2)
  static inline Vec halves(const uint8_t* p) {
    const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return (Vec)_mm256_cvtph_ps(
        _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16((short)0xbf80)));
  }
#else
  static inline Vec halves(const uint8_t* p) {
    Vec numbers;
    for (int64_t i = 0; i < kWidth; ++i) {
      const uint16_t sign = (p[i] & 0x80) << 8, size = (p[i] & 0x7f) << 7;
      numbers[i] = half_to_float(sign | size);
    }
    return numbers;
  }
#endif
};

// One row's codes and scales, as far as a kernel needs to know them.
struct QuantizedRows {
  const uint8_t* codes;
  const BFloat16* scales;
  int64_t columns, row_bytes, groups, group_blocks;

  QuantizedRows(const Matrix& matrix, int64_t first)
      : codes(static_cast<const uint8_t*>(matrix.row(first))),
        scales(matrix.scales + first * matrix.groups()),
        columns(matrix.columns),
        row_bytes(matrix.row_bytes()),
        groups(matrix.groups()),
        group_blocks(matrix.group_size / kBlock) {}

  QuantizedRows from(int64_t row) const {
    QuantizedRows rows = *this;
    rows.codes += row * row_bytes;
    rows.scales += row * groups;
    return rows;
  }
};

// Calls body(block, scales) for each block of columns: scales[r * kWidth] is that of row r.
template <int R, class Body>
static inline void each_block(const QuantizedRows& rows, Body&& body) {
  const int64_t blocks = (rows.columns + kBlock - 1) / kBlock;
  float scales[R][kWidth];
  for (int64_t first = 0; first < rows.groups; first += kWidth) {
    const int64_t count = rows.groups - first < kWidth ? rows.groups - first : kWidth;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const BFloat16* own = rows.scales + r * rows.groups + first;
      store(scales[r], count == kWidth ? load(own) : load_first(own, count));
    }
    for (int64_t g = 0; g < count; ++g) {
      const int64_t start = (first + g) * rows.group_blocks;
      const int64_t stop = start + rows.group_blocks < blocks ? start + rows.group_blocks : blocks;
      for (int64_t block = start; block < stop; ++block) body(block, *scales + g);
    }
  }
}

// As `tile` of product.inl.
template <class Codes, int R, int T>
static inline void quantized_tile(const float* x, const QuantizedRows& rows, const float* bias,
                                  float* out, int64_t out_stride) {
  constexpr int kRowsOfLine = 64 / Codes::kBytes;
  const int64_t columns = rows.columns, whole = columns / kBlock;
  Vec sums[R][T] = {};
  each_block<R>(rows, [&](int64_t block, const float* scales) {
    const float* inputs = x + block * kBlock;
    const uint8_t* ahead = rows.codes + R * rows.row_bytes + block * R * Codes::kBytes;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // The next tile in the order of its addresses, see product.inl.
      if (r % kRowsOfLine == 0) __builtin_prefetch(ahead + r * Codes::kBytes + kPrefetchAhead, 0, 0);
      Vec weight[kBlockVecs];
      Codes::dequantize(rows.codes + r * rows.row_bytes + block * Codes::kBytes, scales[r * kWidth], weight);
      if (block < whole) {
#pragma GCC unroll 8
        for (int v = 0; v < kBlockVecs; ++v)
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t)
            sums[r][t] = fma(weight[v], load(inputs + t * columns + v * kWidth), sums[r][t]);
      } else {
        const int64_t left = columns - block * kBlock;
        for (int v = 0; v * kWidth < left; ++v) {
          const int64_t count = left - v * kWidth < kWidth ? left - v * kWidth : kWidth;
          for (int t = 0; t < T; ++t) {
            const float* p = inputs + t * columns + v * kWidth;
            sums[r][t] =
                fma(weight[v], count == kWidth ? load(p) : load_first(p, count), sums[r][t]);
          }
        }
      }
    }
  });
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      out[t * out_stride + r] = sum_of(sums[r][t]) + (bias ? bias[r] : 0.0f);
}

template <class Codes, int T>
static void quantized_tiles(const float* x, const QuantizedRows& rows, int64_t count,
                            const float* bias, float* out, int64_t out_stride) {
  constexpr int R = T == 1 ? kSingleRows : stream_rows(T);
  int64_t r = 0;
  for (; r + R <= count; r += R)
    quantized_tile<Codes, R, T>(x, rows.from(r), bias ? bias + r : nullptr, out + r, out_stride);
  for (; r < count; ++r)
    quantized_tile<Codes, 1, T>(x, rows.from(r), bias ? bias + r : nullptr, out + r, out_stride);
}

template <class Codes, int T>
static void tokens_of_quantized_tiles(int64_t tokens, const float* x, const QuantizedRows& rows,
                                      int64_t count, const float* bias, float* out,
                                      int64_t out_stride) {
  if constexpr (T > 0) {
    if (tokens == T) return quantized_tiles<Codes, T>(x, rows, count, bias, out, out_stride);
    tokens_of_quantized_tiles<Codes, T - 1>(tokens, x, rows, count, bias, out, out_stride);
  }
}

template <class Codes>
static void dequantize_row(const QuantizedRows& row, float* out) {
  each_block<1>(row, [&](int64_t block, const float* scale) {
    Vec weight[kBlockVecs];
    Codes::dequantize(row.codes + block * Codes::kBytes, *scale, weight);
    for (int64_t v = 0, i = block * kBlock; v < kBlockVecs && i < row.columns; ++v, i += kWidth)
      row.columns - i < kWidth ? store_first(out + i, weight[v], row.columns - i)
                               : store(out + i, weight[v]);
  });
}

template <class Codes>
static void quantized_product_of(const float* x, int64_t tokens, const Matrix& matrix,
                                 int64_t first, int64_t count, const float* bias, float* out,
                                 int64_t out_stride) {
  const QuantizedRows rows(matrix, first);
  if (bias) bias += first;
  if (tokens <= kStreamTokens)
    return tokens_of_quantized_tiles<Codes, kStreamTokens>(tokens, x, rows, count, bias, out,
                                                           out_stride);
  const int64_t columns = matrix.columns;
  const int64_t fitting = kDequantizedBytes / 4 / columns / 12 * 12;
  const int64_t step = fitting < 12 ? 12 : fitting;
  float* wide = Scratch::of_this_thread().room(Scratch::kDequantized, step * columns);
  for (int64_t start = 0; start < count; start += step) {
    const int64_t some = count - start < step ? count - start : step;
    for (int64_t r = 0; r < some; ++r)
      dequantize_row<Codes>(rows.from(start + r), wide + r * columns);
    product(x, tokens, {wide, DType::kFloat32, some, columns}, 0, some,
            bias ? bias + start : nullptr, out + start, out_stride);
  }
}

static void quantized_product(const void* x, int64_t tokens, const Matrix& weight, int64_t first,
                              int64_t count, const float* bias, float* out, int64_t out_stride) {
  const auto run = weight.is_float    ? quantized_product_of<CodesFloat8>
                   : weight.bits == 8 ? quantized_product_of<Codes8>
                                      : quantized_product_of<Codes4>;
  run(static_cast<const float*>(x), tokens, weight, first, count, bias, out, out_stride);
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
