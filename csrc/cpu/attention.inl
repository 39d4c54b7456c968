// Attention of some query rows over one split of a paged sequence, and the union of splits.
//
// What a row adds up, and in which order, follows from its own keys' positions alone: scores by
// the number's index in the head (four chains), weights by key. So its bits are the same beside
// any other rows.

namespace multiexit::cpu::ISA_NAMESPACE {

// Rows that share the loads of a key or value: their sums fill the registers.
#if defined(MULTIEXIT_AVX512)
constexpr int kTileQueries = 6;
#else
constexpr int kTileQueries = 2;
#endif
constexpr int64_t kChains = 4;

static_assert(kAttentionSplit % kWidth == 0, "a split is a whole number of vectors");
static_assert(DistanceBias::kMargin >= kWidth, "a vector of biases may begin at either end");

static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t down(int64_t x) { return x / kWidth * kWidth; }
static inline int64_t up(int64_t x) { return down(x + kWidth - 1); }

// The keys of a split that some row sees, [first, stop) counted from the split's own first key.
struct SplitKeys {
  int64_t first, stop;
  int64_t offsets[kAttentionSplit];  // numbers from the cache's begin to the key's first head

  SplitKeys(const AttentionTile& tile, int64_t split) {
    const int64_t start = split * kAttentionSplit;
    first = tile.window > 0 ? max_of(0, tile.stop - tile.window - start) : 0;
    stop = min_of(tile.stop + tile.tokens - 1 - start, kAttentionSplit);
    const int64_t width = tile.kv_heads * tile.head_dim;
    int64_t block = (start + first) / tile.block_size, place = (start + first) % tile.block_size;
    for (int64_t i = first; i < stop; ++i) {
      offsets[i] = (static_cast<int64_t>(tile.table[block]) * tile.block_size + place) * width;
      if (++place < tile.block_size) continue;
      place = 0;
      ++block;
    }
    // The rest of the first and last vectors of keys: never seen, so any own key may stand there.
    for (int64_t i = first / kWidth * kWidth; i < first; ++i) offsets[i] = offsets[first];
    for (int64_t i = stop; i % kWidth; ++i) offsets[i] = offsets[stop - 1];
  }
};

// What the row of a token sees of a split; none when stop <= first.
struct Seen {
  int64_t first, stop;

