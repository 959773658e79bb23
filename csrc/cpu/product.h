// Products of matrices of bf16 or fp32 with sums in fp32.

#pragma once

#include <cstdint>

#include "panels.h"

namespace medfast {

// Row i is at data + i * row_stride. Of several, each begins `next` entries behind the one before.
struct Result {
  float* data;
  int64_t row_stride;
  int64_t next;
};

// out = alpha * a @ b, or that added to it, of `count` products: a [rows, depth], b [depth,
// columns], out [rows, columns]. The order of sums does not depend on the number of threads.
template <class T>
void product(int64_t count, int64_t rows, int64_t columns, int64_t depth, Matrix<T> a,
             Matrix<T> b, float alpha, bool accumulate, Result out);

}  // namespace medfast
