// The passes of clip_loss over one tile of logits [rows, columns], fp32. Row i starts at
// logits + i * stride.

#pragma once

#include <cstdint>

#include "panels.h"

namespace medfast {

// Where logits are kept, row i at data + i * stride: as they are, or in 16 bits as multiples of
// `step`, when the lowest number stands for -infinity.
template <class Kept>
struct KeptLogits {
  Kept* data;
  int64_t stride;
  float step;
};

// The largest norm of a row of features [rows, width]; NaN if there is one.
float largest_norm(const bf16* features, int64_t rows, int64_t width);

// row_sums[i] = sum_j e^(l_ij - shift), column_sums[j] = sum_i e^(l_ij - shift). The logits, which
// then must not be beyond 2^15 - 1 steps, are kept, unless kept.data is null.
void clip_loss_sums(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                    float shift, float* row_sums, float* column_sums, KeptLogits<int16_t> kept);

// The same of the logits scale * rows @ columns^T themselves, of which none is ever written but,
// where there is one, each row's own, of column i + offset: own[i], left out of the sums, and
// -infinity where it is kept. rows is [row_count, depth], columns [depth, column_count].
template <class T, class Kept>
void clip_loss_sums_of_features(Matrix<T> rows, Matrix<T> columns, int64_t row_count,
                                int64_t column_count, int64_t depth, float scale, int64_t offset,
                                float shift, float* own, float* row_sums, float* column_sums,
                                KeptLogits<Kept> kept);

// gradient_ij = e^(l_ij - shift) * (row_weights[i] + column_weights[j]), contiguous; Out is float
// or bf16. Returns the sum of gradient_ij * l_ij, of the gradient before it is rounded to Out, in
// an order that does not depend on the number of threads; terms of l_ij = -infinity are left out.
template <class Out>
double clip_loss_gradient(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                        float shift, const float* row_weights, const float* column_weights,
                        Out* gradient);
template <class Out>
double clip_loss_gradient(KeptLogits<int16_t> logits, int64_t rows, int64_t columns, float shift,
                          const float* row_weights, const float* column_weights, Out* gradient);

}  // namespace medfast
