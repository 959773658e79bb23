#include "clip_loss.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "arithmetic/clip_loss.h"
#include "bf16.h"
#include "exponential.h"
#include "instruction_set.h"
#include "panels.h"

namespace medfast {
namespace {

// Column sums of a block stay in the first-level cache. Fixed sizes make the order of summation,
// and so the result, independent of the number of threads.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockColumns = 1024;
// The same of products.
constexpr int64_t kProductRows = 256;
constexpr int64_t kProductColumns = 4096;
constexpr int32_t kLowest = -32768;

MEDFAST_KERNEL void square_norm(const bf16* row, int64_t width, float* sum) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < width; ++k) total += load(row + k) * load(row + k);
  *sum = total;
}

MEDFAST_KERNEL void keep(float logit, float steps_per_unit, int16_t* to) {
  const float x = logit * steps_per_unit;
  const float within = x > static_cast<float>(kLowest) ? x : static_cast<float>(kLowest);
  *to = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(within)));
}

MEDFAST_KERNEL void keep(float logit, float, float* to) { *to = logit; }

MEDFAST_KERNEL void sum_block(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                              float shift, float* row_sums, float* column_sums, int16_t* kept,
                              int64_t kept_stride, float steps_per_unit) {
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
    if (kept == nullptr) continue;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j)
      keep(row[j], steps_per_unit, kept + i * kept_stride + j);
  }
  std::copy(sums, sums + columns, column_sums);
}

// Where the sums of a panel go: those of row i to the kTile entries from rows + i * kTile, in which
// every kTile-th column meets.
struct PanelSums {
  float* rows;
  float* columns;
};

template <class Kept>
MEDFAST_KERNEL void sum_panel(float* logits, int64_t rows, int64_t columns, float scale,
                              int64_t own_column, float* own, float shift, PanelSums sums,
                              Kept* kept, int64_t kept_stride, float steps_per_unit) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = logits + i * kPanel;
#pragma omp simd
    for (int64_t j = 0; j < kPanel; ++j) row[j] *= scale;
    if (0 <= own_column + i && own_column + i < columns) {
      own[i] = row[own_column + i];
      row[own_column + i] = -INFINITY;
    }
    for (int64_t j = columns; j < kPanel; ++j) row[j] = -INFINITY;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = logits + i * kPanel;
    float* row_sums = sums.rows + i * kTile;
#pragma omp simd
    for (int64_t j = 0; j < kTile; ++j) {
      const float left = exponential(row[j] - shift);
      const float right = exponential(row[kTile + j] - shift);
      row_sums[j] += left + right;
      sums.columns[j] += left;
      sums.columns[kTile + j] += right;
    }
  }
  if (kept == nullptr) return;
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = logits + i * kPanel;
    Kept* to = kept + i * kept_stride;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) keep(row[j], steps_per_unit, to + j);
  }
}

MEDFAST_KERNEL float gradient_part(const float* logits, int64_t columns, float shift,
                                   float row_weight, const float* column_weights,
                                   float* gradient) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < columns; ++j) {
    const float logit = logits[j];
    const float g =
        clip_loss_both_ways(exponential(logit - shift), row_weight, column_weights[j]);
    gradient[j] = g;
    total += logit == -INFINITY ? 0.0f : g * logit;
  }
  return total;
}

// Widened in a loop of its own, as load_all does it.
MEDFAST_KERNEL const float* widened(const float* logits, float, int64_t, float*) { return logits; }

MEDFAST_KERNEL const float* widened(const int16_t* kept, float step, int64_t columns, float* to) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j)
    to[j] = kept[j] == kLowest ? -INFINITY : step * static_cast<float>(kept[j]);
  return to;
}

template <class In, class Out>
MEDFAST_KERNEL void gradient_row(const In* row, float step, int64_t columns, float shift,
                                 float row_weight, const float* column_weights, Out* gradient,
                                 float* sum) {
  float logits[kBlockColumns];
  float unrounded[kBlockColumns];
  float total = 0;
  for (int64_t first = 0; first < columns; first += kBlockColumns) {
    const int64_t count = std::min(kBlockColumns, columns - first);
    const float* from = widened(row + first, step, count, logits);
    float* to = unrounded;
    if constexpr (std::is_same_v<Out, float>) to = gradient + first;
    total += gradient_part(from, count, shift, row_weight, column_weights + first, to);
    if constexpr (!std::is_same_v<Out, float>) store_all(to, 1.0f, count, gradient + first);
  }
  *sum = total;
}

