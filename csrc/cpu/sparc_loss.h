// The passes of sparc_loss over pairs of n words and P patches, all rows contiguous.

#pragma once

#include <cstdint>

namespace medfast {

// weights [n, P] of the patches for each word from their similarities: brought to [0, 1] over the
// patches of mask 1, set to 0 below `least`, divided by their sum. A row whose spread is below
// `constant` times its largest value weighs all patches equally.
void sparc_loss_align(const float* similarity, const float* mask, int64_t n, int64_t patches,
                      float least, float constant, float* weights);

// Turns the gradient of the weights into that of the similarities, in place.
void sparc_loss_align_gradient(const float* similarity, const float* mask, int64_t n,
                               int64_t patches, float least, float constant, float* gradient);

struct SparcSums {
  double loss;     // of the words, both ways
  double d_scale;  // of `weight` times that
};

// For each of `pairs` pairs, one after the other: from products_ij = context_i . word_j, replaced by
// the factors of word_j in the gradient of context_i and the reverse, for a loss that counts
// `weight`. What goes through the lengths is context_i times through_contexts[i] and word_j times
// through_words[j]. The sums do not depend on the number of threads.
SparcSums sparc_loss_contrast(const float* contexts, const float* words, int64_t pairs, int64_t n,
                              int64_t width, float scale, float weight, float min_norm,
                              float* products, float* through_contexts, float* through_words);

// out_i += factors[i] * rows_i, width entries each.
void sparc_loss_add_rows(const float* rows, const float* factors, int64_t n, int64_t width,
                         float* out);

}  // namespace medfast
