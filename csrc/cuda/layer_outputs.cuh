// What becomes of a matrix's results: the sums of its parts, bias, and then the cache, the
// activation or the stream.
#pragma once
#include "cuda/layer_task.cuh"

namespace multiexit::cuda {

// multiexit_engine/_cuda/layers.py has the names.
enum Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu };

__device__ __forceinline__ float activated(float x, int activation) {
  const auto sigmoid = [](float y) { return 1.0f / (1.0f + expf(-y)); };
  switch (activation) {
    case kGelu: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    // 1 + tanh(u) is 2 sigmoid(2 u)
    case kGeluTanh: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case kQuickGelu: return x * sigmoid(1.702f * x);
    case kRelu: return x < 0.0f ? 0.0f : x;  // NaN stays NaN
    default: return x * sigmoid(x);
  }
}

// Two results of a row of states: those of a group's members j and j + 2.
struct ResultPair {
  int row, first, second;  // of the states; of the matrix
  float a, b;
  float stream_a, stream_b;  // added last
};

// A block's results of a matrix, two for each thread and turn. Made before the sums are there, it
// has what is added to the thread's first pair on its way.
template <class Number>
class Results {
 public:
  // `stream`: [rows, width], added to the results, or null.
  __device__ __forceinline__ Results(const LayersTask& task, const LayersShared& shared,
                                     const MultiexitLayer& layer, int name, const float* stream)
      : task_(task),
        matrix_(task.matrices[name]),
        share_(shared.shares[name]),
        bias_(reinterpret_cast<const void*>(layer.matrices[name].bias)),
        stream_(stream),
        ahead_(static_cast<int>(threadIdx.x) < count() ? begun(threadIdx.x) : ResultPair{}) {}

  template <class Store>
  __device__ __forceinline__ void finish(const float* room, int kernel_rows, Store&& store) const {
    for (int index = threadIdx.x; index < count(); index += kThreads) {
      ResultPair pair = index < kThreads ? ahead_ : begun(index);
      const int members = index / task_.rows, unit = members / 2 * matrix_.splits;
      float a = 0.0f, b = 0.0f;
      for (int split = 0; split < matrix_.splits; ++split) {
        const float* sums = room + ((unit + split) * kGroup + members % 2) * kernel_rows + pair.row;
        a += sums[0];
        b += sums[2 * kernel_rows];
      }
      pair.a = (a + pair.a) + pair.stream_a;
      pair.b = (b + pair.b) + pair.stream_b;
      store(pair);
    }
  }

 private:
  __device__ __forceinline__ int count() const { return share_.groups * 2 * task_.rows; }

  // A pair with all but its sums.
  __device__ __forceinline__ ResultPair begun(int index) const {
    const int members = index / task_.rows, group = share_.first + members / 2;
    ResultPair pair = {};
    pair.row = index % task_.rows;
    pair.first = matrix_.row(group, members % 2);
    pair.second = matrix_.row(group, members % 2 + 2);
    if (bias_) {
      pair.a = number_at<Number>(bias_, pair.first);
      pair.b = number_at<Number>(bias_, pair.second);
    }
    if (stream_) {
      const float* own = stream_ + static_cast<int64_t>(pair.row) * task_.width;
      pair.stream_a = read_written(own + pair.first);
      pair.stream_b = read_written(own + pair.second);
    }
    return pair;
  }

  const LayersTask& task_;
  const Matrix& matrix_;
  const GroupShare share_;
  const void* bias_;
  const float* stream_;
  const ResultPair ahead_;
};

__device__ __forceinline__ void store_in_stream(const LayersTask& task, const ResultPair& pair) {
  float* own = task.output + static_cast<int64_t>(pair.row) * task.width;
  own[pair.first] = pair.a;
  own[pair.second] = pair.b;
}

template <class Number>
__device__ __forceinline__ void store_inner(const LayersTask& task, const ResultPair& pair) {
  const int width = task.matrices[kDown].row_bytes / 2;
  const int64_t row = static_cast<int64_t>(pair.row) * width;
  const float a = activated(pair.a, task.activation);
  if (task.is_gated) {
    put_number<Number>(task.inner, row + pair.first, a * pair.b);
    return;
  }
  put_number<Number>(task.inner, row + pair.first, a);
  put_number<Number>(task.inner, row + pair.second, activated(pair.b, task.activation));
}

// Queries row by row; keys and values in the slots of their rows. Both of a turned pair are in one
// head.
template <class Number>
__device__ __forceinline__ void store_qkv(const LayersTask& task, const LayersShared& shared,
                                          const MultiexitLayer& layer, ResultPair pair) {
  const int queries = task.query_width(), keys = task.kv_width();
  if (task.cos && pair.first < queries + keys) {
    const int half = task.head_dim / 2;
    const int64_t angle = shared.positions[pair.row] * half + pair.first % task.head_dim;
    const float cos = number_at<Number>(task.cos, angle), sin = number_at<Number>(task.sin, angle);
    const float a = pair.a, b = pair.b;
    pair.a = fmaf(a, cos, -b * sin);
    pair.b = fmaf(b, cos, a * sin);
  }
  const auto store = [&](int entry, float value) {
    if (entry < queries) {
      put_number<Number>(task.query, static_cast<int64_t>(pair.row) * queries + entry, value);
      return;
    }
    const bool is_key = entry < queries + keys;
    void* cache = reinterpret_cast<void*>(is_key ? layer.key_cache : layer.value_cache);
    const int column = entry - queries - (is_key ? 0 : keys);
    put_number<Number>(cache, shared.slots[pair.row] * keys + column, value);
  };
  store(pair.first, pair.a);
  store(pair.second, pair.b);
}

}  // namespace multiexit::cuda
