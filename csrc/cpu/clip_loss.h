// The passes of clip_loss, over a tile of logits [rows, columns], fp32, whose row i starts at
// logits + i * stride, or straight from features.

#pragma once

#include <cstdint>
#include <type_traits>

#include "panels.h"

namespace medfast {

// Where logits are kept: as they are, row i at data + i * stride; or in 16 bits as multiples of
// `step`, panel by panel as products yield them, where `stride` is the rows' length rounded up to
// whole panels.
template <class Kept>
struct KeptLogits {
  Kept* data;
  int64_t stride;
  float step;

  // The panel that begins at (i, j), and how far its rows are apart.
  Kept* panel(int64_t i, int64_t j) const {
    return data + i * stride + j * (std::is_same_v<Kept, int16_t> ? kPanel : 1);
  }
  int64_t row_stride() const { return std::is_same_v<Kept, int16_t> ? kPanel : stride; }
};

// The largest norm of a row of features [rows, width]; NaN if there is one.
float largest_norm(const bf16* features, int64_t rows, int64_t width);

// row_sums[i] = sum_j e^(l_ij - shift), column_sums[j] = sum_i e^(l_ij - shift).
void clip_loss_sums(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                    float shift, float* row_sums, float* column_sums);

// The same of the logits scale * rows @ columns^T themselves, of which none is ever written but,
// where there is one, each row's own, of column i + offset: own[i], left out of the sums. rows is
// [row_count, depth], columns [depth, column_count]. Unless kept.data is null, the logits, which in
// 16 bits then must not be beyond 2^15 - 1 steps, are kept, own ones as the lowest number there is.
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

// The gradient of one side's features, rounded: scale * g @ features of the rows [rows, depth] from
// features of the columns [columns, depth], or, `of_columns`, scale * g^T @ features the other way
// round, all contiguous. g is as above and rounded to bf16, but own[i] is the gradient of row i's
// own logit, of column i + offset, where it exists. Returns the sum of g_ij * l_ij, own ones left
// out.
double clip_loss_gradient_of_features(KeptLogits<int16_t> logits, int64_t rows, int64_t columns,
                                      int64_t depth, float scale, int64_t offset, float shift,
                                      const float* row_weights, const float* column_weights,
                                      const float* own, const bf16* features, bool of_columns,
                                      bf16* gradient);

}  // namespace medfast
