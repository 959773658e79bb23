#include "retrieval_rank.h"

#include <algorithm>
#include <vector>

#include "instruction_set.h"

namespace medfast {
namespace {

// A thread's columns at a time: their thresholds and counts stay in the first-level cache.
constexpr int64_t kBlockColumns = 1024;

MEDFAST_KERNEL void count_rows(const float* scores, int64_t stride, int64_t rows, int64_t columns,
                               const float* thresholds, int32_t* counts) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = scores + i * stride;
    const float threshold = thresholds[i];
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < columns; ++j) count += row[j] < threshold ? 0 : 1;
    counts[i] = count;
  }
}

MEDFAST_KERNEL void count_both(const float* scores, int64_t stride, int64_t rows, int64_t columns,
                               const float* row_thresholds, const float* column_thresholds,
                               int32_t* row_counts, int32_t* column_counts) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = scores + i * stride;
    const float threshold = row_thresholds[i];
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < columns; ++j) {
      count += row[j] < threshold ? 0 : 1;
      column_counts[j] += row[j] < column_thresholds[j] ? 0 : 1;
    }
    row_counts[i] = count;
  }
}

}  // namespace

void retrieval_rank_counts(const float* scores, int64_t stride, int64_t rows, int64_t columns,
                           const float* row_thresholds, const float* column_thresholds,
                           int64_t* row_counts, int64_t* column_counts) {
  const int64_t blocks = (columns + kBlockColumns - 1) / kBlockColumns;
  std::vector<int32_t> parts(blocks * rows);
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t j = b * kBlockColumns;
    const int64_t width = std::min(kBlockColumns, columns - j);
    int32_t* part = parts.data() + b * rows;
    if (column_counts == nullptr) {
      run<count_rows>(scores + j, stride, rows, width, row_thresholds, part);
      continue;
    }
    int32_t counts[kBlockColumns] = {};
    run<count_both>(scores + j, stride, rows, width, row_thresholds, column_thresholds + j, part,
                    counts);
    for (int64_t k = 0; k < width; ++k) column_counts[j + k] += counts[k];
  }
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < rows; ++i) row_counts[i] += parts[b * rows + i];
}

}  // namespace medfast
