#include "attention.h"

#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace multiexit::cpu {

void paged_attention(int threads, const float* query, int64_t query_stride, int64_t heads,
                     const Cache& cache, const Layout& layout, float scale, int64_t window,
                     float* out) {
  const Kernels& k = kernels();
  const int64_t group = heads / cache.kv_heads, width = group * cache.head_dim;
  const int64_t room = (layout.longest_context + 15) / 16 * 16;
  const int64_t ranks = std::clamp(threads, 1, kMaxThreads);
  float* scores = Scratch::of_this_thread().room(Scratch::kScores, ranks * room);
  // Eight chunks a thread balance what a causal mask makes unequal.
  const int64_t blocks =
      std::min(layout.tokens, std::max<int64_t>(1, 8 * threads / cache.kv_heads));
  parallel_for(threads, blocks * cache.kv_heads, [&](int64_t chunk, int rank) {
    const int64_t block = chunk / cache.kv_heads, kv_head = chunk % cache.kv_heads;
    const int64_t end = layout.tokens * (block + 1) / blocks;
    for (int64_t token = layout.tokens * block / blocks; token < end; ++token) {
      const int64_t sequence =
          std::upper_bound(layout.starts, layout.starts + layout.sequences, token) -
          layout.starts - 1;
      const int64_t stop = layout.contexts[sequence] - (layout.starts[sequence + 1] - token) + 1;
      const AttentionSpan span = {
          cache.keys, cache.values, cache.dtype, layout.tables + sequence * layout.table_stride,
          cache.block_size, cache.kv_heads, cache.head_dim, kv_head,
          window > 0 ? std::max<int64_t>(0, stop - window) : 0, stop, scale};
      k.attend(query + token * query_stride + kv_head * width, group, span, scores + rank * room,
               out + (token * cache.kv_heads + kv_head) * width);
    }
  });
}

void store_token(const float* key, const float* value, const Cache& cache, int64_t slot) {
  const int64_t width = cache.kv_heads * cache.head_dim;
  const int64_t offset = slot * width * size_of(cache.dtype);
  kernels().from_float(key, static_cast<char*>(cache.keys) + offset, cache.dtype, width);
  kernels().from_float(value, static_cast<char*>(cache.values) + offset, cache.dtype, width);
}

}  // namespace multiexit::cpu
