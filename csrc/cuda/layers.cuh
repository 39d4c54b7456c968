// All decoder layers of a span in one launch, for the newest tokens of a few sequences.
//
// The grid goes through five phases a layer, with a barrier behind each: queries, keys and values;
// attention; its output; the first half of the feed-forward layer; its second half. Weights depend
// on nothing, so the rings fill on while the grid waits. Every sum has one order, set by the
// matrix or the sequence alone.
#pragma once
#include "cuda/layer_attention.cuh"
#include "cuda/layer_outputs.cuh"
#include "cuda/layer_states.cuh"
#include "cuda/layer_stream.cuh"

namespace multiexit::cuda {

// What all threads need of the call, where they reach it quickly.
__device__ __forceinline__ void begin_block(const LayersTask& task, LayersShared& shared,
                                            MultiexitLayer* layers) {
  const auto* source = reinterpret_cast<const uint64_t*>(task.layers);
  auto* target = reinterpret_cast<uint64_t*>(layers);
  const int words = task.num_layers * static_cast<int>(sizeof(MultiexitLayer) / 8);
  for (int word = threadIdx.x; word < words; word += kThreads) target[word] = source[word];
  if (threadIdx.x < kMatrices)
    shared.shares[threadIdx.x] = GroupShare::of_this_block(task.matrices[threadIdx.x]);
  __syncthreads();
}

__device__ __forceinline__ void read_rows(const LayersTask& task, LayersShared& shared) {
  const int row = threadIdx.x;
  if (row < task.rows) {
    shared.slots[row] = task.slots[row];
    shared.positions[row] = task.cos ? task.positions[row] : 0;
    shared.contexts[row] = task.contexts[row];
  }
  __syncthreads();
}

// This block's share of what is read behind the layers, while their last one runs.
__device__ __forceinline__ void ask_for_share(const LayersTask& task) {
  if (threadIdx.x != 0) return;
  const int64_t blocks = gridDim.x;
  const int64_t share = (task.then_bytes + blocks * 128 - 1) / (blocks * 128) * 128;
  const int64_t start = share * blockIdx.x, bytes = min(share, task.then_bytes - start) / 16 * 16;
  if (bytes > 0) ask_for_bytes(task.then + start, static_cast<int>(bytes));
}

template <class Number, int ROWS>
__global__ void __launch_bounds__(kThreads, 1) decoder_layers_kernel(const LayersTask task) {
  char* memory = dynamic_shared();
  LayersShared& shared = *reinterpret_cast<LayersShared*>(memory);
  auto* layers = reinterpret_cast<MultiexitLayer*>(memory + kLayersSharedBytes);
  char* states = memory + task.memory.states;
  auto* room = reinterpret_cast<float*>(memory + task.memory.room);
  begin_block(task, shared, layers);
  WeightStream weights(task, shared, layers, memory + task.memory.rings);
  wait_for_previous_kernel();
  read_rows(task, shared);

  GridBarrier barrier(task.counters);
  const float* stream = task.hidden;
  for (int index = 0; index < task.num_layers; ++index) {
    const MultiexitLayer& layer = layers[index];
    {
      NormedRows<Number, ROWS> normed(task, layer.norms[0], states);
      const Results<Number> results(task, shared, layer, kQkv, nullptr);
      if (index) barrier.wait();
      normed.load(stream, layer.epsilons[0], shared);
      weights.multiply_matrix<Number, ROWS>(index, kQkv, states, room);
      __syncthreads();
      results.finish(room, ROWS, [&](const ResultPair& pair) {
        store_qkv<Number>(task, shared, layer, pair);
      });
    }
    barrier.arrive();
    ask_for_keys(task, shared, layer);
    if (index == task.num_layers - 1) ask_for_share(task);
    barrier.wait();
    attend<Number>(task, shared, layer, room);
    barrier.arrive();
    {
      const Results<Number> results(task, shared, layer, kAttended, stream);
      barrier.wait();
      load_attended<Number, ROWS>(task, shared, layer.window, states);
      weights.multiply_matrix<Number, ROWS>(index, kAttended, states, room);
      __syncthreads();
      results.finish(room, ROWS, [&](const ResultPair& pair) { store_in_stream(task, pair); });
    }
    stream = task.output;
    barrier.arrive();
    {
      NormedRows<Number, ROWS> normed(task, layer.norms[1], states);
      const Results<Number> results(task, shared, layer, kUp, nullptr);
      barrier.wait();
      normed.load(stream, layer.epsilons[1], shared);
      weights.multiply_matrix<Number, ROWS>(index, kUp, states, room);
      __syncthreads();
      results.finish(room, ROWS, [&](const ResultPair& pair) { store_inner<Number>(task, pair); });
    }
    barrier.arrive();
    {
      const Results<Number> results(task, shared, layer, kDown, stream);
      barrier.wait();
      if (index == task.num_layers - 1) let_next_kernel_start();
      load_rows<ROWS>(task, task.inner, task.matrices[kDown].row_bytes, states);
      weights.multiply_matrix<Number, ROWS>(index, kDown, states, room);
      __syncthreads();
      results.finish(room, ROWS, [&](const ResultPair& pair) { store_in_stream(task, pair); });
    }
    if (index < task.num_layers - 1) barrier.arrive();
  }
  barrier.finish();
}

}  // namespace multiexit::cuda
