// Products of one token with weight rows that lie anywhere.

namespace multiexit::cpu::ISA_NAMESPACE {

// Sums in the order of `tile`; while some rows are multiplied, the next ones are fetched.
template <class W>
static void gathered_product_of(const void* input, const Matrix& matrix, const int32_t* listed,
                                int64_t count, const float* bias, float* out) {
  using F = Factor<W>;
  constexpr int R = tile_rows(1);
  const auto* x = static_cast<const typename F::Input*>(input);
  const int64_t columns = matrix.columns, whole = columns / F::kStep * F::kStep;
  const auto row = [&](int64_t place) {
    return static_cast<const W*>(matrix.row(listed[place < count ? place : count - 1]));
  };
  for (int64_t start = 0; start < count; start += R) {
    const W *own[R], *next[R];
    for (int r = 0; r < R; ++r) own[r] = row(start + r), next[r] = row(start + R + r);
    Vec sum[R][1] = {};
    for (int64_t i = 0; i < whole; i += F::kStep) {
      typename F::Vector token = F::get(x + i);
      keep_in_register(token);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(next[r] + i, 0, 3);
        sum[r][0] = F::add(F::get(own[r] + i), token, sum[r][0]);
      }
    }
    if (whole < columns) {
      const auto token = F::get_first(x + whole, columns - whole);
      for (int r = 0; r < R; ++r)
        sum[r][0] = F::add(F::get_first(own[r] + whole, columns - whole), token, sum[r][0]);
    }
    float numbers[R];
    finish<R>(sum, 0, nullptr, numbers);
    for (int64_t i = start; i < count && i < start + R; ++i)
      out[i] = numbers[i - start] + (bias ? bias[listed[i]] : 0.0f);
  }
}

static void gathered_product(const void* x, const Matrix& weight, const int32_t* listed,
                             int64_t count, const float* bias, float* out) {
  if (weight.bits) {
    for (int64_t i = 0; i < count; ++i)
      quantized_product(x, 1, weight, listed[i], 1, bias, out + i, 1);
    return;
  }
  switch (weight.dtype) {
    case DType::kFloat32:
      return gathered_product_of<float>(x, weight, listed, count, bias, out);
    case DType::kBFloat16:
      return gathered_product_of<BFloat16>(x, weight, listed, count, bias, out);
    case DType::kFloat16:
      return gathered_product_of<Float16>(x, weight, listed, count, bias, out);
  }
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
