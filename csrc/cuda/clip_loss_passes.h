// What clip_loss does with the accumulators of a tile: passes that the two ways to multiply share.
// A pass lives in a thread for all tiles of its block: `prepare` before a tile's product, `take`
// with it, `finish` after the last tile. Between a `prepare` and its `take` the threads that share
// scratch memory all meet; between a `take` and the next `prepare` they need not.

#pragma once

#include "arithmetic/clip_loss.h"
#include "arithmetic/log_sum_exp.h"
#include "cuda/tile.h"

namespace medfast::cuda {

struct ClipLossSumsArguments {
  const float* scale;
  float* row_partials;     // [parts, row_stride]
  float* column_partials;  // [row blocks, N]
  int64_t row_stride;
};

// The sums of e^(l - shift) along rows and columns, own entries left out.
template <class Layout>
class ClipLossSums {
 public:
  using Arguments = ClipLossSumsArguments;
  struct Scratch {
    float columns[Layout::kColumnLayers][kTile];
  };
  // What blocks add up in the end.
  struct Last {
    float rows[Layout::kRowLayers][kTile];
  };

  MEDFAST_DEVICE ClipLossSums(const Arguments& arguments, const Rectangle& rectangle,
                              const Unit& unit, const Layout& place, Scratch& scratch)
      : arguments_(arguments),
        r_(rectangle),
        unit_(unit),
        place_(place),
        scratch_(scratch),
        factor_(*arguments.scale * kLog2E<float>),
        shift_(clip_loss_shift(*arguments.scale)) {}

  template <class Sync>
  MEDFAST_DEVICE void take(const typename Layout::Accumulators& products, int64_t row,
                           int64_t column, const Sync& sync) {
    float columns[2 * Layout::kN] = {};
    const Mask mask = r_.mask(row, column);
    if (mask.is_plain())
      add<true>(products, mask, columns);
    else
      add<false>(products, mask, columns);
    sum_over_rows<Layout::kN>(columns, place_.lane);
#pragma unroll
    for (int i = 0; i < Layout::kN / 4; ++i)
      scratch_.columns[place_.column_layer][place_.summed_column(i)] = columns[i];
    sync();
    const int64_t own = column + place_.thread;
    if (place_.thread < kTile && own < r_.N) {
      float sum = 0;
#pragma unroll
      for (int layer = 0; layer < Layout::kColumnLayers; ++layer)
        sum += scratch_.columns[layer][place_.thread];
      arguments_.column_partials[unit_.row_block * r_.N + own] = sum;
    }
  }

  MEDFAST_DEVICE void prepare(int64_t) {}

  template <class Sync>
  MEDFAST_DEVICE void finish(Last& last, int thread, const Sync& sync) {
#pragma unroll
    for (int m = 0; m < Layout::kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_over_columns(rows_[m][h]);
        if (place_.lane % 4 == 0) last.rows[place_.row_layer][place_.row(m, h)] = sum;
      }
    sync();
    if (thread < kTile && unit_.row(r_) + thread < r_.M) {
      float sum = 0;
#pragma unroll
      for (int layer = 0; layer < Layout::kRowLayers; ++layer) sum += last.rows[layer][thread];
      arguments_.row_partials[unit_.part * arguments_.row_stride + unit_.row_block * kTile +
                              thread] = sum;
    }
  }

 private:
  template <bool kIsPlain>
  MEDFAST_DEVICE void add(const typename Layout::Accumulators& products, const Mask& mask,
                          float (&columns)[2 * Layout::kN]) {
#pragma unroll
    for (int m = 0; m < Layout::kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < Layout::kN; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float e = power_of_two(products[m][n][2 * h + c] * factor_ - shift_);
            if constexpr (!kIsPlain) {
              const int i = place_.row(m, h), j = place_.column(n, c);
              e = mask.exists(i, j) && !mask.is_own(i, j) ? e : 0.0f;
            }
            sum += e;
            columns[2 * n + c] += e;
          }
        rows_[m][h] += sum;
      }
  }

  const Arguments& arguments_;
  const Rectangle& r_;
  const Unit& unit_;
  const Layout& place_;
  Scratch& scratch_;
  const float factor_, shift_;
  float rows_[Layout::kM][2] = {};
};