  Seen(const AttentionTile& tile, int64_t split, int64_t token) {
    const int64_t end = tile.stop + token - split * kAttentionSplit;
    first = tile.window > 0 ? max_of(0, end - tile.window) : 0;
    stop = min_of(end, kAttentionSplit);
  }
};

// Brings the part of some keys' rows to the cache that the heads of a tile will read.
template <class W>
static inline void prefetch_keys(const AttentionTile& tile, const W* cache, const int64_t* offsets,
                                 int64_t count) {
  const int64_t bytes = tile.heads * tile.head_dim * static_cast<int64_t>(sizeof(W));
  for (int64_t i = 0; i < count; ++i) {
    const char* row =
        reinterpret_cast<const char*>(cache + offsets[i] + tile.first_head * tile.head_dim);
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// Keys [kWidth][head_dim] to [head_dim][kWidth].
template <class W>
static inline void turn_keys(const W* keys, const int64_t* offsets, int64_t head_dim, float* out) {
  each_vector(head_dim, [&](int64_t i, int64_t n) {
    Vec rows[kWidth];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kWidth; ++j) rows[j] = load_some(keys + offsets[j] + i, n);
    transpose(rows);
#pragma GCC unroll 16
    for (int64_t j = 0; j < kWidth; ++j) store(out + (i + j) * kWidth, rows[j]);
  });
}

template <int R>
static inline void score_rows(const float* const* queries, const float* turned, int64_t head_dim,
                              float scale, const float* const* biases, float* scores) {
  Vec sums[R][kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= head_dim; i += kChains)
#pragma GCC unroll 4
    for (int64_t chain = 0; chain < kChains; ++chain) {
      const Vec keys = load(turned + (i + chain) * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        sums[r][chain] = fma(fill(queries[r][i + chain]), keys, sums[r][chain]);
    }
  for (; i < head_dim; ++i)
    for (int r = 0; r < R; ++r)
      sums[r][0] = fma(fill(queries[r][i]), load(turned + i * kWidth), sums[r][0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vec sum = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
    store(scores + r * kAttentionSplit,
          biases ? fma(sum, fill(scale), load(biases[r])) : sum * scale);
  }
}

// Adds weight * value of the keys [first, stop) to R rows of sums.
template <class W, int R>
static inline void mix_rows(const W* values, const int64_t* offsets, int64_t first, int64_t stop,
                            const float* weights, int64_t head_dim, float* sums, int64_t stride) {
  if (first >= stop) return;
  int64_t i = 0;
  for (; i + 4 * kWidth <= head_dim; i += 4 * kWidth) {
    Vec own[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part)
        own[r][part] = load(sums + r * stride + i + part * kWidth);
    for (int64_t key = first; key < stop; ++key) {
      const W* value = values + offsets[key] + i;
      Vec parts[4];
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) parts[part] = load(value + part * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec weight = fill(weights[r * kAttentionSplit + key]);
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) own[r][part] = fma(weight, parts[part], own[r][part]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part)
        store(sums + r * stride + i + part * kWidth, own[r][part]);
  }
  for (; i < head_dim; i += kWidth) {
    const int64_t count = min_of(head_dim - i, kWidth);
    Vec own[R];
    for (int r = 0; r < R; ++r) own[r] = load(sums + r * stride + i);
    for (int64_t key = first; key < stop; ++key) {
      const Vec value = load_some(values + offsets[key] + i, count);
      for (int r = 0; r < R; ++r)
        own[r] = fma(fill(weights[r * kAttentionSplit + key]), value, own[r]);
    }
    for (int r = 0; r < R; ++r) store(sums + r * stride + i, own[r]);
  }
}

// Calls body(RowCount, first row) for `rows` rows, kTileQueries at a time.
template <int R>
struct RowCount {
  static constexpr int value = R;
};

template <int R, class Body>
static inline void last_rows(int64_t row, int64_t count, Body&& body) {
  if constexpr (R > 0) {
    if (count == R) return body(RowCount<R>{}, row);
    last_rows<R - 1>(row, count, body);
  }
}

template <class Body>
static inline void each_rows(int64_t rows, Body&& body) {
  int64_t row = 0;
  for (; row + kTileQueries <= rows; row += kTileQueries) body(RowCount<kTileQueries>{}, row);
  last_rows<kTileQueries - 1>(row, rows - row, body);
}

// Scores of a row to weights, 0 for what it does not see; its greatest score and their sum.
static inline void soften(float* scores, Seen seen, float* top, float* sum) {
  const int64_t begin = down(seen.first), end = up(seen.stop);
  for (int64_t i = begin; i < seen.first; ++i) scores[i] = -__builtin_inff();
  for (int64_t i = seen.stop; i < end; ++i) scores[i] = -__builtin_inff();
  Vec best = fill(-__builtin_inff());
  for (int64_t i = begin; i < end; i += kWidth) {
    const Vec v = load(scores + i);
    best = v > best ? v : best;
  }
  *top = max_of(best);
  Vec total = fill(0.0f);
  for (int64_t i = begin; i < end; i += kWidth) {
    const Vec v = exp(load(scores + i) - *top);
    store(scores + i, v);
    total += v;
  }
  *sum = sum_of(total);
}

template <class W>
static void attend_to(const AttentionTile& tile, int64_t split, float* room, float* parts) {
  const SplitKeys keys(tile, split);
  const int64_t rows = tile.tokens * tile.group, dim = tile.head_dim;
  const int64_t part_size = attention_part_size(dim);
  const W* key_cache = static_cast<const W*>(tile.keys);
  const W* value_cache = static_cast<const W*>(tile.values);
  const int64_t begin = down(keys.first), end = up(keys.stop);
  const int64_t first_key = split * kAttentionSplit;
  float* turned = room;
  float* scores = room + up(dim) * kWidth;

  for (int64_t key = begin; key < end; key += kWidth) {
    const int64_t next = key + kWidth;
    for (int64_t head = 0; head < tile.heads; ++head) {
      const int64_t from = kWidth * head / tile.heads, to = kWidth * (head + 1) / tile.heads;
      if (next < end)
        prefetch_keys(tile, key_cache, keys.offsets + next + from, to - from);
      else
        prefetch_keys(tile, value_cache, keys.offsets + begin + from, to - from);
      const int64_t kv_head = tile.first_head + head;
      turn_keys(key_cache + kv_head * dim, keys.offsets + key, dim, turned);
      each_rows(rows, [&](auto count, int64_t row) {
        constexpr int R = decltype(count)::value;
        if (Seen(tile, split, (row + R - 1) / tile.group).stop <= key) return;
        const float* queries[R];
        const float* biases[R];
        for (int r = 0; r < R; ++r) {
          const int64_t token = (row + r) / tile.group;
          const int64_t query_head = kv_head * tile.group + (row + r) % tile.group;
          queries[r] = tile.query + token * tile.query_stride + query_head * dim;
          if (tile.bias.table)
            biases[r] = tile.bias.at(query_head, first_key + key - (tile.stop - 1 + token));
        }
        score_rows<R>(queries, turned, dim, tile.scale, tile.bias.table ? biases : nullptr,
                      scores + (head * rows + row) * kAttentionSplit + key);
      });
    }
  }

  for (int64_t row = 0; row < tile.heads * rows; ++row) {
    float* part = parts + row * part_size;
    for (int64_t i = 0; i < part_size; ++i) part[i] = 0.0f;
    const Seen seen(tile, split, row % rows / tile.group);
    if (seen.first < seen.stop)
      soften(scores + row * kAttentionSplit, seen, part + up(dim), part + up(dim) + 1);
  }

  for (int64_t key = begin; key < end; key += kWidth) {
    const int64_t next = key + kWidth;
    for (int64_t head = 0; head < tile.heads; ++head) {
      const int64_t from = kWidth * head / tile.heads, to = kWidth * (head + 1) / tile.heads;
      if (next < end) prefetch_keys(tile, value_cache, keys.offsets + next + from, to - from);
      const W* values = value_cache + (tile.first_head + head) * dim;
      each_rows(rows, [&](auto count, int64_t row) {
        constexpr int R = decltype(count)::value;
        const float* weights = scores + (head * rows + row) * kAttentionSplit;
        float* sums = parts + (head * rows + row) * part_size;
        const auto alone = [&](int64_t from, int64_t to) {
          for (int r = 0; r < R; ++r) {
            const Seen own(tile, split, (row + r) / tile.group);
            mix_rows<W, 1>(values, keys.offsets, max_of(from, own.first), min_of(to, own.stop),
                           weights + r * kAttentionSplit, dim, sums + r * part_size, part_size);
          }
        };
        // The first row's keys end first, the last row's begin last: what all of them see lies
        // between, and each row's own keys before and after that.
        const Seen one(tile, split, row / tile.group);
        const Seen last(tile, split, (row + R - 1) / tile.group);
        const int64_t first = max_of(key, last.first), stop = min_of(next, one.stop);
        if (R == 1 || first >= stop) return alone(key, next);
        alone(key, first);
        mix_rows<W, R>(values, keys.offsets, first, stop, weights, dim, sums, part_size);
        alone(stop, next);
      });
    }
  }
}

static void attend(const AttentionTile& tile, int64_t split, float* room, float* parts) {
  switch (tile.dtype) {
    case DType::kFloat32: return attend_to<float>(tile, split, room, parts);
    case DType::kBFloat16: return attend_to<BFloat16>(tile, split, room, parts);
    case DType::kFloat16: return attend_to<Float16>(tile, split, room, parts);
  }
}

static void unite(float* all, const float* part, int64_t head_dim) {
  const int64_t width = attention_part_size(head_dim) - 16;
  float& top = all[up(head_dim)];
  float& sum = all[up(head_dim) + 1];
  const float part_top = part[up(head_dim)], part_sum = part[up(head_dim) + 1];
  if (part_sum == 0.0f) return;
  if (sum == 0.0f) {
    for (int64_t i = 0; i < width + 16; ++i) all[i] = part[i];
    return;
  }
  const float best = part_top > top ? part_top : top;
  const Vec old_share = exp(fill(top - best)), new_share = exp(fill(part_top - best));
  for (int64_t i = 0; i < up(head_dim); i += kWidth)
    store(all + i, fma(new_share, load(part + i), load(all + i) * old_share));
  top = best;
  sum = fma(new_share, fill(part_sum), sum * old_share)[0];
}

static void normalise_part(const float* part, float* out, int64_t head_dim) {
  const float scale = 1.0f / part[up(head_dim) + 1];
  each_vector(head_dim, [&](int64_t i, int64_t n) {
    store_some(out + i, load_some(part + i, n) * scale, n);
  });
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
