// Products of matrices of bf16 or fp32, with sums in fp32, 32 x 32 entries at a time: what is done
// with them finds them in cache.

#pragma once

#include <algorithm>
#include <cstdint>

#include "bf16.h"

namespace medfast {

// Entry (i, j) is at data + i * row_stride + j * column_stride; fast where one of the two is 1. Of
// several matrices, each begins `next` entries behind the one before.
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;
  int64_t next;
};

// Processors that have AMX multiply bf16 more than twenty times as fast as fp32. So fp32 is taken
// as the sum of three terms of bf16, which it is exactly, each at most 2^-8 of the one before. Of
// the products of terms, those of term p and term q with p + q < kTerms count: six of nine; what
// is left out is at most 2^-23 of the product, two roundings to fp32.
template <class T>
constexpr int64_t kTerms = 1;
template <>
constexpr int64_t kTerms<float> = 3;

// Operands are packed as AMX takes them: tiles of 16 lines (rows of a, columns of b) by 16 pairs of
// neighbours in depth, 32 bits each; in a tile of a each row is a line, in one of b it is a pair.
// A panel is two lines of tiles side by side, and a step 32 entries of its depth: the two tiles of
// the first term, then those of the next.
constexpr int64_t kTile = 16;
constexpr int64_t kTileSize = kTile * kTile;
constexpr int64_t kPanel = 2 * kTile;
constexpr int64_t kStepDepth = 2 * kTile;
constexpr int64_t kTermSize = 2 * kTileSize;
template <class T>
constexpr int64_t kStepSize = kTerms<T> * kTermSize;
// So many steps of a panel of a stay near while the same of so many panels of b pass by. These stay
// in the second level of cache while a block of rows does, if not deeper than kPanelDepth.
template <class T>
constexpr int64_t kStepsAtATime = kTerms<T> == 1 ? 8 : 16;
template <class T>
constexpr int64_t kPanelsAtATime = kTerms<T> == 1 ? 16 : 4;
constexpr int64_t kPanelDepth = 512;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the lines of an operand are: entry k of line i is at data + i * next_line + k * next.
template <class T>
struct Lines {
  const T* data;
  int64_t next_line;
  int64_t next;
};

// Packs a panel, zero where there is nothing: of a, `is_by_line`, or of b.
template <class T>
void pack(Lines<T> from, int64_t lines, int64_t depth, bool is_by_line, uint32_t* to);

// Writes a product of two panels, [kPanel, kPanel], rows `stride` apart, or adds it. Only `rows`
// and `columns` of it are wanted; the rest is zero, or as it was.
using Multiply = void (*)(const uint32_t* a, const uint32_t* b, int64_t steps, int64_t rows,
                          int64_t columns, bool accumulate, float* to, int64_t stride);
template <class T>
Multiply chosen_multiply();

inline int64_t whole_panels(int64_t lines) { return ceil_div(lines, kPanel) * kPanel; }
// How many entries the panels of an operand have, packed.
template <class T>
int64_t packed_entries(int64_t lines, int64_t depth) {
  return ceil_div(lines, kPanel) * ceil_div(depth, kStepDepth) * kStepSize<T>;
}
// Packs them, one behind the other.
template <class T>
void pack_all(Lines<T> from, int64_t lines, int64_t depth, bool is_by_line, uint32_t* to);
// Writes a product of such operands, or adds it, in whole panels.
template <class T>
void multiply_all(const uint32_t* a, const uint32_t* b, int64_t rows, int64_t columns,
                  int64_t depth, bool accumulate, float* to, int64_t stride);

// Writes the wanted part of a product of two panels, times alpha, to out, or adds it.
template <class Out>
MEDFAST_KERNEL void write_panel(const float* product, int64_t rows, int64_t columns, float alpha,
                                bool accumulate, Out* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, product += kPanel, out += stride) {
    if (!accumulate) {
      store_all(product, alpha, columns, out);
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) store(load(out + j) + alpha * product[j], out + j);
  }
}

