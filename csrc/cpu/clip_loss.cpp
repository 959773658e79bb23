#include "clip_loss.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "bf16.h"
#include "exponential.h"

namespace medfast {
namespace {

// Column sums of a block stay in the first-level cache. Fixed sizes make the order of summation,
// and so the result, independent of the number of threads.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockColumns = 1024;

MEDFAST_KERNEL void sum_block(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                              float shift, float* row_sums, float* column_sums) {
  float sums[kBlockColumns] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = logits + i * stride;
    float row_sum = 0;
#pragma omp simd reduction(+ : row_sum)
    for (int64_t j = 0; j < columns; ++j) {
      const float e = exponential(row[j] - shift);
      row_sum += e;
      sums[j] += e;
    }
    row_sums[i] = row_sum;
  }
  std::copy(sums, sums + columns, column_sums);
}

template <class Out>
MEDFAST_KERNEL void gradient_row(const float* row, int64_t columns, float shift, float row_weight,
                                 const float* column_weights, Out* gradient, float* sum) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < columns; ++j) {
    const float g = exponential(row[j] - shift) * (row_weight + column_weights[j]);
    store(g, gradient + j);
    total += row[j] == -INFINITY ? 0.0f : g * row[j];
  }
  *sum = total;
}

}  // namespace

void clip_loss_sums(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                    float shift, float* row_sums, float* column_sums) {
  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t column_blocks = (columns + kBlockColumns - 1) / kBlockColumns;
  std::vector<float> row_parts(column_blocks * rows);
  std::vector<float> column_parts(row_blocks * columns);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t a = 0; a < row_blocks; ++a)
    for (int64_t b = 0; b < column_blocks; ++b) {
      const int64_t i = a * kBlockRows;
      const int64_t j = b * kBlockColumns;
      run<sum_block>(logits + i * stride + j, stride, std::min(kBlockRows, rows - i),
                     std::min(kBlockColumns, columns - j), shift, row_parts.data() + b * rows + i,
                     column_parts.data() + a * columns + j);
    }
  std::fill(row_sums, row_sums + rows, 0.0f);
  for (int64_t b = 0; b < column_blocks; ++b)
    for (int64_t i = 0; i < rows; ++i) row_sums[i] += row_parts[b * rows + i];
  std::fill(column_sums, column_sums + columns, 0.0f);
  for (int64_t a = 0; a < row_blocks; ++a)
    for (int64_t j = 0; j < columns; ++j) column_sums[j] += column_parts[a * columns + j];
}

template <class Out>
double clip_loss_gradient(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                        float shift, const float* row_weights, const float* column_weights,
                        Out* gradient) {
  std::vector<float> sums(rows);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    run<gradient_row<Out>>(logits + i * stride, columns, shift, row_weights[i], column_weights,
                           gradient + i * columns, &sums[i]);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

template double clip_loss_gradient(const float*, int64_t, int64_t, int64_t, float, const float*,
                                 const float*, float*);
template double clip_loss_gradient(const float*, int64_t, int64_t, int64_t, float, const float*,
                                 const float*, bf16*);

}  // namespace medfast
