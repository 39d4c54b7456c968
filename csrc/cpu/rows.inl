// What is done number by number, or row by row: conversions, norms, activations, statistics.

namespace multiexit::cpu::ISA_NAMESPACE {

// Calls body(offset, count) for each vector of `size` numbers; count < kWidth in the last one only.
template <class Body>
static inline void each_vector(int64_t size, Body&& body) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) body(i, kWidth);
  if (i < size) body(i, size - i);
}

template <class T>
static inline Vec load_some(const T* p, int64_t count) {
  return count == kWidth ? load(p) : load_first(p, count);
}

template <class T>
static inline void store_some(T* p, Vec v, int64_t count) {
  count == kWidth ? store(p, v) : store_first(p, v, count);
}

template <class From, class To>
static void convert(const From* x, To* out, int64_t count) {
  each_vector(count, [&](int64_t i, int64_t n) { store_some(out + i, load_some(x + i, n), n); });
}

static void to_float(const void* x, DType dtype, float* out, int64_t count) {
  switch (dtype) {
    case DType::kFloat32: return convert(static_cast<const float*>(x), out, count);
    case DType::kBFloat16: return convert(static_cast<const BFloat16*>(x), out, count);
    case DType::kFloat16: return convert(static_cast<const Float16*>(x), out, count);
  }
}

static void from_float(const float* x, void* out, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::kFloat32: return convert(x, static_cast<float*>(out), count);
    case DType::kBFloat16: return convert(x, static_cast<BFloat16*>(out), count);
    case DType::kFloat16: return convert(x, static_cast<Float16*>(out), count);
  }
}

static void add(const float* x, float* sum, int64_t count) {
  each_vector(count, [&](int64_t i, int64_t n) {
    store_some(sum + i, load_some(sum + i, n) + load_some(x + i, n), n);
  });
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps,
                       float* out, int64_t size) {
  Vec total = fill(0.0f);
  each_vector(size, [&](int64_t i, int64_t n) { total += load_some(x + i, n); });
  const float mean = sum_of(total) / size;
  Vec squares = fill(0.0f);
  each_vector(size, [&](int64_t i, int64_t n) {
    float room[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) room[j] = j < n ? mean : 0.0f;
    const Vec distance = load_some(x + i, n) - load(room);
    squares = fma(distance, distance, squares);
  });
  const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / size + eps);
  each_vector(size, [&](int64_t i, int64_t n) {
    const Vec normed = (load_some(x + i, n) - mean) * scale;
    store_some(out + i, fma(normed, load_some(weight + i, n), load_some(bias + i, n)), n);
  });
}

static void rms_norm(const float* x, const float* weight, float eps, float* out, int64_t size) {
  Vec squares = fill(0.0f);
  each_vector(size, [&](int64_t i, int64_t n) {
    const Vec v = load_some(x + i, n);
    squares = fma(v, v, squares);
  });
  const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / size + eps);
  each_vector(size, [&](int64_t i, int64_t n) {
    store_some(out + i, load_some(x + i, n) * scale * load_some(weight + i, n), n);
  });
}

static float sum(const float* x, int64_t count) {
  Vec totals[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth)
    for (int part = 0; part < 4; ++part) totals[part] += load(x + i + part * kWidth);
  Vec total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  for (; i < count; i += kWidth)
    total += i + kWidth <= count ? load(x + i) : load_first(x + i, count - i);
  return sum_of(total);
}

static inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// x times the normal distribution's mass below x. Of the tail q below -|x|, q exp(x^2 / 2) / t is a
// polynomial in t = 1 / (1 + 0.3 |x|) within 4e-9 of it: the least greatest relative error of degree
// 9 for |x| <= 14. Nothing cancels, so small results are exact, too.
static inline Vec gelu(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec t = 1.0f / fma(size, fill(0.3f), fill(1.0f));
  Vec p = fill(-2.061249316e-02f);
  p = fma(p, t, fill(1.123738810e-01f));
  p = fma(p, t, fill(-2.280628681e-01f));
  p = fma(p, t, fill(1.915752441e-01f));
  p = fma(p, t, fill(-7.924172282e-02f));
  p = fma(p, t, fill(9.605466574e-02f));
  p = fma(p, t, fill(7.842672616e-02f));
  p = fma(p, t, fill(1.102270633e-01f));
  p = fma(p, t, fill(1.195728779e-01f));
  p = fma(p, t, fill(1.196866333e-01f));
  const Vec tail = p * t * exp(-0.5f * x * x);
  return x < 0.0f ? x * tail : x * (1.0f - tail);
}

static inline Vec activated(Vec x, Activation kind) {
  switch (kind) {
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh:
      // 0.5 (1 + tanh y) = sigmoid(2 y)
      return x * sigmoid(1.59576912160573081f * fma(0.044715f * x * x, x, x));
    case Activation::kQuickGelu: return x * sigmoid(1.702f * x);
    case Activation::kRelu: return x < 0.0f ? fill(0.0f) : x;
    case Activation::kSilu: return x * sigmoid(x);
  }
  return x;
}

static void activate(float* x, const float* up, Activation kind, int64_t count) {
  each_vector(count, [&](int64_t i, int64_t n) {
    Vec v = activated(load_some(x + i, n), kind);
    if (up) v *= load_some(up + i, n);
    store_some(x + i, v, n);
  });
}

static void rotate(float* head, const float* cos, const float* sin, int64_t half) {
  each_vector(half, [&](int64_t i, int64_t n) {
    const Vec first = load_some(head + i, n), second = load_some(head + half + i, n);
    const Vec c = load_some(cos + i, n), s = load_some(sin + i, n);
    store_some(head + i, first * c - second * s, n);
    store_some(head + half + i, second * c + first * s, n);
  });
}

static RowStatistics statistics(const float* x, int64_t count) {
  float best = x[0];
  int64_t place = 0;
  if (count >= kWidth) {
    Vec top = load(x);
    for (int64_t i = kWidth; i + kWidth <= count; i += kWidth) {
      const Vec v = load(x + i);
      top = v > top ? v : top;
    }
    best = max_of(top);
    for (int64_t i = count / kWidth * kWidth; i < count; ++i) best = x[i] > best ? x[i] : best;
    while (place + 1 < count && x[place] != best) ++place;
  } else {
    for (int64_t i = 1; i < count; ++i)
      if (x[i] > best) best = x[place = i];
  }
  // A row of -inf has the sum 0, not NaN.
  const float top = best < -3.4e38f ? -3.4028234e38f : best;
  Vec total = fill(0.0f);
  each_vector(count, [&](int64_t i, int64_t n) {
    Vec v = exp(load_some(x + i, n) - top);
    if (n < kWidth)
      for (int64_t j = n; j < kWidth; ++j) v[j] = 0.0f;
    total += v;
  });
  return {best, sum_of(total), place};
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
