// The C interface of the persistent decode kernel; see head_call.h. It speaks of decoder layers,
// since a block is a group of threads here. multiexit_engine/_cuda/layers.py repeats it.
#pragma once
#include "cuda/head_call.h"

extern "C" {

// A matrix and the bias of its rows, or 0.
struct MultiexitMatrix {
  uint64_t weight, bias;
};

// A norm of rows: RMSNorm has no shift.
struct MultiexitNorm {
  uint64_t gain, shift;
};

// A pre-norm layer; lies on the device. Matrices are [out_features, in_features]: queries, keys
// and values in one; the attention's last; the first of the feed-forward layer, gate and up in
// one; its last.
struct MultiexitLayer {
  MultiexitMatrix matrices[4];
  MultiexitNorm norms[2];             // in front of attention, of the feed-forward layer
  uint64_t key_cache, value_cache;    // [blocks, block_size, kv_heads, head_dim]
  int64_t window;                     // 0: none
  float scale, epsilons[2], unused;
};

// What is asked for. Addresses are on the device; weights, caches, queries are of `number_type`: 1
// bfloat16, 2 float16. Each row is the newest token of a sequence of its own.
struct MultiexitLayersCall {
  uint64_t layers;        // [num_layers] MultiexitLayer
  uint64_t hidden;        // [rows, width] float32
  uint64_t output;        // [rows, width] float32, written
  uint64_t slots;         // [rows] int64, where keys and values go
  uint64_t positions;     // [rows] int64, read with `cos`
  uint64_t contexts;      // [rows] int32, keys of each row, its own among them
  uint64_t block_tables;  // [rows, table_stride] int32
  uint64_t cos, sin;      // [positions, head_dim / 2], or 0: nothing is turned
  uint64_t kept;          // multiexit_layers_kept_bytes(), zero before the first call; left zero
  uint64_t scratch;       // plan.scratch_bytes
  uint64_t then;          // what is read behind the layers, or 0
  int64_t then_bytes;     // of it to be asked for while they run
  int64_t rows, width, heads, kv_heads, head_dim, inner, num_layers, block_size, table_stride;
  int64_t number_type;
  int64_t activation;     // see Activation in layer_outputs.cuh
  int64_t is_gated, has_shift;
};

// How the current device runs calls of one shape.
struct MultiexitLayersPlan {
  int64_t blocks;
  int64_t slot_bytes;
  int64_t shared_bytes;
  int64_t scratch_bytes;
};

MULTIEXIT_EXPORT int multiexit_layers_kept_bytes();

// 0, or a number that multiexit_cuda_error explains. A plan looks at the shape only.
MULTIEXIT_EXPORT int multiexit_layers_plan(const MultiexitLayersCall* call,
                                           MultiexitLayersPlan* plan);
MULTIEXIT_EXPORT int multiexit_layers_run(const MultiexitLayersCall* call,
                                          const MultiexitLayersPlan* plan, uint64_t stream);

}
