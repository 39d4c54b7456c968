// Rows of tables, moved and added. See ops/rows.py for the contract.
#pragma once
#include <cstdint>

namespace multiexit::cpu {

// Rows of a table, by their numbers; all of these must be in [0, rows).
struct TableRows {
  const void* table;
  int64_t rows, row_bytes;
  const int64_t* taken;
};

// out: [count, row_bytes]. Throws std::out_of_range before anything is written.
void take_rows(int threads, const TableRows& from, int64_t count, void* out);

// out[i] = scale * token + place, rows of float32.
void embed(int threads, const TableRows& tokens, const TableRows& places, float scale,
           int64_t count, float* out);

}  // namespace multiexit::cpu