// While it lives, this thread's tile registers have the shape that products need.
class TileRegisters {
 public:
  TileRegisters();
  ~TileRegisters();
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Memory of this thread for so many entries, of panels of either side. It is kept from call to
// call: fresh pages cost as much as what is written there.
uint32_t* memory_of_a(int64_t size);
uint32_t* memory_of_b(int64_t size);
// Ends this for memory that is much larger than most calls need.
void release_large_memory_of_b();

// How products are divided among threads: what one takes at a time, in whole panels, and the depth
// that is summed before `use` sees it.
struct Blocks {
  int64_t rows;
  int64_t depth;
};

// Calls use(product, which, i, j, height, width, is_first) for each [height, width] part, at
// (i, j), of each of `count` products a @ b, a [rows, depth], b [depth, columns]. Rows of `product`
// are kPanel apart; it may be overwritten. Where blocks are less deep, use is called for one after
// the other, behind a barrier, first with is_first. No sum depends on the number of threads.
template <class T, class Use>
void for_each_product(int64_t count, int64_t rows, int64_t columns, int64_t depth, Matrix<T> a,
                      Matrix<T> b, Blocks blocks, const Use& use) {
  const Multiply multiply = chosen_multiply<T>();
  constexpr int64_t kMostPanels = kPanelsAtATime<T>;
  constexpr int64_t kMostSteps = kStepsAtATime<T>;
  const int64_t panels = ceil_div(columns, kPanel);
  const int64_t row_blocks = ceil_div(rows, blocks.rows);
  const int64_t most_steps = ceil_div(std::min(blocks.depth, depth), kStepDepth);
  const int64_t panel_size = most_steps * kStepSize<T>;
  uint32_t* packed_b = memory_of_b(count * panels * panel_size);
#pragma omp parallel
  {
    uint32_t* packed_a = memory_of_a(ceil_div(blocks.rows, kPanel) * panel_size);
    alignas(64) float products[kMostPanels * kPanel * kPanel];
    const TileRegisters while_it_runs;
    for (int64_t k = 0; k < depth; k += most_steps * kStepDepth) {
      const int64_t part = std::min(most_steps * kStepDepth, depth - k);
      const int64_t steps = ceil_div(part, kStepDepth);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * panels; ++i) {
        const int64_t j = i % panels * kPanel;
        const Lines<T> from{b.data + i / panels * b.next + k * b.row_stride + j * b.column_stride,
                         b.column_stride, b.row_stride};
        pack(from, columns - j, part, false, packed_b + i * panel_size);
      }
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < count * row_blocks; ++t) {
        const int64_t which = t / row_blocks;
        const int64_t top = t % row_blocks * blocks.rows;
        const int64_t bottom = std::min(rows, top + blocks.rows);
        for (int64_t i = top; i < bottom; i += kPanel) {
          const Lines<T> from{a.data + which * a.next + i * a.row_stride + k * a.column_stride,
                           a.row_stride, a.column_stride};
          pack(from, bottom - i, part, true, packed_a + (i - top) / kPanel * panel_size);
        }
        for (int64_t first = 0; first < panels; first += kMostPanels)
          for (int64_t i = top; i < bottom; i += kPanel) {
            const int64_t last = std::min(panels, first + kMostPanels);
            const int64_t height = std::min(kPanel, bottom - i);
            const uint32_t* left_panel = packed_a + (i - top) / kPanel * panel_size;
            for (int64_t step = 0; step < steps; step += kMostSteps)
              for (int64_t panel = first; panel < last; ++panel)
                multiply(left_panel + step * kStepSize<T>,
                         packed_b + (which * panels + panel) * panel_size + step * kStepSize<T>,
                         std::min(kMostSteps, steps - step), height,
                         std::min(kPanel, columns - panel * kPanel), step > 0,
                         products + (panel - first) * kPanel * kPanel, kPanel);
            for (int64_t panel = first; panel < last; ++panel)
              use(products + (panel - first) * kPanel * kPanel, which, i, panel * kPanel, height,
                  std::min(kPanel, columns - panel * kPanel), k == 0);
          }
      }
    }
  }
}

}  // namespace medfast
