// What attention among packed rows is made of, besides products: softmax and sums of values.

namespace multiexit::cpu::ISA_NAMESPACE {

// Scores in place to weights of sum 1.
static void softmax(float* x, int64_t count) {
  float top = x[0];
  for (int64_t i = 1; i < count; ++i) top = x[i] > top ? x[i] : top;
  Vec total = fill(0.0f);
  each_vector(count, [&](int64_t i, int64_t n) {
    Vec v = exp(load_some(x + i, n) - top);
    if (n < kWidth)
      for (int64_t j = n; j < kWidth; ++j) v[j] = 0.0f;
    store_some(x + i, v, n);
    total += v;
  });
  const float scale = 1.0f / sum_of(total);
  each_vector(count,
              [&](int64_t i, int64_t n) { store_some(x + i, load_some(x + i, n) * scale, n); });
}

// kRows rows of weights times kParts vectors of the values' columns; the last vector holds `last`
// numbers. A column's sum runs over the values in their order, whatever is computed beside it.
template <int kRows, int kParts>
static inline void mix_tile(const float* weights, int64_t count, const float* values, int64_t size,
                            float* out, int64_t out_stride, int64_t last) {
  Vec sums[kRows][kParts] = {};
  for (int64_t i = 0; i < count; ++i, values += size) {
    Vec value[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part)
      value[part] = part + 1 < kParts ? load(values + part * kWidth)
                                      : load_some(values + part * kWidth, last);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Vec weight = fill(weights[row * count + i]);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part)
        sums[row][part] = fma(weight, value[part], sums[row][part]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part)
      store_some(out + row * out_stride + part * kWidth, sums[row][part],
                 part + 1 < kParts ? kWidth : last);
}

template <int kRows>
static inline void mix_rows(const float* weights, int64_t count, const float* values, int64_t size,
                            float* out, int64_t out_stride) {
  int64_t column = 0;
  for (; column + 4 * kWidth <= size; column += 4 * kWidth)
    mix_tile<kRows, 4>(weights, count, values + column, size, out + column, out_stride, kWidth);
  for (; column < size; column += kWidth)
    mix_tile<kRows, 1>(weights, count, values + column, size, out + column, out_stride,
                       size - column < kWidth ? size - column : kWidth);
}

static void mix(const float* weights, int64_t rows, int64_t count, const float* values,
                int64_t size, float* out, int64_t out_stride) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    mix_rows<4>(weights + row * count, count, values, size, out + row * out_stride, out_stride);
  for (; row < rows; ++row)
    mix_rows<1>(weights + row * count, count, values, size, out + row * out_stride, out_stride);
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
