#include "attention.h"

#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace multiexit::cpu {

namespace {

// Rows whose scores of one split stay in a core's cache beside the keys.
constexpr int64_t kTileRows = 64;
// Up to so many new tokens of a sequence its splits are shared out among the threads; beyond,
// there is work enough in its tiles.
constexpr int64_t kFewTokens = 8;

// Consecutive tokens of one sequence, and where its units of work begin.
struct Task {
  int64_t first_token, tokens, sequence;
  int64_t first_split, splits;
  int64_t first_unit, units;
  int64_t first_part;  // among the parts of all tasks whose splits are shared out
  bool is_shared_out;
};

class Attention {
 public:
  Attention(int threads, const float* query, int64_t query_stride, int64_t heads,
            const Cache& cache, const Layout& layout, float scale, int64_t window,
            const DistanceBias& bias, float* out)
      : threads_(threads), query_(query), query_stride_(query_stride), heads_(heads),
        group_(heads / cache.kv_heads), part_size_(attention_part_size(cache.head_dim)),
        cache_(cache), layout_(layout), scale_(scale), window_(window), bias_(bias),
        out_(out) {
    list_tasks();
    share_heads();
  }

  void run() {
    Scratch& scratch = Scratch::of_this_thread();
    parts_ = scratch.room(Scratch::kParts, num_parts_ * part_size_);
    const int64_t rows = std::max(kTileRows, group_);
    const int64_t room = attention_room(rows, cache_.head_dim) + 2 * rows * part_size_;
    float* rooms = scratch.room(Scratch::kScores, std::clamp(threads_, 1, kMaxThreads) * room);
    parallel_for(threads_, num_units_, [&](int64_t unit, int rank) {
      const Task& task = task_of(unit);
      compute(task, unit - task.first_unit, rooms + rank * room);
    });
    if (num_parts_ > 0)
      parallel_for(threads_, num_tasks_, [&](int64_t index, int) { gather(tasks_[index]); });
  }

 private:
  const Task& task_of(int64_t unit) const {
    const auto begins_after = [](int64_t value, const Task& task) {
      return value < task.first_unit;
    };
    return *(std::upper_bound(tasks_, tasks_ + num_tasks_, unit, begins_after) - 1);
  }

  // Keys that a task's first token sees, counted from the sequence's begin.
  int64_t stop_of(const Task& task) const {
    const int64_t later = layout_.starts[task.sequence + 1] - task.first_token - 1;
    return layout_.contexts[task.sequence] - later;
  }

  void list_tasks() {
    const int64_t most = std::max<int64_t>(1, kTileRows / group_);
    Scratch& scratch = Scratch::of_this_thread();
    tasks_ = scratch.room<Task>(Scratch::kTasks, layout_.tokens / most + 2 * layout_.sequences);
    for (int64_t sequence = 0; sequence < layout_.sequences; ++sequence) {
      const int64_t end = layout_.starts[sequence + 1], count = end - layout_.starts[sequence];
      for (int64_t token = layout_.starts[sequence]; token < end; token += most) {
        Task& task = tasks_[num_tasks_++];
        task = {token, std::min(most, end - token), sequence, 0, 0, 0, 0, 0, false};
        const int64_t stop = stop_of(task);
        const int64_t first = window_ > 0 ? std::max<int64_t>(0, stop - window_) : 0;
        task.first_split = first / kAttentionSplit;
        task.splits = (stop + task.tokens - 2) / kAttentionSplit - task.first_split + 1;
        task.is_shared_out = count <= kFewTokens && task.splits > 1;
        task.first_part = num_parts_;
        if (task.is_shared_out) num_parts_ += task.splits * task.tokens * heads_;
      }
    }
  }

  // Key-value heads that a unit takes together: their keys lie side by side in memory, so the
  // more the better while there are units enough for all threads.
  void share_heads() {
    for (heads_of_unit_ = cache_.kv_heads;; heads_of_unit_ = (heads_of_unit_ + 1) / 2) {
      num_units_ = 0;
      bool fits = true;
      for (int64_t i = 0; i < num_tasks_; ++i) {
        Task& task = tasks_[i];
        const int64_t rows = task.tokens * group_;
        fits = fits && heads_of_unit_ * rows <= std::max(kTileRows, group_);
        const int64_t shares = (cache_.kv_heads + heads_of_unit_ - 1) / heads_of_unit_;
        task.first_unit = num_units_;
        task.units = shares * (task.is_shared_out ? task.splits : 1);
        num_units_ += task.units;
      }
      if (heads_of_unit_ == 1 || (fits && (threads_ == 1 || num_units_ >= 8 * threads_))) return;
    }
  }

