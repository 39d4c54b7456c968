// The kernels, one table for each instruction set. All sum in float32; `dtype` is only how
// weights and caches are stored. A result never depends on what is computed beside it.
#pragma once
#include <cstdint>

#include "types.h"

namespace multiexit::cpu {

// One query head group over one sequence's cached keys [first, stop).
struct AttentionSpan {
  const void* keys;
  const void* values;
  DType dtype;
  const int32_t* table;
  int64_t block_size, kv_heads, head_dim, kv_head;
  int64_t first, stop;
  float scale;
};

struct RowStatistics {
  float max;
  float sum;  // of exp(x - max)
  int64_t argmax;
};

struct NoisyBest {
  float value;
  int64_t token;
};

struct Kernels {
  const char* name;

  // What product reads of x beside weights of that type: float32, or the weights' own type where
  // the CPU multiplies it.
  DType (*input_dtype)(DType weight);

  // out[t * out_stride + r] = x[t] . weight[first + r] + bias[first + r] for r < count, summed in
  // float32; the sum over columns has one fixed order for any number of tokens and rows.
  void (*product)(const void* x, int64_t tokens, const Matrix& weight, int64_t first,
                  int64_t count, const float* bias, float* out, int64_t out_stride);

  void (*to_float)(const void* x, DType dtype, float* out, int64_t count);
  void (*from_float)(const float* x, void* out, DType dtype, int64_t count);
  void (*add)(const float* x, float* sum, int64_t count);

  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, float* out,
                     int64_t size);
  void (*rms_norm)(const float* x, const float* weight, float eps, float* out, int64_t size);

  // x[i] = activation(x[i]), times up[i] where up is given.
  void (*activate)(float* x, const float* up, Activation kind, int64_t count);

  // Turns one head of size 2 * half in place.
  void (*rotate)(float* head, const float* cos, const float* sin, int64_t half);

  // query, out: [group, head_dim]; scores: room for stop - first numbers.
  void (*attend)(const float* query, int64_t group, const AttentionSpan& span, float* scores,
                 float* out);

  // Of count > 0 numbers; NaN among them makes the sum NaN; of equals the first is the argmax.
  RowStatistics (*statistics)(const float* x, int64_t count);

  // Of scores / heat + Gumbel noise of the tokens first, first + 1, ...; of equals the first, but
  // NaN before all.
  NoisyBest (*noisy_best)(const float* scores, int64_t first, int64_t count, float heat,
                          uint64_t seed, uint32_t position);

  // The sum of numbers: what reading memory costs at least.
  float (*sum)(const float* x, int64_t count);
};

const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512bf16_kernels();
#endif

// Those of the best instruction set of this machine, or of the one that MULTIEXIT_CPU_ISA names.
const Kernels& kernels();

// Chooses by name from now on; false when the machine cannot run it or the name is unknown.
bool choose_isa(const char* name);

}  // namespace multiexit::cpu
