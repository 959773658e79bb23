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
#include "weighted_sums.h"

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

// The gradients of a panel of kept logits, rounded, and to `total` kTile partial sums of each times
// its logit. That of an own one, of row i and column own_column + i, is given, and not in the sums.
MEDFAST_KERNEL void gradient_panel(const int16_t* kept, float step, float shift,
                                   const float* row_weights, const float* column_weights,
                                   int64_t rows, int64_t columns, int64_t own_column,
                                   const float* own, float* total, bf16* gradient) {
  alignas(64) float logits[kPanel * kPanel];
  alignas(64) float unrounded[kPanel * kPanel];
  // In loops of their own, as store_all has them.
#pragma omp simd
  for (int64_t k = 0; k < kPanel * kPanel; ++k) logits[k] = step * static_cast<float>(kept[k]);
  // So that what is not there adds nothing to the sums.
  for (int64_t i = 0; i < kPanel; ++i)
    for (int64_t j = i < rows ? columns : 0; j < kPanel; ++j) logits[i * kPanel + j] = 0;
  const int64_t first_own = std::max<int64_t>(0, -own_column);
  const int64_t last_own = std::min(kPanel, kPanel - own_column);
  for (int64_t i = first_own; i < last_own; ++i) logits[i * kPanel + own_column + i] = 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    const float* row = logits + i * kPanel;
    float* to = unrounded + i * kPanel;
#pragma omp simd
    for (int64_t j = 0; j < kTile; ++j) {
      const float left = row[j];
      const float right = row[kTile + j];
      to[j] = clip_loss_both_ways(exponential(left - shift), row_weights[i], column_weights[j]);
      to[kTile + j] = clip_loss_both_ways(exponential(right - shift), row_weights[i],
                                          column_weights[kTile + j]);
      total[j] += to[j] * left + to[kTile + j] * right;
    }
  }
  for (int64_t i = first_own; i < last_own; ++i) unrounded[i * kPanel + own_column + i] = own[i];
  store_all(unrounded, 1.0f, kPanel * kPanel, gradient);
}

// Followed by zeros up to a whole panel.
std::vector<float> padded(const float* values, int64_t count) {
  std::vector<float> all(kPanel * ceil_div(count, kPanel));
  std::copy(values, values + count, all.begin());
  return all;
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

template <class Out>
MEDFAST_KERNEL void gradient_row(const float* row, int64_t columns, float shift, float row_weight,
                                 const float* column_weights, Out* gradient, float* sum) {
  float unrounded[kBlockColumns];
  float total = 0;
  for (int64_t first = 0; first < columns; first += kBlockColumns) {
    const int64_t count = std::min(kBlockColumns, columns - first);
    float* to = unrounded;
    if constexpr (std::is_same_v<Out, float>) to = gradient + first;
    total += gradient_part(row + first, count, shift, row_weight, column_weights + first, to);
    if constexpr (!std::is_same_v<Out, float>) store_all(to, 1.0f, count, gradient + first);
  }
  *sum = total;
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
    const int64_t padded_width = kPanel * ceil_div(width, kPanel);
    std::vector<float> row_parts(row_count * kTile);
    std::vector<float> column_parts(row_blocks * padded_width);
    const Matrix<T> band{columns.data + left * columns.column_stride, columns.row_stride,
                         columns.column_stride, 0};
    for_each_product(
        1, row_count, width, depth, rows, band, {block_rows, depth},
        [&](float* product, int64_t, int64_t i, int64_t j, int64_t height, int64_t count, bool) {
          run<sum_panel<Kept>>(product, height, count, scale, i + offset - left - j, own + i, shift,
                         PanelSums{row_parts.data() + i * kTile,
                                   column_parts.data() + i / block_rows * padded_width + j},
                         kept.data == nullptr ? nullptr : kept.panel(i, left + j),
                         kept.row_stride(), 1.0f / kept.step);
        });
    for (int64_t i = 0; i < row_count; ++i)
      by_row[i] = std::accumulate(row_parts.begin() + i * kTile,
                                  row_parts.begin() + (i + 1) * kTile, by_row[i]);
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0;
      for (int64_t a = 0; a < row_blocks; ++a) sum += column_parts[a * padded_width + j];
      column_sums[left + j] = static_cast<float>(sum);
    }
  }
  std::copy(by_row.begin(), by_row.end(), row_sums);
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

double clip_loss_gradient_of_features(KeptLogits<int16_t> logits, int64_t rows, int64_t columns,
                                      int64_t depth, float scale, int64_t offset, float shift,
                                      const float* row_weights, const float* column_weights,
                                      const float* own, const bf16* features, bool of_columns,
                                      bf16* gradient) {
  const std::vector<float> by_row = padded(row_weights, rows);
  const std::vector<float> by_column = padded(column_weights, columns);
  const std::vector<float> own_by_row = padded(own, rows);
  std::vector<float> totals((of_columns ? by_column : by_row).size() / kPanel * kTile);
  const auto weigh = [&](int64_t to, int64_t from, uint32_t* weights) {
    const int64_t i = of_columns ? from : to;
    const int64_t j = of_columns ? to : from;
    alignas(64) bf16 not_transposed[kPanel * kPanel];
    bf16* panel = of_columns ? not_transposed : reinterpret_cast<bf16*>(weights);
    run<gradient_panel>(static_cast<const int16_t*>(logits.panel(i, j)), logits.step, shift,
                        by_row.data() + i, by_column.data() + j, std::min(kPanel, rows - i),
                        std::min(kPanel, columns - j), i + offset - j, own_by_row.data() + i,
                        totals.data() + to / kPanel * kTile, panel);
    if (of_columns) pack(Lines<bf16>{panel, 1, kPanel}, kPanel, kStepDepth, true, weights);
  };
  weighted_sums(of_columns ? columns : rows, of_columns ? rows : columns, depth, features, scale,
                false, gradient, [&](int64_t to, int64_t from, int64_t steps, uint32_t* weights) {
                  for (int64_t step = 0; step < steps; ++step)
                    weigh(to, from + step * kStepDepth, weights + step * kTermSize);
                });
  return std::accumulate(totals.begin(), totals.end(), 0.0);
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

}  // namespace medfast
