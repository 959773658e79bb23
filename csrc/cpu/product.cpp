#include "product.h"

#include <algorithm>

#include "bf16.h"
#include "instruction_set.h"
#include "threads.h"

namespace medfast {
namespace {

// What stays in the second level of cache.
constexpr int64_t kMostColumns = 2048;
constexpr int64_t kMostRows = 256;

}  // namespace

template <class T>
void product(int64_t count, int64_t rows, int64_t columns, int64_t depth, Matrix<T> a,
             Matrix<T> b, float alpha, bool accumulate, Result out) {
  // Of about equal depth, in whole steps.
  const int64_t steps = ceil_div(depth, kStepDepth);
  const int64_t block_depth = kStepDepth * ceil_div(steps, ceil_div(depth, kPanelDepth));
  const int64_t shares = std::max<int64_t>(ceil_div(kTasksPerThread * threads(), count), 1);
  const int64_t block_rows = std::min(kMostRows, kPanel * ceil_div(rows, kPanel * shares));
  // So much of b is packed at a time.
  for (int64_t left = 0; left < columns; left += kMostColumns) {
    const Matrix<T> band{b.data + left * b.column_stride, b.row_stride, b.column_stride, b.next};
    for_each_product(count, rows, std::min(kMostColumns, columns - left), depth, a, band,
                     {block_rows, block_depth},
                     [&](const float* part, int64_t which, int64_t i, int64_t j, int64_t height,
                         int64_t width, bool is_first) {
                       run<write_panel<float>>(
                           part, height, width, alpha, accumulate || !is_first,
                           out.data + which * out.next + i * out.row_stride + left + j,
                           out.row_stride);
                     });
  }
}

template void product(int64_t, int64_t, int64_t, int64_t, Matrix<bf16>, Matrix<bf16>, float, bool,
                      Result);
template void product(int64_t, int64_t, int64_t, int64_t, Matrix<float>, Matrix<float>, float, bool,
                      Result);

}  // namespace medfast
