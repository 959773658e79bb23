// local_alignment_loss: its passes over tiles of fp32, between which a library multiplies, and all
// of it in one go for features of bf16.

#pragma once

#include <cstdint>

#include "bf16.h"
#include "local_alignment_caption.h"
#include "token_tile.h"

namespace medfast {

// The attention [N, g, P] of each word, 0 where patch_mask [g, P] is 0, and dots: its sums with the
// similarity [N, g, P] as weights, for each caption [g, words].
void local_alignment_attend(const TokenTile& tile, const float* similarity, const float* patch_mask,
                            float temperature, float* attention, float* dots);

// With `mixed`, the attention times the Gram matrices, and the norms [N] of the words: scores
// [captions, g], the log-sum-exp of temperature * cosine over each caption's words.
void local_alignment_scores(const TokenTile& tile, const float* attention, const float* mixed,
                            const float* dots, const float* norms, float temperature,
                            float min_norm, float* scores);

// From scores and d_scores [captions, g]: d_similarity, weighted = attention times twice the
// gradient of |context|^2, and what it adds to the gradients of the norms, d_norms [N]. attention
// is written, as local_alignment_attend does: to compute it again is cheaper than to read what that
// would have to keep.
TemperatureGradients local_alignment_gradient(const TokenTile& tile, const float* similarity,
                                              const float* patch_mask, const float* mixed,
                                              const float* norms, const float* scores,
                                              const float* d_scores, Temperatures temperatures,
                                              float min_norm, float* attention, float* d_similarity,
                                              float* weighted, float* d_norms);

// All words of a batch and some images.
struct LocalAlignmentBatch {
  TokenTile tile;
  int64_t depth;
  const bf16* words;        // [N, depth]
  const bf16* patches;      // [images, patches, depth], 0 where masked
  const float* patch_mask;  // [images, patches]
  const float* norms;       // [N], of the words
  Temperatures temperatures;
  float min_norm;
};

// Writes scores [captions, images].
void local_alignment_fused_scores(const LocalAlignmentBatch& batch, float* scores);

// From scores and d_scores [captions, images]: writes d_patches, and d_words [N, depth] or adds
// them, without what the gradients of the norms give; adds these to d_norms [images, N], by image.
// d_similarity [N, images, patches] is memory for the gradient of the similarity.
TemperatureGradients local_alignment_fused_gradients(const LocalAlignmentBatch& batch,
                                                     const float* scores, const float* d_scores,
                                                     bool accumulate, bf16* d_similarity,
                                                     float* d_words, bf16* d_patches,
                                                     float* d_norms);

}  // namespace medfast
