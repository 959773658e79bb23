// The pass of retrieval_rank over one tile of scores [rows, columns], fp32.

#pragma once

#include <cstdint>

namespace medfast {

// row_counts[i] += how many of row i's scores are not below row_thresholds[i], and likewise
// column_counts[j] with column_thresholds[j]; columns are left out where column_counts is null.
// NaN is not below anything.
void retrieval_rank_counts(const float* scores, int64_t stride, int64_t rows, int64_t columns,
                           const float* row_thresholds, const float* column_thresholds,
                           int64_t* row_counts, int64_t* column_counts);

}  // namespace medfast