template <class In, class Out>
double gradient_of_rows(const In* logits, int64_t stride, float step, int64_t rows,
                        int64_t columns, float shift, const float* row_weights,
                        const float* column_weights, Out* gradient) {
  std::vector<float> sums(rows);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    run<gradient_row<In, Out>>(logits + i * stride, step, columns, shift, row_weights[i],
                               column_weights, gradient + i * columns, &sums[i]);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

float largest_norm(const bf16* features, int64_t rows, int64_t width) {
  std::vector<float> squares(rows);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i) run<square_norm>(features + i * width, width, &squares[i]);
  float largest = 0;
  for (const float square : squares)
    if (square > largest || square != square) largest = square;
  return std::sqrt(largest);
}

void clip_loss_sums(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                    float shift, float* row_sums, float* column_sums, KeptLogits<int16_t> kept) {
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
                     column_parts.data() + a * columns + j,
                     kept.data == nullptr ? nullptr : kept.data + i * kept.stride + j,
                     kept.stride, 1.0f / kept.step);
    }
  std::fill(row_sums, row_sums + rows, 0.0f);
  for (int64_t b = 0; b < column_blocks; ++b)
    for (int64_t i = 0; i < rows; ++i) row_sums[i] += row_parts[b * rows + i];
  std::fill(column_sums, column_sums + columns, 0.0f);
  for (int64_t a = 0; a < row_blocks; ++a)
    for (int64_t j = 0; j < columns; ++j) column_sums[j] += column_parts[a * columns + j];
}

template <class T, class Kept>
void clip_loss_sums_of_features(Matrix<T> rows, Matrix<T> columns, int64_t row_count,
                                int64_t column_count, int64_t depth, float scale, int64_t offset,
                                float shift, float* own, float* row_sums, float* column_sums,
                                KeptLogits<Kept> kept) {
  const int64_t block_rows = row_count < 8 * kProductRows ? kPanel : kProductRows;
  const int64_t row_blocks = ceil_div(row_count, block_rows);
  std::vector<double> by_row(row_count);
  for (int64_t left = 0; left < column_count; left += kProductColumns) {
    const int64_t width = std::min(kProductColumns, column_count - left);
    const int64_t padded = kPanel * ceil_div(width, kPanel);
    std::vector<float> row_parts(row_count * kTile);
    std::vector<float> column_parts(row_blocks * padded);
    const Matrix<T> band{columns.data + left * columns.column_stride, columns.row_stride,
                         columns.column_stride, 0};
    for_each_product(
        1, row_count, width, depth, rows, band, {block_rows, depth},
        [&](float* product, int64_t, int64_t i, int64_t j, int64_t height, int64_t count, bool) {
          run<sum_panel<Kept>>(product, height, count, scale, i + offset - left - j, own + i, shift,
                         PanelSums{row_parts.data() + i * kTile,
                                   column_parts.data() + i / block_rows * padded + j},
                         kept.data == nullptr ? nullptr
                                              : kept.data + i * kept.stride + left + j,
                         kept.stride, 1.0f / kept.step);
        });
    for (int64_t i = 0; i < row_count; ++i)
      by_row[i] = std::accumulate(row_parts.begin() + i * kTile,
                                  row_parts.begin() + (i + 1) * kTile, by_row[i]);
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0;
      for (int64_t a = 0; a < row_blocks; ++a) sum += column_parts[a * padded + j];
      column_sums[left + j] = static_cast<float>(sum);
    }
  }
  std::copy(by_row.begin(), by_row.end(), row_sums);
}

template <class Out>
double clip_loss_gradient(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                        float shift, const float* row_weights, const float* column_weights,
                        Out* gradient) {
  return gradient_of_rows(logits, stride, 1.0f, rows, columns, shift, row_weights, column_weights,
                          gradient);
}

template <class Out>
double clip_loss_gradient(KeptLogits<int16_t> logits, int64_t rows, int64_t columns, float shift,
                        const float* row_weights, const float* column_weights, Out* gradient) {
  return gradient_of_rows(logits.data, logits.stride, logits.step, rows, columns, shift,
                          row_weights, column_weights, gradient);
}

template void clip_loss_sums_of_features(Matrix<bf16>, Matrix<bf16>, int64_t, int64_t, int64_t,
                                         float, int64_t, float, float*, float*, float*,
                                         KeptLogits<int16_t>);
template void clip_loss_sums_of_features(Matrix<float>, Matrix<float>, int64_t, int64_t, int64_t,
                                         float, int64_t, float, float*, float*, float*,
                                         KeptLogits<float>);
template double clip_loss_gradient(const float*, int64_t, int64_t, int64_t, float, const float*,
                                   const float*, float*);
template double clip_loss_gradient(const float*, int64_t, int64_t, int64_t, float, const float*,
                                   const float*, bf16*);
template double clip_loss_gradient(KeptLogits<int16_t>, int64_t, int64_t, float, const float*,
                                   const float*, bf16*);

}  // namespace medfast
