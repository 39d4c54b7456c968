// Attention of one query for each row over the paged cache: parts of a sequence's keys side by
// side, cut by its own length alone, and their join by whoever reads the result.
#pragma once
#include "cuda/layer_states.cuh"

namespace multiexit::cuda {

// The keys that a row sees, and their parts.
struct KeySpan {
  int begin, end, part_keys, parts;

  static __device__ __forceinline__ KeySpan of(int context, int64_t window) {
    const int begin = window > 0 ? max(0, context - static_cast<int>(window)) : 0;
    const int keys = context - begin;
    const int share = (keys + kMostParts - 1) / kMostParts;
    const int part_keys = max(kPartKeys, (share + kLanes - 1) / kLanes * kLanes);
    return {begin, context, part_keys, max(1, (keys + part_keys - 1) / part_keys)};
  }
};

// One part of the keys of one row for one head.
struct AttentionUnit {
  int row, head, part, begin, end;

  // Calls `visit` with those of this block: dealt out in turn, all heads of a part one after the
  // other.
  template <class Visit>
  static __device__ __forceinline__ void each(const LayersTask& task, const LayersShared& shared,
                                              int64_t window, Visit&& visit) {
    int index = blockIdx.x;
    for (int row = 0; row < task.rows; ++row) {
      const KeySpan span = KeySpan::of(shared.contexts[row], window);
      for (; index < span.parts * task.heads; index += gridDim.x) {
        const int part = index / task.heads, begin = span.begin + part * span.part_keys;
        visit(AttentionUnit{row, index % task.heads, part, begin,
                            min(begin + span.part_keys, span.end)});
      }
      index -= span.parts * task.heads;
    }
  }
};

// How a warp reads keys: `lanes` of it hold a head's numbers, eight each.
struct HeadLanes {
  int lanes, chunk, key;  // this lane's place in a head, and which of the warp's keys it is at
  bool is_used;

  __device__ __forceinline__ explicit HeadLanes(int head_dim) {
    lanes = 1;
    while (lanes * 8 < head_dim) lanes *= 2;
    const int lane = threadIdx.x % kLanes;
    chunk = lane % lanes;
    key = lane / lanes;
    is_used = chunk * 8 < head_dim;
  }
};

// Means of values over some keys, weighted by exp2(score - top), and the sum of weights.
struct Attended {
  float top = -infinity(), total = 0.0f, values[8] = {};

  __device__ __forceinline__ void scale_to(float new_top) {
    const float decay = new_top == -infinity() ? 1.0f : exp2f(top - new_top);
    top = new_top;
    total *= decay;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= decay;
  }
  __device__ __forceinline__ void merge_lane(int distance) {
    const float other_top = __shfl_xor_sync(~0u, top, distance);
    scale_to(fmaxf(top, other_top));
    total += __shfl_xor_sync(~0u, total, distance);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] += __shfl_xor_sync(~0u, values[i], distance);
  }
};

template <class Number>
__device__ __forceinline__ void widen_eight(const uint4& words, float (&numbers)[8]) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float2 pair = Number::widen((&words.x)[word]);
    numbers[2 * word] = pair.x;
    numbers[2 * word + 1] = pair.y;
  }
}

// Where the cache has a key, or value, of a row; in numbers.
__device__ __forceinline__ int64_t cache_place(const LayersTask& task, const AttentionUnit& unit,
                                               int key) {
  const int block =
      task.block_tables[static_cast<int64_t>(unit.row) * task.table_stride + key / task.block_size];
  const int64_t slot = static_cast<int64_t>(block) * task.block_size + key % task.block_size;
  const int kv_head = unit.head / (task.heads / task.kv_heads);
  return (slot * task.kv_heads + kv_head) * task.head_dim;
}

// L2 fetches what earlier steps have stored of this block's keys and values, the row's own key
// being written in this one.
__device__ __forceinline__ void ask_for_keys(const LayersTask& task, const LayersShared& shared,
                                             const MultiexitLayer& layer) {
  constexpr int kLine = 128;
  AttentionUnit::each(task, shared, layer.window, [&](const AttentionUnit& unit) {
    const int end = min(unit.end, shared.contexts[unit.row] - 1);
#pragma unroll 1
    for (int key = unit.begin + static_cast<int>(threadIdx.x); key < end; key += kThreads) {
      const int64_t place = 2 * cache_place(task, unit, key);
#pragma unroll 1
      for (int byte = 0; byte < 2 * task.head_dim; byte += kLine) {
        ask_ahead(reinterpret_cast<const char*>(layer.key_cache) + place + byte);
        ask_ahead(reinterpret_cast<const char*>(layer.value_cache) + place + byte);
      }
    }
  });
}

