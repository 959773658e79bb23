// The small kernels of clip_loss around those that multiply: partial sums to log-sum-exps, and what
// normalises the gradient.

#pragma once

#include "cuda/clip_loss_passes.h"

namespace medfast::cuda {

constexpr int kSumThreads = kTile;
constexpr int kRangeThreads = 1024;
// Gradients are divided by their largest, so that what multiplies them fits any dtype; below this
// they count as zero.
constexpr float kLeastGradient = 0x1p-110f;

template <class Feature>
struct ClipLossEnds {
  const Feature* rows;
  const Feature* columns;
  const float* scale;
  const float* row_partials;
  const float* column_partials;
  int64_t row_stride;
  float* own;
  float* row_lse;
  float* column_lse;
  int* flags;  // one for each block of rows of all M, then one for each of columns
};

// One of the log-sum-exps that a block of 128 threads stores, and its flag: whether any of the sums
// is not what one shift gives exactly.
MEDFAST_DEVICE void store_log_sum_exp(float* lse, bool exists, double sum, float scale,
                                      float terms, int* flag) {
  const float rounded = static_cast<float>(sum);
  if (exists) *lse = (log_of_two(rounded) + clip_loss_shift(scale)) * kLn2<float>;
  const bool suits = !exists || clip_loss_suits(rounded, terms);
  const bool is_misfit = sync_any(!suits || !clip_loss_scale_suits(scale));
  if (thread_index() == 0) *flag = is_misfit ? 1 : 0;
}

// Adds numbers that lie `stride` apart, in their order; in fp64 the roundings do not add up.
MEDFAST_DEVICE double sum_of_partials(const float* partials, int64_t count, int64_t stride) {
  double sum = 0;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) sum += partials[i * stride];
  return sum;
}

// The first blocks have 128 rows each, and their own logits; the others have 128 columns each,
// whose sums grow from launch to launch and become log-sum-exps after the last rows.
template <class Feature>
MEDFAST_DEVICE void clip_loss_end(const Rectangle& r, const ClipLossEnds<Feature>& ends) {
  const int thread = thread_index();
  const int64_t block = block_index();
  const float scale = *ends.scale;
  const float terms = static_cast<float>(r.M > r.N ? r.M : r.N);
  if (block >= r.row_blocks()) {
    const int64_t strip = block - r.row_blocks();
    const int64_t column = strip * kTile + thread;
    const bool exists = column < r.N;
    double sum = 0;
    if (exists) {
      sum = sum_of_partials(ends.column_partials + column, r.row_blocks(), r.N);
      if (r.row_start > 0) sum += ends.column_lse[column];
    }
    if (r.row_stop == r.M)
      store_log_sum_exp(ends.column_lse + column, exists, sum, scale, terms,
                        ends.flags + (r.M + kTile - 1) / kTile + strip);
    else if (exists)
      ends.column_lse[column] = static_cast<float>(sum);
    return;
  }
  const int64_t first = r.row_start + block * kTile;
  const bool exists = first + thread < r.M;
  double sum = 0;
  if (exists)
    sum = sum_of_partials(ends.row_partials + block * kTile + thread, r.parts, ends.row_stride);
  store_log_sum_exp(ends.row_lse + first + thread, exists, sum, scale, terms,
                    ends.flags + first / kTile);
  // A warp for each row.
  for (int local = thread / 32; local < kTile; local += kSumThreads / 32) {
    const int64_t row = first + local, column = row + r.offset;
    if (row >= r.M) break;
    const bool has_own = column >= 0 && column < r.N;
    float product = 0;
    if (has_own)
      for (int64_t k = thread % 32; k < r.D; k += 32)
        product += to_float(ends.rows[row * r.D + k]) * to_float(ends.columns[column * r.D + k]);
#pragma unroll
    for (int mask = 16; mask >= 1; mask /= 2) product += shuffle_xor(product, mask);
    if (thread % 32 == 0) ends.own[row] = has_own ? product * scale : -INFINITY;
  }
}

struct ClipLossRange {
  const float* scale;
  const float* row_lse;
  const float* column_lse;
  const float* d_own;
  const float* d_rows;
  const float* d_columns;
  ClipLossNormalisers* normalisers;
  int64_t M, N;
  float boost;  // the power of two that brings gradients of at most about 1 into a dtype's range
};

// One block reads M + N numbers a few times.
MEDFAST_DEVICE void clip_loss_range(const ClipLossRange& range, float (&shared)[32]) {
  const int thread = thread_index();
  const float scale = *range.scale;
  const float shift = clip_loss_shift(scale);
  const float terms = static_cast<float>(range.M > range.N ? range.M : range.N);
  float largest = 0;
  bool suits = clip_loss_scale_suits(scale);
  const auto look = [&](const float* lse, const float* d_lse, int64_t count) {
    for (int64_t i = thread; i < count; i += kRangeThreads) {
      largest = fmaxf(largest, fabsf(d_lse[i]));
      suits &= clip_loss_suits(power_of_two(lse[i] * kLog2E<float> - shift), terms);
    }
  };
  look(range.row_lse, range.d_rows, range.M);
  look(range.column_lse, range.d_columns, range.N);
  for (int64_t i = thread; i < range.M; i += kRangeThreads)
    largest = fmaxf(largest, fabsf(range.d_own[i]));
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
  if (thread % 32 == 0) shared[thread / 32] = largest;
  const bool is_exact = sync_any(!suits);
  if (thread == 0) {
    for (int warp = 0; warp < kRangeThreads / 32; ++warp) largest = fmaxf(largest, shared[warp]);
    const float normaliser = fmaxf(largest, kLeastGradient) / range.boost;
    *range.normalisers = {1.0f / normaliser, normaliser, is_exact ? 1.0f : 0.0f};
  }
}

// Whether the exact log-sum-exps are wanted.
MEDFAST_DEVICE bool clip_loss_any(const int* flags, int64_t count, int threads) {
  bool any = false;
  for (int64_t i = thread_index(); i < count; i += threads) any |= flags[i] != 0;
  return sync_any(any);
}

}  // namespace medfast::cuda
