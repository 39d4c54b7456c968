// The only file that knows Python. Addresses come in as integers; shapes are checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/attention.h"
#include "cpu/block.h"
#include "cpu/coded_tokens.h"
#include "cpu/dense.h"
#include "cpu/dola.h"
#include "cpu/gate_odds.h"
#include "cpu/head_statistics.h"
#include "cpu/heads.h"
#include "cpu/packed_attention.h"
#include "cpu/packed_block.h"
#include "cpu/rough_sums.h"
#include "cpu/table_rows.h"

namespace py = pybind11;
using namespace multiexit::cpu;

namespace {

using Address = uintptr_t;
using Release = py::gil_scoped_release;

template <class T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The product, with `then` run on each finished part of it in float32; see `multiply`.
template <class Then>
void product(int threads, Address x, int64_t tokens, const Matrix& weight, Address bias,
             Address out, int dtype, Then&& then) {
  const DType kind = static_cast<DType>(dtype);
  const float* input = as_float(at<void>(x), kind, tokens * weight.columns, Scratch::kInput);
  const bool is_float = kind == DType::kFloat32;
  const int64_t size = tokens * weight.rows;
  float* result =
      is_float ? at(out) : Scratch::of_this_thread().room(Scratch::kWide, size);
  multiply(threads, input, tokens, {weight, at(bias)}, result,
           [&](int64_t token, int64_t many, int64_t first, int64_t count) {
             for (int64_t t = token; t < token + many; ++t)
               then(result + t * weight.rows + first, count);
           });
  if (!is_float) kernels().from_float(result, at<void>(out), kind, size);
}

void linear(int threads, Address x, int64_t tokens, const Matrix& weight, Address bias, Address out,
            int dtype) {
  Release nogil;
  product(threads, x, tokens, weight, bias, out, dtype, [](float*, int64_t) {});
}

void linear_activation(int threads, Address x, int64_t tokens, const Matrix& weight, Address bias,
                       int activation, Address out, int dtype) {
  Release nogil;
  product(threads, x, tokens, weight, bias, out, dtype, [&](float* numbers, int64_t count) {
    kernels().activate(numbers, nullptr, static_cast<Activation>(activation), count);
  });
}

void foretell(int threads, Address normed, int64_t rows, const Linear& up, const Linear& down,
              Address thresholds, Address by_entropy, Address out) {
  Release nogil;
  gate_odds(threads, at(normed), rows, up, down, {at(thresholds), at<bool>(by_entropy)}, at(out));
}

void norm(int threads, Address x, const Norm& norm, Address out, int64_t rows, int64_t size,
          int dtype) {
  Release nogil;
  const DType kind = static_cast<DType>(dtype);
  if (kind == DType::kFloat32) return normalise(threads, at(x), norm, at(out), rows, size);
  const float* input = as_float(at<void>(x), kind, rows * size, Scratch::kInput);
  float* result = Scratch::of_this_thread().room(Scratch::kNormed, rows * size);
  normalise(threads, input, norm, result, rows, size);
  kernels().from_float(result, at<void>(out), kind, rows * size);
}

void attention(int threads, Address query, int64_t heads, const Cache& cache, const Layout& layout,
               float scale, int64_t window, const DistanceBias& bias, Address out) {
  Release nogil;
  const int64_t width = heads * cache.head_dim, size = layout.tokens * width;
  const float* input = as_float(at<void>(query), cache.dtype, size, Scratch::kInput);
  const bool is_float = cache.dtype == DType::kFloat32;
  float* result = is_float ? at(out) : Scratch::of_this_thread().room(Scratch::kMixed, size);
  paged_attention(threads, input, width, heads, cache, layout, scale, window, bias, result);
  if (!is_float) kernels().from_float(result, at<void>(out), cache.dtype, size);
}

void attend_packed(int threads, Address query, int64_t query_stride, Address key,
                   int64_t key_stride, Address value, int64_t value_stride, int dtype,
                   std::vector<int64_t> query_lens, std::vector<int64_t> key_lens, int64_t heads,
                   int64_t head_dim, float scale, const DistanceBias& bias, Address out) {
  Release nogil;
  packed_attention(threads, {at<void>(query), query_stride}, {at<void>(key), key_stride},
                   {at<void>(value), value_stride}, static_cast<DType>(dtype),
                   {std::move(query_lens), std::move(key_lens)}, heads, head_dim, scale, bias,
                   at<void>(out));
}

void decoder_blocks(int threads, const Span& span, const Rows& rows, Address hidden, Address out,
                    int dtype) {
  Release nogil;
  run_blocks(threads, span, rows, at<void>(hidden), at<void>(out), static_cast<DType>(dtype));
}

void packed_blocks(int threads, const std::vector<Block>& blocks, const PackedTexts& texts,
                   const std::optional<PackedSources>& sources, bool is_attended, Address hidden,
                   int dtype, Address out) {
  Release nogil;
  run_packed_blocks(threads, blocks, texts, sources ? &*sources : nullptr, is_attended,
                    {at<void>(hidden), static_cast<DType>(dtype)}, at(out));
}

void take(int threads, const TableRows& from, int64_t count, Address out) {
  Release nogil;
  take_rows(threads, from, count, at<void>(out));
}

void embed_tokens(int threads, const TableRows& tokens, const TableRows& places, float scale,
                  int64_t count, Address out) {
  Release nogil;
  embed(threads, tokens, places, scale, count, at(out));
}

void project(int threads, Address hidden, int dtype, int64_t rows, const Matrix& weight,
             Address bias, Address out) {
  Release nogil;
  const float* input = as_float(at<void>(hidden), static_cast<DType>(dtype),
                                rows * weight.columns, Scratch::kInput);
  head_logits(threads, input, rows, {weight, at(bias)}, at(out));
}

void choose(int threads, Address hidden, int dtype, int64_t rows, const Matrix& weight,
            Address bias, const Choice& choice) {
  Release nogil;
  const float* input = as_float(at<void>(hidden), static_cast<DType>(dtype),
                                rows * weight.columns, Scratch::kInput);
  head_tokens(threads, input, rows, {weight, at(bias)}, choice);
}

void measure_head(int threads, Address hidden, int dtype, int64_t rows, const Matrix& weight,
                  Address bias, Address tokens, Address log_probs, Address second_log_probs,
                  Address log_sum_exp, Address entropy) {
  Release nogil;
  const float* input = as_float(at<void>(hidden), static_cast<DType>(dtype),
                                rows * weight.columns, Scratch::kInput);
  head_statistics(threads, input, rows, {weight, at(bias)},
                  {at<int64_t>(tokens), at(log_probs), at(second_log_probs), at(log_sum_exp),
                   at(entropy)});
}

void code_states(int threads, Address x, Address factors, int64_t rows, int64_t columns,
                 int64_t terms, Address codes, Address scales, Address norms, Address errors) {
  Release nogil;
  code_rows(threads, at(x), at(factors), rows, columns,
            {terms, at<uint8_t>(codes), at(scales), at<double>(norms), at<double>(errors)});
}

void choose_by_codes(int threads, const RoughRows& rows, const RoughHead& rough,
                     const Linear& head, const std::vector<LowerHead>& lowers,
                     const Choice& choice) {
  Release nogil;
  coded_head_tokens(threads, rows, rough, head, lowers, choice);
}

void sum_by_codes(int threads, const RoughRows& rows, const RoughHead& rough, const Linear& head,
                  Address mean, Address tokens, Address numbers) {
  Release nogil;
  rough_head_sums(threads, rows, rough, head, at(mean),
                  {at<int64_t>(tokens), at<double>(numbers)});
}

HeadPair pair_of(int dtype, Address upper_hidden, const Matrix& upper, Address lower_hidden,
                 const Matrix& lower, Address alpha, int64_t rows, Address least = 0) {
  const DType kind = static_cast<DType>(dtype);
  return {as_float(at<void>(upper_hidden), kind, rows * upper.columns, Scratch::kInput),
          upper,
          {0, rows,
           as_float(at<void>(lower_hidden), kind, rows * lower.columns, Scratch::kLowerInput),
           {lower, nullptr}, at(alpha), at<int64_t>(least)}};
}

void contrast(int threads, int dtype, Address upper_hidden, const Matrix& upper,
              Address lower_hidden, const Matrix& lower, Address alpha, Address least, int64_t rows,
              Address out, Address num_candidates) {
  Release nogil;
  contrast_heads(threads, pair_of(dtype, upper_hidden, upper, lower_hidden, lower, alpha, rows, least),
                 rows, at(out), at<int32_t>(num_candidates));
}

void choose_contrast(int threads, int dtype, Address upper_hidden, const Matrix& upper,
                     Address lower_hidden, const Matrix& lower, Address alpha, int64_t rows,
                     const Choice& choice) {
  Release nogil;
  contrast_tokens(threads,
                  pair_of(dtype, upper_hidden, upper, lower_hidden, lower, alpha, rows),
                  rows, choice);
}

void choose_shared(int threads, Address hidden, int64_t rows, const Linear& head,
                   const std::vector<LowerHead>& lowers, const Choice& choice) {
  Release nogil;
  shared_head_tokens(threads, at(hidden), rows, head, lowers, choice);
}

void sample(int threads, Address scores, int64_t rows, int64_t vocab, Address seeds,
            Address positions, Address tokens) {
  Release nogil;
  sample_tokens(threads, at(scores), rows, vocab, at<int64_t>(seeds), at<int64_t>(positions),
                at<int64_t>(tokens));
}

LayerLogits layers_of(Address mature, Address premature, int64_t candidates, int64_t rows,
                      int64_t vocab) {
  return {at(mature), at(premature), candidates, rows, vocab};
}

void compare_layers(int threads, const LayerLogits& logits, bool is_published, Address out) {
  Release nogil;
  js_divergences(threads, logits, is_published, at(out));
}

void choose_dola(int threads, const LayerLogits& logits, Address relative_top, bool is_published,
                 const Choice& choice, Address places) {
  Release nogil;
  dola_tokens(threads, logits, at(relative_top), is_published, choice, at<int64_t>(places));
}

// Reads the numbers once with all threads, for benchmarks.
float plain_read(int threads, Address numbers, int64_t count) {
  Release nogil;
  constexpr int64_t kChunk = 1 << 16;
  float* sums = Scratch::of_this_thread().room(Scratch::kInput, count / kChunk + 1);
  in_chunks(threads, count, kChunk, [&](int64_t first, int64_t many, int) {
    sums[first / kChunk] = kernels().sum(at(numbers) + first, many);
  });
  return kernels().sum(sums, (count + kChunk - 1) / kChunk);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<Matrix>(m, "Matrix")
      .def(py::init([](Address data, int dtype, int64_t rows, int64_t columns) {
        return Matrix{at<void>(data), static_cast<DType>(dtype), rows, columns};
      }))
      .def(py::init([](Address codes, int64_t rows, int64_t columns, int bits, Address scales,
                       int64_t group_size, bool is_float) {
        return Matrix{at<void>(codes), DType::kFloat32, rows, columns, bits, at<BFloat16>(scales),
                      group_size, is_float};
      }));
  py::class_<Linear>(m, "Linear").def(py::init([](const Matrix& weight, Address bias) {
    return Linear{weight, at(bias)};
  }));
  py::class_<Norm>(m, "Norm").def(py::init([](Address weight, Address bias, float eps) {
    return Norm{at(weight), at(bias), eps};
  }));
  py::class_<DistanceBias>(m, "DistanceBias")
      .def(py::init<>())
      .def(py::init([](Address table, int64_t before, int64_t after) {
        return DistanceBias{at(table), before, after};
      }));
  py::class_<Cache>(m, "Cache")
      .def(py::init([](Address keys, Address values, int dtype, int64_t block_size,
                       int64_t kv_heads, int64_t head_dim) {
        return Cache{at<void>(keys), at<void>(values), static_cast<DType>(dtype), block_size,
                     kv_heads, head_dim};
      }));
  py::class_<Layout>(m, "Layout")
      .def(py::init([](int64_t tokens, int64_t sequences, Address starts, Address contexts,
                       Address tables, int64_t table_stride, int64_t longest_context) {
        return Layout{tokens, sequences, at<int32_t>(starts), at<int32_t>(contexts),
                      at<int32_t>(tables), table_stride, longest_context};
      }));
  py::class_<CopiedRows>(m, "CopiedRows")
      .def(py::init([](int64_t count, Address states, Address positions, Address slots) {
        return CopiedRows{count, at(states), at<int64_t>(positions), at<int64_t>(slots)};
      }));
  py::class_<Rows>(m, "Rows").def(
      py::init([](const Layout& layout, Address positions, Address slots,
                  std::optional<Layout> sources, std::optional<CopiedRows> copied) {
        return Rows{layout, at<int64_t>(positions), at<int64_t>(slots), std::move(sources),
                    copied};
      }));
  py::class_<CrossAttention>(m, "CrossAttention")
      .def(py::init([](const Norm& norm, const Linear& query, const Linear& output, float scale) {
        return CrossAttention{norm, query, output, scale};
      }));
  py::class_<Block>(m, "Block")
      .def(py::init([](bool is_post_norm, const Norm& attention_norm, const Linear& qkv, const Norm& query_norm,
                       const Norm& key_norm, Address cos, Address sin, int64_t heads,
                       int64_t kv_heads, int64_t head_dim, float scale, int64_t window,
                       const DistanceBias& bias, const Linear& output, const Norm& mlp_norm,
                       const Linear& up, bool is_gated,
                       int activation, const Linear& down, std::optional<CrossAttention> cross) {
             return Block{is_post_norm, attention_norm, mlp_norm, query_norm, key_norm, qkv, output,
                          up, down, is_gated, static_cast<Activation>(activation), heads, kv_heads,
                          head_dim, window, scale, bias, at(cos), at(sin), std::move(cross)};
           }),
           py::kw_only(), py::arg("is_post_norm"), py::arg("attention_norm"), py::arg("qkv"), py::arg("query_norm"),
           py::arg("key_norm"), py::arg("cos"), py::arg("sin"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("scale"), py::arg("window"), py::arg("bias"),
           py::arg("output"), py::arg("mlp_norm"), py::arg("up"), py::arg("is_gated"),
           py::arg("activation"), py::arg("down"), py::arg("cross"));

  py::class_<Span>(m, "Span")
      .def(py::init([](const std::vector<Block>& blocks, const std::vector<Cache>& caches) {
        return Span{blocks, caches};
      }));

  py::class_<PackedTexts>(m, "PackedTexts")
      .def(py::init([](std::vector<int64_t> lens, std::vector<int64_t> query_lens, Address rows) {
        return PackedTexts{{std::move(query_lens), std::move(lens)}, at<int64_t>(rows)};
      }));
  py::class_<PackedSources>(m, "PackedSources")
      .def(py::init([](Address keys_values, int64_t stride, std::vector<int64_t> lens,
                       std::vector<int64_t> query_lens) {
        return PackedSources{at(keys_values), stride, {std::move(query_lens), std::move(lens)}};
      }));

  py::class_<TableRows>(m, "TableRows")
      .def(py::init([](Address table, int64_t rows, int64_t row_bytes, Address taken) {
        return TableRows{at<void>(table), rows, row_bytes, at<int64_t>(taken)};
      }));

  py::class_<Choice>(m, "Choice")
      .def(py::init([](Address temperature, Address seeds, Address positions, Address tokens,
                       Address log_probs, Address num_candidates) {
        return Choice{at(temperature),     at<int64_t>(seeds), at<int64_t>(positions),
                      at<int64_t>(tokens), at(log_probs),      at<int32_t>(num_candidates)};
      }));

  py::class_<LowerHead>(m, "LowerHead")
      .def(py::init([](int64_t first, int64_t count, Address hidden, const Linear& head,
                       Address alpha, Address least) {
        return LowerHead{first, count, at(hidden), head, at(alpha), at<int64_t>(least)};
      }));

  py::class_<LayerLogits>(m, "LayerLogits").def(py::init(&layers_of));

  py::class_<RoughRows>(m, "RoughRows")
      .def(py::init([](Address hidden, Address codes, Address scales, int64_t terms,
                       Address reaches, Address slacks, int64_t rows) {
        return RoughRows{at(hidden), {at<uint8_t>(codes), at(scales)}, terms, at(reaches),
                         at<double>(slacks), rows};
      }));
  py::class_<RoughHead>(m, "RoughHead")
      .def(py::init([](Address codes, Address starts, Address scales, Address errors,
                       int64_t vocab, int64_t columns, Address finer_codes,
                       Address finer_starts, Address finer_scales) {
             return RoughHead{
                 {at<int8_t>(codes), at<int32_t>(starts), at(scales), vocab, columns},
                 at(errors),
                 {at<int8_t>(finer_codes), at<int32_t>(finer_starts), at(finer_scales), vocab,
                  columns}};
           }),
           py::arg("codes"), py::arg("starts"), py::arg("scales"), py::arg("errors"),
           py::arg("vocab"), py::arg("columns"), py::arg("finer_codes") = 0,
           py::arg("finer_starts") = 0, py::arg("finer_scales") = 0);

  m.def("head_logits", &project);
  m.def("head_statistics", &measure_head);
  m.def("code_rows", &code_states);
  m.def("coded_head_tokens", &choose_by_codes);
  m.def("rough_head_sums", &sum_by_codes);
  m.def("head_tokens", &choose);
  m.def("contrast_heads", &contrast);
  m.def("contrast_tokens", &choose_contrast);
  m.def("shared_head_tokens", &choose_shared);
  m.def("sample_tokens", &sample);
  m.def("js_divergences", &compare_layers);
  m.def("dola_tokens", &choose_dola);
  m.def("gate_odds", &foretell);
  m.def("linear", &linear);
  m.def("linear_activation", &linear_activation);
  m.def("norm", &norm);
  m.def("paged_attention", &attention);
  m.def("packed_attention", &attend_packed);
  m.def("decoder_blocks", &decoder_blocks);
  m.def("packed_blocks", &packed_blocks);
  m.def("take_rows", &take);
  m.def("embed", &embed_tokens);
  m.def("plain_read", &plain_read);
  m.def("isa", [] { return kernels().name; });
  m.def("choose_isa", [](const std::string& name) { return choose_isa(name.c_str()); });
}