// What a warp finds over its keys of a part: some of every kWarps * kLanes / lanes.
template <class Number>
__device__ __forceinline__ Attended attend_in_warp(const LayersTask& task,
                                                   const MultiexitLayer& layer,
                                                   const AttentionUnit& unit,
                                                   const HeadLanes& own) {
  constexpr int kTogether = 4;  // keys of a lane that are on their way at once
  const int keys_of_warp = kLanes / own.lanes, stride = kWarps * keys_of_warp;
  const uint4 none = {0, 0, 0, 0};
  float query[8];
  const uint16_t* place =
      task.query + (static_cast<int64_t>(unit.row) * task.heads + unit.head) * task.head_dim;
  widen_eight<Number>(
      own.is_used ? read_written(reinterpret_cast<const uint4*>(place) + own.chunk) : none, query);
  const float scale = layer.scale * 1.4426950408889634f;
#pragma unroll
  for (float& number : query) number *= scale;

  Attended found;
  const int first = unit.begin + static_cast<int>(threadIdx.x) / kLanes * keys_of_warp;
  for (int start = first; start < unit.end; start += kTogether * stride) {
    uint4 keys[kTogether], values[kTogether];
    float scores[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int key = start + i * stride + own.key;
      keys[i] = values[i] = none;
      if (key >= unit.end || !own.is_used) continue;
      const int64_t at = 2 * cache_place(task, unit, key) + 16 * own.chunk;
      keys[i] = read_written(reinterpret_cast<const uint4*>(layer.key_cache + at));
      values[i] = read_written(reinterpret_cast<const uint4*>(layer.value_cache + at));
    }
    float top = found.top;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      float key[8], score = 0.0f;
      widen_eight<Number>(keys[i], key);
#pragma unroll
      for (int j = 0; j < 8; ++j) score = fmaf(query[j], key[j], score);
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        if (distance < own.lanes) score += __shfl_xor_sync(~0u, score, distance);
      scores[i] = start + i * stride + own.key < unit.end ? score : -infinity();
      top = fmaxf(top, scores[i]);
    }
    found.scale_to(top);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float weight = scores[i] == -infinity() ? 0.0f : exp2f(scores[i] - found.top);
      float value[8];
      widen_eight<Number>(values[i], value);
      found.total += weight;
#pragma unroll
      for (int j = 0; j < 8; ++j) found.values[j] = fmaf(weight, value[j], found.values[j]);
    }
  }
  for (int distance = own.lanes; distance < kLanes; distance *= 2) found.merge_lane(distance);
  return found;
}

// All parts of this block, one after the other; the warps' findings are joined in their order.
// Room: kWarps * (head_dim + 2) floats.
template <class Number>
__device__ __forceinline__ void attend(const LayersTask& task, const LayersShared& shared,
                                       const MultiexitLayer& layer, float* room) {
  const HeadLanes own(task.head_dim);
  const int stride = task.head_dim + 2, warp = threadIdx.x / kLanes;
  AttentionUnit::each(task, shared, layer.window, [&](const AttentionUnit& unit) {
    const Attended found = attend_in_warp<Number>(task, layer, unit, own);
    if (own.key == 0 && own.is_used) {
      float* mine = room + warp * stride;
#pragma unroll
      for (int i = 0; i < 8; ++i) mine[2 + 8 * own.chunk + i] = found.values[i];
      if (own.chunk == 0) {
        mine[0] = found.top;
        mine[1] = found.total;
      }
    }
    __syncthreads();
    float top = room[0], total = 0.0f;
    for (int other = 1; other < kWarps; ++other) top = fmaxf(top, room[other * stride]);
    const int64_t place =
        (static_cast<int64_t>(unit.row) * task.heads + unit.head) * kMostParts + unit.part;
    const int dim = threadIdx.x;
    float value = 0.0f;
    for (int other = 0; other < kWarps; ++other) {
      const float* theirs = room + other * stride;
      const float weight = theirs[0] == -infinity() ? 0.0f : exp2f(theirs[0] - top);
      total = fmaf(theirs[1], weight, total);
      if (dim < task.head_dim) value = fmaf(theirs[2 + dim], weight, value);
    }
    if (dim < task.head_dim) task.attended[place * task.head_dim + dim] = value / total;
    if (dim == 0) task.attention[place] = {top, total};
    __syncthreads();
  });
}

// The parts of all heads, joined: [rows, query_width] states.
template <class Number, int ROWS>
__device__ __forceinline__ void load_attended(const LayersTask& task, const LayersShared& shared,
                                              int64_t window, char* states) {
  const int width = task.query_width();
  for (int row = 0; row < ROWS; ++row) {
    const int parts = row < task.rows ? KeySpan::of(shared.contexts[row], window).parts : 0;
    for (int column = 4 * threadIdx.x; column < width; column += 4 * kThreads) {
      const int head = column / task.head_dim;
      const int64_t place = (static_cast<int64_t>(row) * task.heads + head) * kMostParts;
      const float* values = task.attended + place * task.head_dim + column % task.head_dim;
      float4 mean = {0.0f, 0.0f, 0.0f, 0.0f};
      if (parts == 1) mean = four_of(values);
      if (parts > 1) {
        float top = -infinity(), total = 0.0f;
        for (int part = 0; part < parts; ++part)
          top = fmaxf(top, read_written(task.attention + place + part).x);
#pragma unroll 4
        for (int part = 0; part < parts; ++part) {
          const float2 found = read_written(task.attention + place + part);
          const float4 own = four_of(values + static_cast<int64_t>(part) * task.head_dim);
          const float weight = found.y * exp2f(found.x - top);
          total += weight;
          mean = {fmaf(weight, own.x, mean.x), fmaf(weight, own.y, mean.y),
                  fmaf(weight, own.z, mean.z), fmaf(weight, own.w, mean.w)};
        }
        mean = {mean.x / total, mean.y / total, mean.z / total, mean.w / total};
      }
      put_four<Number>(states, row, 2 * width, column, mean);
    }
  }
  __syncthreads();
}

}  // namespace multiexit::cuda
