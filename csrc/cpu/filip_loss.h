// The passes of filip_loss.

#pragma once

#include <cstdint>

#include "token_tile.h"

namespace medfast {

// Where the results of a tile go: those of caption c at number ids[c] of all captions, those of the
// tile's first image at first_image.
struct FilipScores {
  const int64_t* ids;
  int64_t all_captions;
  int64_t all_images;
  int64_t first_image;
  int64_t all_words;     // T
  float* image_to_text;  // [all_images, all_captions]
  float* text_to_image;  // [all_captions, all_images]
};

// The scores of the tile's pairs and, unless best_patch is null, the places of the maxima:
// best_patch [all_captions, all_images, T], best_word [all_captions, all_images, P]. shares [g, P]
// is what a patch counts in its image's mean; a patch of share 0 does not exist.
template <class Index>
void filip_loss_maxima(const TokenTile& tile, const float* similarity, const float* shares,
                       const FilipScores& scores, Index* best_patch, Index* best_word);

struct FilipFeatures {
  const int64_t* starts;  // [captions + 1], of the packed words
  const int64_t* ids;     // [captions]
  int64_t captions;
  int64_t images;
  int64_t patches;    // P
  int64_t all_words;  // T
  int64_t width;      // D
};

// All scores and places of maxima from features, at once, where they go as above; for processors on
// which products are this library's own.
template <class Feature, class Index>
void filip_loss_fused_maxima(const FilipFeatures& sizes, const Feature* words,
                             const Feature* patches, const float* shares, float* image_to_text,
                             float* text_to_image, Index* best_patch, Index* best_word);

// The gradients of words [N, D] and patches [images, P, D], rounded when they are complete; either
// may be null. d_image_to_text [images, captions] and d_text_to_image [captions, images] are those
// of the scores, shares [images, P] as above. Features in bf16 must be finite.
template <class Feature, class Index>
void filip_loss_gradient(const FilipFeatures& sizes, const Feature* words, const Feature* patches,
                         const float* shares, const float* d_image_to_text,
                         const float* d_text_to_image, const Index* best_patch,
                         const Index* best_word, Feature* d_words, Feature* d_patches);

}  // namespace medfast
