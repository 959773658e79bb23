// Products of bf16 matrices with results in fp32; torch's own are rounded to bf16.

#pragma once

#include <cstdint>

#include "bf16_panels.h"

namespace medfast {

// Row i is at data + i * row_stride. Of several matrices, each begins `next` entries behind the
// one before.
struct FloatMatrix {
  float* data;
  int64_t row_stride;
  int64_t next;
};

// out = alpha * a @ b, or that added to it, of `count` products: a [rows, depth], b [depth,
// columns], out [rows, columns]. The order of sums does not depend on the number of threads.
void bf16_product(int64_t count, int64_t rows, int64_t columns, int64_t depth, Bf16Matrix a,
                  Bf16Matrix b, float alpha, bool accumulate, FloatMatrix out);

}  // namespace medfast
