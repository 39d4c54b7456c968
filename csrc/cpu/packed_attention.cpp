#include "packed_attention.h"

#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace multiexit::cpu {

namespace {

// Queries whose scores wait in the cache together.
constexpr int64_t kQueries = 64;

// Queries of one sequence that a thread takes at once, for one head.
struct Task {
  int64_t first_query, queries, first_key, keys;
  int64_t place;  // of the first query in its sequence
};

std::vector<Task> tasks_of(const PackedLens& lens) {
  std::vector<Task> tasks;
  int64_t first_query = 0, first_key = 0;
  for (size_t i = 0; i < lens.queries.size(); ++i) {
    for (int64_t done = 0; done < lens.queries[i]; done += kQueries)
      tasks.push_back({first_query + done, std::min(kQueries, lens.queries[i] - done), first_key,
                       lens.keys[i], done});
    first_query += lens.queries[i];
    first_key += lens.keys[i];
  }
  return tasks;
}

int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// [heads, 2 * longest - 1]: of each head the biases of keys from `longest` - 1 places before their
// query to as many behind it, so that those of a query and all its keys lie one behind the other.
const float* spread(const DistanceBias& bias, int64_t heads, int64_t longest) {
  const int64_t size = 2 * longest - 1;
  float* out = Scratch::of_this_thread().room(Scratch::kBias, heads * size);
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < size; ++i) out[head * size + i] = *bias.at(head, i - (longest - 1));
  return out;
}

}  // namespace

void packed_attention(int threads, const PackedRows& query, const PackedRows& key,
                      const PackedRows& value, DType dtype, const PackedLens& lens, int64_t heads,
                      int64_t head_dim, float scale, const DistanceBias& bias, void* out) {
  const Kernels& k = kernels();
  const std::vector<Task> tasks = tasks_of(lens);
  if (tasks.empty()) return;
  int64_t longest = 0;
  for (const Task& task : tasks) longest = std::max(longest, task.keys);
  const int64_t query_room = padded(kQueries * head_dim), key_room = padded(longest * head_dim);
  const int64_t room = 2 * query_room + 2 * key_room + padded(kQueries * longest);
  const int64_t ranks = std::clamp(threads, 1, kMaxThreads);
  float* all = Scratch::of_this_thread().room(Scratch::kPacked, ranks * room);
  const float* biases = bias.table ? spread(bias, heads, longest) : nullptr;
  const auto gather = [&](const PackedRows& rows, int64_t first, int64_t count, int64_t head,
                          float* to) {
    const auto* from = static_cast<const char*>(rows.data) +
                       (first * rows.stride + head * head_dim) * size_of(dtype);
    for (int64_t i = 0; i < count; ++i)
      k.to_float(from + i * rows.stride * size_of(dtype), dtype, to + i * head_dim, head_dim);
  };
  parallel_for(threads, static_cast<int64_t>(tasks.size()) * heads, [&](int64_t chunk, int rank) {
    const Task& task = tasks[chunk / heads];
    const int64_t head = chunk % heads;
    float* queries = all + rank * room;
    float* mixed = queries + query_room;
    float* keys = mixed + query_room;
    float* values = keys + key_room;
    float* scores = values + key_room;
    gather(query, task.first_query, task.queries, head, queries);
    gather(key, task.first_key, task.keys, head, keys);
    gather(value, task.first_key, task.keys, head, values);
    for (int64_t i = 0; i < task.queries * head_dim; ++i) queries[i] *= scale;
    const Matrix matrix = {keys, DType::kFloat32, task.keys, head_dim};
    k.product(queries, task.queries, matrix, 0, task.keys, nullptr, scores, task.keys);
    for (int64_t i = 0; i < task.queries; ++i) {
      if (biases)
        k.add(biases + head * (2 * longest - 1) + longest - 1 - (task.place + i),
              scores + i * task.keys, task.keys);
      k.softmax(scores + i * task.keys, task.keys);
    }
    k.mix(scores, task.queries, task.keys, values, head_dim, mixed, head_dim);
    auto* to = static_cast<char*>(out) +
               (task.first_query * heads + head) * head_dim * size_of(dtype);
    for (int64_t i = 0; i < task.queries; ++i)
      k.from_float(mixed + i * head_dim, to + i * heads * head_dim * size_of(dtype), dtype,
                   head_dim);
  });
}

}  // namespace multiexit::cpu