  AttentionTile tile_of(const Task& task, int64_t share) const {
    const int64_t first = share * heads_of_unit_;
    return {cache_.keys, cache_.values, cache_.dtype,
            layout_.tables + task.sequence * layout_.table_stride,
            cache_.block_size, cache_.kv_heads, cache_.head_dim,
            first, std::min(heads_of_unit_, cache_.kv_heads - first), group_,
            query_ + task.first_token * query_stride_, query_stride_, task.tokens,
            stop_of(task), window_, scale_, bias_};
  }

  void compute(const Task& task, int64_t unit, float* room) {
    const Kernels& k = kernels();
    if (task.is_shared_out) {
      const int64_t share = unit / task.splits, split = unit % task.splits;
      const AttentionTile tile = tile_of(task, share);
      const int64_t rows = task.tokens * group_;
      float* parts = parts_ + (task.first_part + split * task.tokens * heads_ +
                               tile.first_head * rows) * part_size_;
      return k.attend(tile, task.first_split + split, room, parts);
    }
    const AttentionTile tile = tile_of(task, unit);
    const int64_t rows = tile.heads * task.tokens * group_;
    float* all = room + attention_room(rows, cache_.head_dim);
    float* next = all + rows * part_size_;
    k.attend(tile, task.first_split, room, all);
    for (int64_t split = 1; split < task.splits; ++split) {
      k.attend(tile, task.first_split + split, room, next);
      for (int64_t row = 0; row < rows; ++row)
        k.unite(all + row * part_size_, next + row * part_size_, cache_.head_dim);
    }
    write(task, tile.first_head, tile.heads, all);
  }

  // Unites the parts that other threads may have made, in the order of their splits.
  void gather(const Task& task) {
    if (!task.is_shared_out) return;
    const int64_t rows = task.tokens * heads_;
    float* all = parts_ + task.first_part * part_size_;
    for (int64_t split = 1; split < task.splits; ++split)
      for (int64_t row = 0; row < rows; ++row)
        kernels().unite(all + row * part_size_, all + (split * rows + row) * part_size_,
                        cache_.head_dim);
    write(task, 0, cache_.kv_heads, all);
  }

  void write(const Task& task, int64_t first_head, int64_t heads, const float* parts) {
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t token = 0; token < task.tokens; ++token)
        for (int64_t member = 0; member < group_; ++member, parts += part_size_)
          kernels().normalise_part(parts,
                                   out_ + ((task.first_token + token) * heads_ +
                                           (first_head + head) * group_ + member) * cache_.head_dim,
                                   cache_.head_dim);
  }

  const int threads_;
  const float* const query_;
  const int64_t query_stride_, heads_, group_, part_size_;
  const Cache& cache_;
  const Layout& layout_;
  const float scale_;
  const int64_t window_;
  const DistanceBias bias_;
  float* const out_;
  Task* tasks_ = nullptr;
  float* parts_ = nullptr;
  int64_t num_tasks_ = 0, num_parts_ = 0, num_units_ = 0, heads_of_unit_ = 1;
};

}  // namespace

void paged_attention(int threads, const float* query, int64_t query_stride, int64_t heads,
                     const Cache& cache, const Layout& layout, float scale, int64_t window,
                     const DistanceBias& bias, float* out) {
  Attention(threads, query, query_stride, heads, cache, layout, scale, window, bias, out).run();
}

void store_token(const float* key, const float* value, const Cache& cache, int64_t slot) {
  const int64_t width = cache.kv_heads * cache.head_dim;
  const int64_t offset = slot * width * size_of(cache.dtype);
  kernels().from_float(key, static_cast<char*>(cache.keys) + offset, cache.dtype, width);
  kernels().from_float(value, static_cast<char*>(cache.values) + offset, cache.dtype, width);
}

}  // namespace multiexit::cpu
