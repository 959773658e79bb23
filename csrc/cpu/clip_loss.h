// The passes of clip_loss over one tile of logits [rows, columns], contiguous, fp32.

#pragma once

#include <cstdint>

namespace medfast {

// row_sums[i] = sum_j e^(l_ij - shift), column_sums[j] = sum_i e^(l_ij - shift).
void clip_loss_sums(const float* logits, int64_t rows, int64_t columns, float shift,
                    float* row_sums, float* column_sums);

// l_ij = e^(l_ij - shift) * (row_weights[i] + column_weights[j]), in place.
void clip_loss_softmaxes(float* logits, int64_t rows, int64_t columns, float shift,
                         const float* row_weights, const float* column_weights);

}  // namespace medfast
