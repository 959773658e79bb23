#include "product.h"

#include <algorithm>
#include <type_traits>

#include "bf16.h"
#include "instruction_set.h"
#include "threads.h"

namespace medfast {
namespace {

// What stays in the second level of cache.
constexpr int64_t kMostColumns = 2048;
constexpr int64_t kMostRows = 256;
// So that no thread waits long for the others.
constexpr int64_t kTasksPerThread = 4;

}  // namespace

template <class T, class Out>
void product(int64_t count, int64_t rows, int64_t columns, int64_t depth, Matrix<T> a,
             Matrix<T> b, float alpha, bool accumulate, Result<Out> out) {
  // Of about equal depth, in whole steps; but no sum is rounded to 16 bits before it is complete.
  const bool is_summed_there = std::is_same_v<Out, float>;
  const int64_t steps = ceil_div(depth, kStepDepth);
  const int64_t block_depth =
      is_summed_there ? kStepDepth * ceil_div(steps, ceil_div(depth, kPanelDepth)) : depth;
  const int64_t shares = std::max<int64_t>(ceil_div(kTasksPerThread * threads(), count), 1);
  const int64_t block_rows = std::min(kMostRows, kPanel * ceil_div(rows, kPanel * shares));
  // So much of b is packed at a time.
  for (int64_t left = 0; left < columns; left += kMostColumns) {
    const Matrix<T> band{b.data + left * b.column_stride, b.row_stride, b.column_stride, b.next};
    for_each_product(count, rows, std::min(kMostColumns, columns - left), depth, a, band,
                     {block_rows, block_depth},
                     [&](const float* part, int64_t which, int64_t i, int64_t j, int64_t height,
                         int64_t width, bool is_first) {
                       run<write_panel<Out>>(
                           part, height, width, alpha, accumulate || !is_first,
                           out.data + which * out.next + i * out.row_stride + left + j,
                           out.row_stride);
                     });
  }
}

template void product(int64_t, int64_t, int64_t, int64_t, Matrix<bf16>, Matrix<bf16>, float, bool,
                      Result<float>);
template void product(int64_t, int64_t, int64_t, int64_t, Matrix<bf16>, Matrix<bf16>, float, bool,
                      Result<bf16>);
template void product(int64_t, int64_t, int64_t, int64_t, Matrix<float>, Matrix<float>, float,
                      bool, Result<float>);

}  // namespace medfast