struct ClipLossOnlineArguments {
  const float* scale;
  float* lse;
  const int* flags;
  int64_t flag_count;
};

// The log-sum-exps of rows alone, with a running maximum: exact for every batch.
template <class Layout>
class ClipLossOnline {
 public:
  using Arguments = ClipLossOnlineArguments;
  struct Scratch {};
  struct Last {
    LogSum<float> rows[Layout::kRowLayers][kTile];
  };

  MEDFAST_DEVICE ClipLossOnline(const Arguments& arguments, const Rectangle& rectangle,
                                const Unit& unit, const Layout& place, Scratch&)
      : arguments_(arguments),
        r_(rectangle),
        unit_(unit),
        place_(place),
        factor_(*arguments.scale * kLog2E<float>) {}

  MEDFAST_DEVICE void prepare(int64_t) {}

  template <class Sync>
  MEDFAST_DEVICE void take(const typename Layout::Accumulators& products, int64_t row,
                           int64_t column, const Sync&) {
    const Mask mask = r_.mask(row, column);
    const bool is_plain = mask.is_plain();
#pragma unroll
    for (int m = 0; m < Layout::kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float logits[2 * Layout::kN];
        float highest = -INFINITY;
#pragma unroll
        for (int n = 0; n < Layout::kN; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float x = products[m][n][2 * h + c] * factor_;
            if (!is_plain) {
              const int i = place_.row(m, h), j = place_.column(n, c);
              x = mask.exists(i, j) && !mask.is_own(i, j) ? x : -INFINITY;
            }
            logits[2 * n + c] = x;
            highest = fmaxf(highest, x);
          }
        const float shift = highest == -INFINITY ? 0.0f : highest;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 2 * Layout::kN; ++i) sum += power_of_two(logits[i] - shift);
        rows_[m][h].merge({highest, sum});
      }
  }

  template <class Sync>
  MEDFAST_DEVICE void finish(Last& last, int thread, const Sync& sync) {
#pragma unroll
    for (int m = 0; m < Layout::kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        LogSum<float> sum = rows_[m][h];
#pragma unroll
        for (int mask = 1; mask <= 2; mask *= 2)
          sum.merge({shuffle_xor(sum.highest, mask), shuffle_xor(sum.sum, mask)});
        if (place_.lane % 4 == 0) last.rows[place_.row_layer][place_.row(m, h)] = sum;
      }
    sync();
    const int64_t row = unit_.row(r_) + thread;
    if (thread < kTile && row < r_.M) {
      LogSum<float> sum;
#pragma unroll
      for (int layer = 0; layer < Layout::kRowLayers; ++layer) sum.merge(last.rows[layer][thread]);
      arguments_.lse[row] = sum.value();
    }
  }

 private:
  const Arguments& arguments_;
  const Rectangle& r_;
  const Unit& unit_;
  const Layout& place_;
  const float factor_;
  LogSum<float> rows_[Layout::kM][2] = {};
};

// What scales the gradient of the logits, from `clip_loss_range`.
struct ClipLossNormalisers {
  float factor, inverse, is_exact;
};

template <class Feature>
struct ClipLossGradientArguments {
  const float* scale;
  const float* row_lse;
  const float* column_lse;
  const float* d_own;
  const float* d_rows;
  const float* d_columns;
  const ClipLossNormalisers* normalisers;
  Feature* gradient;  // [row blocks * 128, stride], with room for whole tiles
  double* sums;       // one per block
  int64_t stride;
};

// The normalised gradient of the logits, rounded, and the sum of the unrounded one with the
// products.
template <class Layout, class Feature>
class ClipLossGradient {
 public:
  using Arguments = ClipLossGradientArguments<Feature>;
  // Two tiles' columns, so that one may be read while the next is written.
  struct Scratch {
    ClipLossSide<float> rows[kTile];
    ClipLossSide<float> columns[2][kTile];
  };
  struct Last {
    double sums[2 * kTile];
  };

