// The passes of local_alignment_loss over one tile.

#pragma once

#include <cstdint>
#include <type_traits>

#include "bf16.h"
#include "fp16.h"
#include "token_tile.h"

namespace medfast {

// attention: with the softmax of the similarity over each caption's words, for every patch, the
// softmax over the patches of each image of temperature times that, 0 where patch_mask [g, P] is 0.
// dots [N, g]: its sums with the similarity as weights. Operand is float or bf16.
template <class Operand>
void local_alignment_attend(const TokenTile& tile, const float* similarity,
                            const float* patch_mask, float temperature, Operand* attention,
                            float* dots);

// attention * Gram matrix, as multiples of `unit`: where operands are bf16, half as much to write
// and to read as in float. There is too much of it for the caches.
template <class Operand>
struct Mixed {
  using Stored = std::conditional_t<std::is_same_v<Operand, bf16>, fp16, float>;
  const Stored* data;
  float unit;
};

// Writes that product, with the Gram matrices [g, P, P], and squares [N, g]: the sums of the
// attention with it as weights.
void local_alignment_mix(const TokenTile& tile, const bf16* attention, const bf16* grams,
                         float unit, fp16* mixed, float* squares);

// The same sums of what another has multiplied.
void local_alignment_squares(const TokenTile& tile, const float* attention, const float* mixed,
                             float* squares);

// With the norms [N] of the words: scores [captions, g], the log-sum-exp of temperature * cosine
// over each caption's words. The dots are overwritten.
void local_alignment_scores(const TokenTile& tile, float* dots, const float* squares,
                            const float* norms, float temperature, float min_norm, float* scores);

struct TemperatureGradients {
  double attention;
  double words;
};

// From scores and d_scores [captions, g]: d_similarity, weighted = attention times twice the
// gradient of |context|^2, and what it adds to the gradients of the norms, d_norms [N]. attention
// is written, as local_alignment_attend does: to compute it again is cheaper than to read what that
// would have to keep.
template <class Operand>
TemperatureGradients local_alignment_gradient(
    const TokenTile& tile, const float* similarity, const float* patch_mask, Mixed<Operand> mixed,
    const float* norms, const float* scores, const float* d_scores, float temp_attention,
    float temp_words, float min_norm, Operand* attention, Operand* d_similarity,
    Operand* weighted, float* d_norms);

}  // namespace medfast
