// Sums of features, each times a weight, where weights are computed 32 x 32 at a time and never
// written as a whole.

#pragma once

#include <algorithm>
#include <cstdint>

#include "bf16.h"
#include "instruction_set.h"
#include "panels.h"
#include "threads.h"

namespace medfast {

// So many terms at a time, packed, stay in the second level of cache with so many sums.
constexpr int64_t kTermsAtATime = 256;
constexpr int64_t kTermSteps = kTermsAtATime / kStepDepth;
constexpr int64_t kMostSums = 1 << 18;

// out_i = alpha * sum_j w_ij features_j, or adds it: features [terms, depth] and out [rows, depth],
// contiguous. weigh(i, j, steps, to) writes the weights of rows i to i + 31 and the terms from j on as steps of
// a panel of a, finite beyond the end. Sums take their terms in order, whatever the number of
// threads.
template <class Out, class Weigh>
void weighted_sums(int64_t rows, int64_t terms, int64_t depth, const bf16* features, float alpha,
                   bool accumulate, Out* out, const Weigh& weigh) {
  const Multiply multiply = chosen_multiply<bf16>();
  const int64_t panels = ceil_div(depth, kPanel);
  const int64_t blocks = ceil_div(terms, kTermsAtATime);
  const int64_t block_size = panels * kTermSteps * kTermSize;
  const int64_t sums_size = panels * kPanel * kPanel;
  const int64_t fair = ceil_div(rows, kPanel * kTasksPerThread * threads());
  const int64_t task_rows = kPanel * std::clamp<int64_t>(kMostSums / sums_size, 1, fair);
  uint32_t* packed = memory_of_b(blocks * block_size);
#pragma omp parallel
  {
    uint32_t* weights = memory_of_a(kTermSteps * kTermSize + task_rows / kPanel * sums_size);
    float* sums = reinterpret_cast<float*>(weights + kTermSteps * kTermSize);
    const TileRegisters while_it_runs;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = block * kTermsAtATime;
        const int64_t k = panel * kPanel;
        pack(Lines<bf16>{features + first * depth + k, 1, depth}, depth - k,
             std::min(kTermsAtATime, terms - first), false,
             packed + block * block_size + panel * kTermSteps * kTermSize);
      }
#pragma omp for schedule(dynamic)
    for (int64_t top = 0; top < rows; top += task_rows) {
      const int64_t bottom = std::min(rows, top + task_rows);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kTermsAtATime;
        const int64_t steps = ceil_div(std::min(kTermsAtATime, terms - first), kStepDepth);
        for (int64_t i = top; i < bottom; i += kPanel) {
          weigh(i, first, steps, weights);
          for (int64_t panel = 0; panel < panels; ++panel)
            multiply(weights, packed + block * block_size + panel * kTermSteps * kTermSize, steps,
                     std::min(kPanel, bottom - i), std::min(kPanel, depth - panel * kPanel),
                     block > 0,
                     sums + (i - top) / kPanel * sums_size + panel * kPanel * kPanel, kPanel);
        }
      }
      for (int64_t i = top; i < bottom; i += kPanel)
        for (int64_t k = 0; k < depth; k += kPanel)
          run<write_panel<Out>>(
              static_cast<const float*>(sums + (i - top) / kPanel * sums_size + k * kPanel),
              std::min(kPanel, bottom - i), std::min(kPanel, depth - k), alpha, accumulate,
              out + i * depth + k, depth);
    }
  }
  // All features are packed at once.
  release_large_memory_of_b();
}

}  // namespace medfast
