// Attention of one query row and one group of heads over a paged cache.

namespace multiexit::cpu::ISA_NAMESPACE {

template <class W>
static inline const W* row_of(const void* cache, const AttentionSpan& span, int64_t position) {
  const int64_t slot = static_cast<int64_t>(span.table[position / span.block_size]) *
                           span.block_size + position % span.block_size;
  return static_cast<const W*>(cache) + (slot * span.kv_heads + span.kv_head) * span.head_dim;
}

template <class W>
static inline float dot(const float* x, const W* y, int64_t size) {
  Vec sum = fill(0.0f);
  each_vector(size, [&](int64_t i, int64_t n) {
    sum = fma(load_some(x + i, n), load_some(y + i, n), sum);
  });
  return sum_of(sum);
}

// Scores in place to weights; returns their sum.
static inline float softmax_weights(float* scores, int64_t count) {
  float top = scores[0];
  for (int64_t i = 1; i < count; ++i) top = scores[i] > top ? scores[i] : top;
  Vec total = fill(0.0f);
  each_vector(count, [&](int64_t i, int64_t n) {
    Vec v = exp(load_some(scores + i, n) - top);
    if (n < kWidth)
      for (int64_t j = n; j < kWidth; ++j) v[j] = 0.0f;
    store_some(scores + i, v, n);
    total += v;
  });
  return sum_of(total);
}

// Sum over the keys of weight * value, kParts vectors of the head at a time.
template <class W, int kParts>
static inline void mix(const AttentionSpan& span, const float* weights, int64_t offset, float scale,
                       float* out) {
  Vec sums[kParts] = {};
  for (int64_t position = span.first; position < span.stop; ++position) {
    const W* value = row_of<W>(span.values, span, position) + offset;
    const Vec weight = fill(weights[position - span.first]);
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part)
      sums[part] = fma(weight, load(value + part * kWidth), sums[part]);
  }
  for (int part = 0; part < kParts; ++part) store(out + offset + part * kWidth, sums[part] * scale);
}

template <class W>
static inline void mix_rest(const AttentionSpan& span, const float* weights, int64_t offset,
                            float scale, float* out) {
  const int64_t count = span.head_dim - offset;
  Vec sum = fill(0.0f);
  for (int64_t position = span.first; position < span.stop; ++position)
    sum = fma(fill(weights[position - span.first]),
              load_first(row_of<W>(span.values, span, position) + offset, count), sum);
  store_first(out + offset, sum * scale, count);
}

template <class W>
static void attend_to(const float* query, int64_t group, const AttentionSpan& span, float* scores,
                      float* out) {
  const int64_t keys = span.stop - span.first;
  for (int64_t head = 0; head < group; ++head, query += span.head_dim, out += span.head_dim) {
    for (int64_t position = span.first; position < span.stop; ++position)
      scores[position - span.first] =
          dot(query, row_of<W>(span.keys, span, position), span.head_dim) * span.scale;
    const float scale = 1.0f / softmax_weights(scores, keys);
    int64_t offset = 0;
    for (; offset + 4 * kWidth <= span.head_dim; offset += 4 * kWidth)
      mix<W, 4>(span, scores, offset, scale, out);
    for (; offset + kWidth <= span.head_dim; offset += kWidth)
      mix<W, 1>(span, scores, offset, scale, out);
    if (offset < span.head_dim) mix_rest<W>(span, scores, offset, scale, out);
  }
}

static void attend(const float* query, int64_t group, const AttentionSpan& span, float* scores,
                   float* out) {
  switch (span.dtype) {
    case DType::kFloat32: return attend_to<float>(query, group, span, scores, out);
    case DType::kBFloat16: return attend_to<BFloat16>(query, group, span, scores, out);
    case DType::kFloat16: return attend_to<Float16>(query, group, span, scores, out);
  }
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
