// Products with plain and quantized matrices, and the conversions of their numbers.
#include <cmath>
#include <vector>

#include "cpu/block.h"
#include "tests/kernels/tests.h"

namespace multiexit::cpu {

void products() {
  for (int64_t tokens : {1, 2, 5, 7, 13})
    for (int64_t columns : {1, 7, 16, 33, 100})
      for (int64_t rows : {1, 3, 9, 37}) {
        const auto x = numbers(tokens * columns), weight = numbers(rows * columns);
        const auto bias = numbers(rows);
        std::vector<float> out(tokens * rows);
        const Linear linear = {{weight.data(), DType::kFloat32, rows, columns}, bias.data()};
        multiply(3, x.data(), tokens, linear, out.data(), kNothingMore);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < rows; ++r) {
            double sum = bias[r];
            for (int64_t i = 0; i < columns; ++i)
              sum += double(x[t * columns + i]) * weight[r * columns + i];
            expect_near(out[t * rows + r], sum, "product");
          }
      }
}

// Rows in any order, some twice, have the bits of the whole product.
static void expect_gathered(const Matrix& matrix) {
  const auto x = numbers(matrix.columns), bias = numbers(matrix.rows);
  std::vector<char> input(matrix.columns * sizeof(float));
  kernels().from_float(x.data(), input.data(), kernels().input_dtype(matrix.dtype), matrix.columns);
  std::vector<float> whole(matrix.rows);
  kernels().product(input.data(), 1, matrix, 0, matrix.rows, bias.data(), whole.data(),
                    matrix.rows);
  for (int32_t count : {1, 3, 4, 9}) {
    std::vector<float> out(count);
    std::vector<int32_t> listed(count);
    for (int32_t i = 0; i < count; ++i)
      listed[i] = static_cast<int32_t>((matrix.rows - 1 + 7 * i) % matrix.rows);
    kernels().gathered_product(input.data(), matrix, listed.data(), count, bias.data(), out.data());
    for (int32_t i = 0; i < count; ++i)
      expect_equal(out[i], whole[listed[i]], "gathered product");
  }
}

void gathered_products() {
  for (int64_t rows : {1, 5, 37})
    for (int64_t columns : {1, 16, 33, 100}) {
      const auto plain = numbers(rows * columns);
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        std::vector<char> weight(rows * columns * size_of(dtype));
        kernels().from_float(plain.data(), weight.data(), dtype, rows * columns);
        expect_gathered({weight.data(), dtype, rows, columns});
      }
      Matrix matrix = {nullptr, DType::kFloat32, rows, columns, 8, nullptr, 32};
      std::vector<uint8_t> codes(rows * matrix.row_bytes());
      for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 37 % 251);
      std::vector<BFloat16> scales(rows * matrix.groups());
      kernels().from_float(numbers(scales.size()).data(), scales.data(), DType::kBFloat16,
                           scales.size());
      matrix.data = codes.data();
      matrix.scales = scales.data();
      expect_gathered(matrix);
    }
}

// Codes of 1 and -3 in turn, with a scale of 1, 2, 3, ... for the groups of a row.
void quantized_products(int bits, int64_t group_size) {
  for (int64_t tokens : {1, 2, 3, 4, 9})
    for (int64_t columns : {1, 33, 64, 100, 550})
      for (int64_t rows : {1, 5, 19}) {
        Matrix matrix = {nullptr, DType::kFloat32, rows, columns, bits, nullptr, group_size};
        std::vector<uint8_t> codes(rows * matrix.row_bytes(), bits == 8 ? 0 : 0x88);
        std::vector<BFloat16> scales(rows * matrix.groups());
        for (int64_t i = 0; i < rows * matrix.groups(); ++i) {
          const float scale = i % matrix.groups() + 1;
          kernels().from_float(&scale, &scales[i], DType::kBFloat16, 1);
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c) {
            uint8_t* row = codes.data() + r * matrix.row_bytes();
            const int code = (r + c) % 2 ? 1 : -3;
            if (bits == 8)
              row[c] = static_cast<uint8_t>(code);
            else
              row[c / 32 * 16 + c % 16] += code * (c % 32 < 16 ? 1 : 16);
          }
        matrix.data = codes.data();
        matrix.scales = scales.data();
        const auto x = numbers(tokens * columns);
        std::vector<float> out(tokens * rows);
        multiply(3, x.data(), tokens, {matrix, nullptr}, out.data(), kNothingMore);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < rows; ++r) {
            double sum = 0.0;
            for (int64_t c = 0; c < columns; ++c)
              sum += x[t * columns + c] * ((r + c) % 2 ? 1.0 : -3.0) * (c / group_size + 1);
            expect_near(out[t * rows + r], sum, "quantized product");
          }
      }
}

void conversions() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16})
    for (int64_t count : {1, 8, 16, 17, 31}) {
      const auto x = numbers(count, 100.0f);
      std::vector<uint16_t> half(count);
      std::vector<float> back(count);
      kernels().from_float(x.data(), half.data(), dtype, count);
      kernels().to_float(half.data(), dtype, back.data(), count);
      for (int64_t i = 0; i < count; ++i)
        if (std::abs(back[i] - x[i]) > std::abs(x[i]) / 128) expect_near(back[i], x[i], "half");
    }
}

// A number of e4m3 by its definition.
static double meaning(int code) {
  const int exponent = code >> 3 & 15;
  const double size = exponent ? std::ldexp(8 + (code & 7), exponent - 10) : std::ldexp(code & 7, -9);
  return code & 128 ? -size : size;
}

// Every number of e4m3 in every lane, one scale for a row.
void floats_of_8_bits() {
  constexpr int64_t kRows = 3, kColumns = 550;
  Matrix matrix = {nullptr, DType::kFloat32, kRows, kColumns, 8, nullptr, 576, true};
  std::vector<uint8_t> codes(kRows * matrix.row_bytes(), 0);
  std::vector<BFloat16> scales(kRows);
  for (int64_t r = 0; r < kRows; ++r) {
    const float scale = 1.0f / (r + 1);
    kernels().from_float(&scale, &scales[r], DType::kBFloat16, 1);
    for (int64_t c = 0; c < kColumns; ++c)
      codes[r * matrix.row_bytes() + c] = (c + 37 * r) % 128 == 127 ? 0 : (c + 37 * r) % 256;
  }
  matrix.data = codes.data();
  matrix.scales = scales.data();
  for (int64_t tokens : {1, 9}) {
    const auto x = numbers(tokens * kColumns);
    std::vector<float> out(tokens * kRows);
    multiply(3, x.data(), tokens, {matrix, nullptr}, out.data(), kNothingMore);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < kRows; ++r) {
        float scale;
        kernels().to_float(&scales[r], DType::kBFloat16, &scale, 1);
        double sum = 0.0;
        for (int64_t c = 0; c < kColumns; ++c)
          sum += x[t * kColumns + c] * scale * meaning(codes[r * matrix.row_bytes() + c]);
        expect_near(out[t * kRows + r] / 448, sum / 448, "product of numbers of 8 bits");
      }
  }
}

}  // namespace multiexit::cpu