  MEDFAST_DEVICE ClipLossGradient(const Arguments& arguments, const Rectangle& rectangle,
                                  const Unit& unit, const Layout& place, Scratch& scratch)
      : arguments_(arguments),
        r_(rectangle),
        unit_(unit),
        place_(place),
        scratch_(scratch),
        factor_(*arguments.scale * kLog2E<float>),
        shift_(clip_loss_shift(*arguments.scale)),
        normaliser_(arguments.normalisers->factor),
        is_exact_(arguments.normalisers->is_exact != 0) {
    if (place.thread < kTile)
      scratch.rows[place.thread] = side(arguments.row_lse, arguments.d_rows,
                                        unit.row(rectangle) + place.thread, rectangle.M);
  }

  MEDFAST_DEVICE void prepare(int64_t column) {
    turn_ ^= 1;
    if (place_.thread < kTile)
      scratch_.columns[turn_][place_.thread] =
          side(arguments_.column_lse, arguments_.d_columns, column + place_.thread, r_.N);
  }

  template <class Sync>
  MEDFAST_DEVICE void take(const typename Layout::Accumulators& products, int64_t row,
                           int64_t column, const Sync& sync) {
    sync();
    // Of this thread's first row, and of the pieces of 16 bytes that it stores.
    Feature* corner = arguments_.gradient +
                      (row - r_.row_start + place_.row(0, 0)) * arguments_.stride + column -
                      r_.column_start + place_.first_column + 8 * (place_.lane % 4);
    const Mask mask = r_.mask(row, column);
    // Asked for each entry: two bodies, one for plain tiles, would take more registers than there are.
    const bool is_plain = mask.is_plain();
    store(products, mask, is_plain, row, corner);
  }

  template <class Sync>
  MEDFAST_DEVICE void finish(Last& last, int thread, const Sync& sync) {
    last.sums[thread] = total_;
    // Halves, in a fixed order.
    for (int half = kTile; half >= 1; half /= 2) {
      sync();
      if (thread < half) last.sums[thread] += last.sums[thread + half];
    }
    if (thread == 0)
      arguments_.sums[unit_.part * r_.row_blocks() + unit_.row_block] = last.sums[0];
  }

 private:
  MEDFAST_DEVICE void store(const typename Layout::Accumulators& products, const Mask& mask,
                            bool is_plain, int64_t row, Feature* corner) {
    const auto& columns = scratch_.columns[turn_];
    float sum = 0;
#pragma unroll
    for (int m = 0; m < Layout::kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = place_.row(m, h);
        const ClipLossSide<float> of_row = scratch_.rows[i];
        Feature* line = corner + (Layout::kStep * m + 8 * h) * arguments_.stride;
#pragma unroll
        for (int first = 0; first < Layout::kN; first += 4) {
          uint32_t pairs[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            float both[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float product = products[m][first + n][2 * h + c];
              const int j = place_.column(first + n, c);
              float g = clip_loss_logit_gradient(product * factor_, shift_, of_row, columns[j],
                                                 is_exact_);
              if (!is_plain) {
                const bool exists = mask.exists(i, j);
                // In fp32, before rounding: what a pair that wins by far leaves to the others is
                // tiny.
                if (exists && mask.is_own(i, j)) g = arguments_.d_own[row + i] * normaliser_;
                g = exists ? g : 0.0f;
              }
              sum += g * product;
              both[c] = g;
            }
            pairs[n] = packed<Feature>(both[0], both[1]);
          }
          transpose_pairs(pairs, place_.lane);
          store_16(line + 8 * first, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
    total_ += sum;
  }

  MEDFAST_DEVICE ClipLossSide<float> side(const float* lse, const float* d_lse, int64_t index,
                                          int64_t count) const {
    if (index >= count) return {0, 0};
    return clip_loss_side(lse[index], d_lse[index] * normaliser_, shift_, is_exact_);
  }

  const Arguments& arguments_;
  const Rectangle& r_;
  const Unit& unit_;
  const Layout& place_;
  Scratch& scratch_;
  const float factor_, shift_, normaliser_;
  const bool is_exact_;
  double total_ = 0;
  int turn_ = 1;
};

}  // namespace medfast::cuda
