// The kernels, one table for each instruction set. All sum in float32; `dtype` is only how
// weights and caches are stored. A result never depends on what is computed beside it.
#pragma once
#include <cstdint>

#include "types.h"

namespace multiexit::cpu {

// Keys of a sequence are taken in splits that begin at its multiples of this many. Part of the
// result: scores are made to weights split by split, and splits united in their order.
constexpr int64_t kAttentionSplit = 128;

// Some consecutive tokens of one sequence and some of its key-value heads. A row of the tile is
// one query head of one token: rows stand in the order heads, tokens, group.
struct AttentionTile {
  const void* keys;
  const void* values;
  DType dtype;
  const int32_t* table;
  int64_t block_size, kv_heads, head_dim;
  int64_t first_head, heads;  // key-value heads
  int64_t group;              // query heads of each
  const float* query;         // of the first token: all its query heads
  int64_t query_stride;       // from token to token
  int64_t tokens;
  int64_t stop;    // keys up to the first token's own; the next one sees one more
  int64_t window;  // keys that a token sees, its own included; 0 for all
  float scale;
  DistanceBias bias;
};

// Numbers of a row's part of a result: head_dim sums, the greatest score, the weights' sum (0
// where it saw no key).
inline constexpr int64_t attention_part_size(int64_t head_dim) {
  return (head_dim + 15) / 16 * 16 + 16;
}

// Numbers of room that `attend` needs for so many rows.
inline constexpr int64_t attention_room(int64_t rows, int64_t head_dim) {
  return (head_dim + 15) / 16 * 16 * 16 + rows * kAttentionSplit;
}

struct RowStatistics {
  float max;
  float sum;  // of exp(x - max)
  int64_t argmax;
};

struct Distribution {
  float max, second;
  float sum;    // of exp(x - max)
  float drops;  // of exp(x - max) * (x - max)
  int64_t argmax;
};

// Where +inf counts as a number.
constexpr float kMostLogit = 3.40282347e38f;

// The log-probability of a logit x is x - max - log_sum.
struct LogSoftmax {
  float max, log_sum;
};

// Of e^y: the sum, and that of its product with y; of its square the same, and that with y * y.
struct ExpSums {
  float sum, drops, squares, square_drops, squared_drops;
};

// Of a row's codes: the scale of each term, and the distance from the row, l2. NaN where a number is
// none, or not finite.
struct CodedRow {
  float scale, second_scale;
  double norm, error;
};

// Rough logits of the tokens first, first + 1, ..., each within `reach` times its own of `errors`.
struct RoughLogits {
  float* logits;
  const float* second;  // what is to be added to them, or null
  const float* bias;    // and this, or null
  const float* errors;
  float reach;
  int64_t first, count;
};

// Consecutive tokens that have an upper end together.
constexpr int64_t kRoughBlock = 64;

// The greatest numbers that some logits are at least, and can be at most.
struct Ends {
  float lower, upper;
};

// A token, and what its logit or its noisy score can be at most.
struct Near {
  float most;
  int32_t token;
};

// How a row is sampled.
struct Noise {
  float heat;
  uint64_t seed;
  uint32_t position;
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

  // out[i] = x . weight[listed[i]] + bias[listed[i]], with the bits that product gives.
  void (*gathered_product)(const void* x, const Matrix& weight, const int32_t* listed,
                           int64_t count, const float* bias, float* out);

  // As product, of codes; first is a multiple of 16. Sums of codes are exact.
  void (*coded_product)(const CodedRows& x, int64_t tokens, const CodedMatrix& weight,
                        int64_t first, int64_t count, const float* bias, float* out,
                        int64_t out_stride);

  // The nearest codes of a row, plus 128, and of what they lack unless `second` is null; columns
  // behind `size` get the code of 0.
  CodedRow (*code_row)(const float* x, int64_t size, int64_t padded, uint8_t* codes,
                       uint8_t* second);

  // Adds the terms up in `logits`.
  Ends (*sum_terms)(const RoughLogits& x);

  // Adds the terms up in `out`; writes for each block of tokens the most that a logit can be.
  void (*sum_blocks)(const RoughLogits& x, float* out, float* uppers);

  // Writes the tokens whose logits can be `border`; returns how many. Their terms are summed.
  int64_t (*find_near)(const RoughLogits& x, float border, Near* out);

  // The same of logit / heat + noise, where the border lies `margin` below `best`, the greatest
  // lower end, which grows meanwhile.
  int64_t (*find_noisy_near)(const RoughLogits& x, const Noise& noise, float margin, float* best,
                             Near* out);

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

  // A tile over one split; parts: [rows, attention_part_size].
  void (*attend)(const AttentionTile& tile, int64_t split, float* room, float* parts);

  // Adds a row's part of the next split to its parts of those before.
  void (*unite)(float* all, const float* part, int64_t head_dim);

  // The row's result of all its parts together.
  void (*normalise_part)(const float* part, float* out, int64_t head_dim);

  // Of count > 0 numbers; NaN among them makes the sum NaN; of equals the first is the argmax.
  RowStatistics (*statistics)(const float* x, int64_t count);

  // Of count > 0 numbers, with -inf as the second of one; NaN or +inf among them makes the sums NaN;
  // of equals the first is the argmax.
  Distribution (*distribution)(const float* x, int64_t count);

  // With y = x + shift, but no less than -100, of which e^y is 0.
  ExpSums (*exp_sums)(const float* x, float shift, int64_t count);

  // Over count tokens of two distributions p and q with mean m, given by their logits, of which +inf
  // counts as kMostLogit: the sum of p log(p/m) + q log(q/m), or, as published code has it, of
  // m log(m/p) + m log(m/q). What has no weight adds nothing.
  float (*divergence)(const float* x, const LogSoftmax& of_x, const float* y,
                      const LogSoftmax& of_y, bool is_published, int64_t count);

  // Of scores / heat + Gumbel noise of the tokens first, first + 1, ...; of equals the first, but
  // NaN before all.
  NoisyBest (*noisy_best)(const float* scores, int64_t first, int64_t count, float heat,
                          uint64_t seed, uint32_t position);

  // The sum of numbers: what reading memory costs at least.
  float (*sum)(const float* x, int64_t count);

  // Scores in place to weights of sum 1; count > 0.
  void (*softmax)(float* x, int64_t count);

  // out[r * out_stride + c] = sum over i < count of weights[r * count + i] * values[i * size + c].
  void (*mix)(const float* weights, int64_t rows, int64_t count, const float* values, int64_t size,
              float* out, int64_t out_stride);
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
