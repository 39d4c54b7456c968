#include "table_rows.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "dense.h"

namespace multiexit::cpu {

namespace {

constexpr int64_t kRows = 32;  // of a chunk

const char* row_of(const TableRows& from, int64_t place) {
  return static_cast<const char*>(from.table) + from.taken[place] * from.row_bytes;
}

void check(const TableRows& from, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (from.taken[i] < 0 || from.taken[i] >= from.rows)
      throw std::out_of_range("row " + std::to_string(from.taken[i]) + " of a table of " +
                              std::to_string(from.rows) + " rows");
}

}  // namespace

void take_rows(int threads, const TableRows& from, int64_t count, void* out) {
  check(from, count);
  in_chunks(threads, count, kRows, [&](int64_t first, int64_t many, int) {
    for (int64_t i = first; i < first + many; ++i)
      std::memcpy(static_cast<char*>(out) + i * from.row_bytes, row_of(from, i), from.row_bytes);
  });
}

void embed(int threads, const TableRows& tokens, const TableRows& places, float scale,
           int64_t count, float* out) {
  check(tokens, count);
  check(places, count);
  const int64_t width = tokens.row_bytes / int64_t{sizeof(float)};
  in_chunks(threads, count, kRows, [&](int64_t first, int64_t many, int) {
    for (int64_t i = first; i < first + many; ++i) {
      const auto* token = reinterpret_cast<const float*>(row_of(tokens, i));
      const auto* place = reinterpret_cast<const float*>(row_of(places, i));
      for (int64_t j = 0; j < width; ++j) out[i * width + j] = scale * token[j] + place[j];
    }
  });
}

}  // namespace multiexit::cpu
