// The arithmetic of clip_loss: one exponential per logit, that of the logit minus one constant,
// serves its row and its column. Logits, shifts and log-sum-exps here are in powers of two.

#pragma once

#include "arithmetic/power.h"

namespace medfast {

// The constant leaves exponentials of e^60 at most to unit vectors, so that sums of any batch stay far
// from overflow.
template <class T>
MEDFAST_HD T clip_loss_shift(T scale) {
  const T beyond = (scale < 0 ? -scale : scale) - 60;
  return beyond > 0 ? beyond * kLog2E<T> : 0;
}

// Whether a sum of at most `terms` exponentials lies where one constant is exact: those below 2^-126
// count as 0, which to a sum above terms * 2^-102 is less than a rounding. False for NaN.
template <class T>
MEDFAST_HD bool clip_loss_suits(T sum, T terms) {
  return sum >= terms * static_cast<T>(0x1p-102) && sum <= static_cast<T>(0x1p120);
}

// Above this scale one constant cannot serve every row. False for NaN.
template <class T>
MEDFAST_HD bool clip_loss_scale_suits(T scale) {
  return scale >= -150 && scale <= 150;
}

// The gradient of a logit that is no own one, from its exponential, which both directions share.
template <class T>
MEDFAST_HD T clip_loss_both_ways(T exponential, T row_weight, T column_weight) {
  return exponential * (row_weight + column_weight);
}

// What the gradient takes of a row, or of a column: with one constant the weight is
// d_lse * 2^(shift - lse), else d_lse alone.
template <class T>
struct ClipLossSide {
  T lse;
  T weight;
};

template <class T>
MEDFAST_HD ClipLossSide<T> clip_loss_side(T lse, T d_lse, T shift, bool is_exact) {
  lse *= kLog2E<T>;
  return {lse, is_exact ? d_lse : d_lse * power_of_two(shift - lse)};
}

template <class T>
MEDFAST_HD T clip_loss_logit_gradient(T logit, T shift, const ClipLossSide<T>& row,
                                      const ClipLossSide<T>& column, bool is_exact) {
  if (is_exact)
    return power_of_two(logit - row.lse) * row.weight +
           power_of_two(logit - column.lse) * column.weight;
  return clip_loss_both_ways(power_of_two(logit - shift), row.weight, column.weight);
}

}  // namespace medfast
