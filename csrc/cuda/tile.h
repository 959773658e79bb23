// One tile of 128 x 128 logits: which one a block computes, where the features of it lie in shared
// memory, which entries of it a thread holds, and how threads of a warp add theirs up.

#pragma once

#include <cstdint>

#include "arithmetic/host_device.h"
#include "cuda/instructions.h"

namespace medfast::cuda {

constexpr int kTile = 128;
// Features are multiplied so many at a time. A slab [128, 64] of 16-bit features has 16 KiB.
constexpr int kSlab = 64;
constexpr int kSlabBytes = kTile * kSlab * 2;
// Entries that are copied at a time: 16 bytes.
constexpr int kChunk = 8;

// Which entries of one tile exist and which are own ones, by their place in the tile.
struct Mask {
  int rows, columns, offset;

  // Neither an own entry nor an edge, as nearly all tiles.
  MEDFAST_HD bool is_plain() const {
    return rows == kTile && columns == kTile && (offset >= kTile || offset <= -kTile);
  }
  MEDFAST_HD bool exists(int i, int j) const { return i < rows && j < columns; }
  MEDFAST_HD bool is_own(int i, int j) const { return i + offset == j; }
};

// What a launch covers of the logits of M rows and N columns, in whole tiles but for the last.
// Row i's own column is i + offset. Each row of tiles is done by `parts` blocks.
struct Rectangle {
  int64_t M, N, D, offset;
  int64_t row_start, row_stop, column_start, column_stop;
  int64_t parts;

  MEDFAST_HD int64_t row_blocks() const { return (row_stop - row_start + kTile - 1) / kTile; }
  MEDFAST_HD int64_t column_blocks() const {
    return (column_stop - column_start + kTile - 1) / kTile;
  }
  MEDFAST_HD int slabs() const { return static_cast<int>((D + kSlab - 1) / kSlab); }

  // Of the tile whose first entry is at `row`, `column`.
  MEDFAST_HD Mask mask(int64_t row, int64_t column) const {
    return {within(M - row), within(N - column), within(row + offset - column)};
  }

  // What is a tile away or further is all the same.
  MEDFAST_HD static int within(int64_t x) {
    return static_cast<int>(x > kTile ? kTile : x < -kTile ? -kTile : x);
  }
};

// What one block does: the tiles of a row of tiles from `first` to before `last`. Blocks that run
// at the same time have the same columns, which they share in the second-level cache. Rows of tiles
// come in pairs, say, where `together` is 2: then the last of them may not exist.
struct Unit {
  int64_t row_block, part, first, last;
  bool exists;

  MEDFAST_HD Unit(const Rectangle& r, int64_t block, int together = 1)
      : row_block(block % height(r, together)),
        part(block / height(r, together)),
        first(part * r.column_blocks() / r.parts),
        last((part + 1) * r.column_blocks() / r.parts),
        exists(row_block < r.row_blocks()) {}
  MEDFAST_HD int64_t row(const Rectangle& r) const { return r.row_start + row_block * kTile; }

  MEDFAST_HD static int64_t height(const Rectangle& r, int together) {
    return (r.row_blocks() + together - 1) / together * together;
  }
};

// Where 16 bytes of a slab lie. Chunks are permuted by their row, so that the same chunk of eight
// rows falls into different banks; it is the pattern that the hardware calls 128-byte swizzle.
MEDFAST_HD constexpr int swizzled(int row, int chunk) {
  return row * 2 * kSlab + ((chunk ^ (row & 7)) << 4);
}

// How a matrix in shared memory with that pattern is named to the products of sm_90a: address / 16,
// 1024 bytes from eight rows to the next eight, the pattern's number. k counts steps of 16 features.
MEDFAST_HD constexpr uint64_t descriptor(uint32_t address, int k) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) + 2 * static_cast<uint64_t>(k) +
         (uint64_t{1} << 16) + (uint64_t{1024 >> 4} << 32) + (uint64_t{1} << 62);
}

// Which entries of a tile a thread holds: kM x kN pieces of 16 x 8, of which entry 2 h + c is in
// row lane / 4 + 8 h and column 2 (lane % 4) + c. kColumnLayers warps have the same columns,
// kRowLayers the same rows.
template <int kM_, int kN_, int kStep_, int kColumnLayers_, int kRowLayers_, int kThreads_>
struct Layout {
  static constexpr int kM = kM_, kN = kN_, kStep = kStep_;
  static constexpr int kColumnLayers = kColumnLayers_, kRowLayers = kRowLayers_;
  // That share tiles and scratch memory.
  static constexpr int kThreads = kThreads_;

  using Accumulators = float[kM][kN][4];

  int thread, lane, first_row, first_column, column_layer, row_layer;

  MEDFAST_HD int row(int m, int h) const { return first_row + kStep * m + lane / 4 + 8 * h; }
  MEDFAST_HD int column(int n, int c) const { return first_column + 8 * n + 2 * (lane % 4) + c; }
  // The column of the i-th number that `sum_over_rows` leaves to a thread.
  MEDFAST_HD int summed_column(int i) const {
    const int index = (lane / 16 % 2) * kN + (lane / 8 % 2) * kN / 2 + (lane / 4 % 2) * kN / 4 + i;
    return column(index / 2, index % 2);
  }
};

// Eight warps, two above another and four beside one another, of 64 x 32 each.
struct BlockLayout : Layout<4, 4, 16, 2, 4, 256> {
  MEDFAST_HD explicit BlockLayout(int index)
      : Layout{index,         index % 32,       index / 128 * 64, index / 32 % 4 * 32,
               index / 128, index / 32 % 4} {}
};

// Each of two groups of four warps has tiles of its own; a warp has rows 16 w.. and 64 + 16 w...
struct GroupLayout : Layout<2, 16, 64, 4, 2, 128> {
  MEDFAST_HD explicit GroupLayout(int index)
      : Layout{index % 128,      index % 32,       index / 32 % 4 * 16, 0,
               index / 32 % 4, index / 128} {}
};

// Adds up numbers of a warp's threads that lie in the same columns, kN * 2 a thread; kN / 4 remain.
template <int kN>
MEDFAST_DEVICE void sum_over_rows(float (&values)[2 * kN], int lane) {
#pragma unroll
  for (int mask = 16, half = kN; mask >= 4; mask /= 2, half /= 2) {
    const bool is_upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i >= half) continue;
      const float kept = is_upper ? values[i + half] : values[i];
      const float given = is_upper ? values[i] : values[i + half];
      values[i] = kept + shuffle_xor(given, mask);
    }
  }
}

// Adds up over the four threads that hold the same row.
MEDFAST_DEVICE float sum_over_columns(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// Of four pieces side by side a thread holds a pair of columns of each; it comes to hold the four
// pairs of one of them, piece lane % 4.
MEDFAST_DEVICE void transpose_pairs(uint32_t (&pairs)[4], int lane) {
  const bool is_odd = (lane & 1) != 0;
  const bool is_upper = (lane & 2) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = shuffle_xor(is_odd ? pairs[i] : pairs[i + 1], 1);
    pairs[i] = is_odd ? received : pairs[i];
    pairs[i + 1] = is_odd ? pairs[i + 1] : received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = shuffle_xor(is_upper ? pairs[i] : pairs[i + 2], 2);
    pairs[i] = is_upper ? received : pairs[i];
    pairs[i + 2] = is_upper ? pairs[i + 2] : received;
  }
}

}  // namespace medfast::cuda
