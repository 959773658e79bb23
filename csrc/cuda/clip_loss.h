// clip_loss on a GPU: features [M, D] and [N, D] in bf16 or fp16, D a multiple of 8, each from a
// multiple of 16 bytes on. Sums are in fp32, no logit is kept, and no order of theirs is by chance.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/launch.h"

namespace medfast::cuda {

struct ClipLossFeatures {
  const void* rows;
  const void* columns;
  Dtype dtype;
  const float* scale;
  // Row i's own column is i + offset.
  int64_t M, N, D, offset;
};

// Rows and columns that a launch covers, from multiples of 128 on; `parts` blocks share the tiles
// of 128 rows.
struct ClipLossSpan {
  int64_t row_start, row_stop, column_start, column_stop, parts;
};

// The sums of exponentials of a span of all columns: of rows [parts, row_stride], of columns
// [row blocks, N].
void clip_loss_sums(const ClipLossFeatures& features, const ClipLossSpan& span,
                    float* row_partials, int64_t row_stride, float* column_partials,
                    cudaStream_t stream);

// Own logits [M] and log-sum-exps [M] of the span's rows, from these; log-sum-exps [N] of the
// columns after the last rows, until then their sums. Flags, one per 128 rows and one per 128
// columns, say where one shift does not suit.
void clip_loss_ends(const ClipLossFeatures& features, const ClipLossSpan& span,
                    const float* row_partials, int64_t row_stride, const float* column_partials,
                    float* own, float* row_lse, float* column_lse, int* flags,
                    cudaStream_t stream);

// Both log-sum-exps anew with a running maximum, where any flag is set.
void clip_loss_online(const ClipLossFeatures& features, const int* flags, float* row_lse,
                      float* column_lse, cudaStream_t stream);

struct ClipLossUpstream {
  const float* row_lse;
  const float* column_lse;
  const float* d_own;
  const float* d_rows;
  const float* d_columns;
};

// What normalises the gradient: a factor, its inverse, and whether one shift suits [3].
void clip_loss_range(const ClipLossFeatures& features, const ClipLossUpstream& upstream,
                     float boost, float* normalisers, cudaStream_t stream);

// The normalised gradient of a span's logits, with room for whole tiles, a row every `stride`
// entries; and by block its sum with the products [parts * row blocks], fp64.
void clip_loss_gradient(const ClipLossFeatures& features, const ClipLossSpan& span,
                        const ClipLossUpstream& upstream, const float* normalisers,
                        void* gradient, int64_t stride, double* sums, cudaStream_t stream);

// How many blocks of the kernels that multiply run on a multiprocessor of the current device.
int clip_loss_blocks_at_a_time();

}  // namespace medfast::cuda
