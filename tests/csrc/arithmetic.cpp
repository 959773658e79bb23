// The arithmetic that kernels on a GPU share with this file, in fp64 and in fp32.

#include <cstdint>

#include "arithmetic/clip_loss.h"
#include "arithmetic/log_sum_exp.h"

using namespace medfast;

namespace {

// Row sums of e^(l - shift) as log-sum-exps, and whether all of them suit.
template <class T>
bool sums(const T* logits, int64_t rows, int64_t columns, T scale, T* lse) {
  const T shift = clip_loss_shift(scale);
  bool suits = clip_loss_scale_suits(scale);
  for (int64_t i = 0; i < rows; ++i) {
    T sum = 0;
    for (int64_t j = 0; j < columns; ++j)
      sum += power_of_two(logits[i * columns + j] * kLog2E<T> - shift);
    suits &= clip_loss_suits(sum, static_cast<T>(columns));
    lse[i] = (log_of_two(sum) + shift) * kLn2<T>;
  }
  return suits;
}

// The same with a running maximum, in pieces that are merged.
template <class T>
void online(const T* logits, int64_t rows, int64_t columns, int64_t piece, T* lse) {
  for (int64_t i = 0; i < rows; ++i) {
    LogSum<T> all;
    for (int64_t first = 0; first < columns; first += piece) {
      LogSum<T> part;
      for (int64_t j = first; j < columns && j < first + piece; ++j)
        part.add(logits[i * columns + j] * kLog2E<T>);
      all.merge(part);
    }
    lse[i] = all.value();
  }
}

template <class T>
void gradient(const T* logits, int64_t rows, int64_t columns, T scale, const T* row_lse,
              const T* column_lse, const T* d_rows, const T* d_columns, bool is_exact, T* out) {
  const T shift = clip_loss_shift(scale);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      out[i * columns + j] = clip_loss_logit_gradient(
          logits[i * columns + j] * kLog2E<T>, shift,
          clip_loss_side(row_lse[i], d_rows[i], shift, is_exact),
          clip_loss_side(column_lse[j], d_columns[j], shift, is_exact), is_exact);
}

}  // namespace

#define MEDFAST_FOR(T, name)                                                                      \
  bool sums_##name(const T* logits, int64_t rows, int64_t columns, double scale, T* lse) {        \
    return sums<T>(logits, rows, columns, static_cast<T>(scale), lse);                            \
  }                                                                                               \
  void online_##name(const T* logits, int64_t rows, int64_t columns, int64_t piece, T* lse) {     \
    online<T>(logits, rows, columns, piece, lse);                                                 \
  }                                                                                               \
  void gradient_##name(const T* logits, int64_t rows, int64_t columns, double scale,              \
                       const T* row_lse, const T* column_lse, const T* d_rows,                    \
                       const T* d_columns, bool is_exact, T* out) {                               \
    gradient<T>(logits, rows, columns, static_cast<T>(scale), row_lse, column_lse, d_rows,        \
                d_columns, is_exact, out);                                                        \
  }

extern "C" {
MEDFAST_FOR(float, fp32)
MEDFAST_FOR(double, fp64)
}
