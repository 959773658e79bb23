#include "local_alignment_loss.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "instruction_set.h"

namespace medfast {
namespace {

// Calls pass(caption, image, size, scratch) for all, by all threads, captions in turn, since they
// are sorted by length. A scratch has the mask of the image.
template <class Pass>
void for_each_pair(const TokenTile& tile, const float* patch_mask, const Pass& pass) {
  const int64_t most = tile.longest();
  const int64_t width = padded(tile.patches);
#pragma omp parallel
  {
    // Of pages that nobody touches nothing is there.
    const std::unique_ptr<float[]> of_words(new float[(3 * width + 2) * most]);
    std::vector<float> of_patches((tile.images + 4) * width);
    float* rows = of_words.get();
    float* row = of_patches.data() + tile.images * width;
    Scratch scratch{rows,
                    rows + most * width,
                    rows + 3 * most * width,
                    rows + 2 * most * width,
                    rows + (3 * width + 1) * most,
                    nullptr,
                    row,
                    row + width,
                    row + 2 * width,
                    row + 3 * width};
    for (int64_t j = 0; j < tile.images; ++j)
      std::copy(patch_mask + j * tile.patches, patch_mask + (j + 1) * tile.patches,
                of_patches.data() + j * width);
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < tile.captions; ++c)
      for (int64_t j = 0; j < tile.images; ++j) {
        scratch.mask = of_patches.data() + j * width;
        pass(c, j, Size{tile.words(c), tile.patches}, scratch);
      }
  }
}

// The rows of one caption and image in a tensor [N, g, P].
template <class T>
Rows<T> rows_of(const TokenTile& tile, T* data, int64_t caption, int64_t image) {
  return {data + tile.starts[caption] * tile.columns() + image * tile.patches, tile.columns()};
}

// Where they are in one [N * g] that has those of a caption and an image side by side.
int64_t words_of(const TokenTile& tile, int64_t caption, int64_t image) {
  return tile.starts[caption] * tile.images + image * tile.words(caption);
}

}  // namespace

void local_alignment_attend(const TokenTile& tile, const float* similarity, const float* patch_mask,
                            float temperature, float* attention, float* dots) {
  for_each_pair(tile, patch_mask, [&](int64_t c, int64_t j, Size size, Scratch scratch) {
    scratch.dots = dots + words_of(tile, c, j);
    run<local_alignment::attend<float>>(rows_of(tile, similarity, c, j), size, temperature,
                                        rows_of(tile, attention, c, j), scratch);
  });
}

void local_alignment_scores(const TokenTile& tile, const float* attention, const float* mixed,
                            const float* dots, const float* norms, float temperature,
                            float min_norm, float* scores) {
  std::vector<float> logits(tile.starts[tile.captions] * tile.images);
#pragma omp parallel for schedule(dynamic)
  for (int64_t c = 0; c < tile.captions; ++c)
    for (int64_t j = 0; j < tile.images; ++j) {
      const int64_t at = words_of(tile, c, j);
      run<local_alignment::score>(rows_of(tile, attention, c, j), rows_of(tile, mixed, c, j),
                                  dots + at, norms + tile.starts[c],
                                  Size{tile.words(c), tile.patches}, temperature, min_norm,
                                  logits.data() + at, scores + c * tile.images + j);
    }
}

TemperatureGradients local_alignment_gradient(const TokenTile& tile, const float* similarity,
                                              const float* patch_mask, const float* mixed,
                                              const float* norms, const float* scores,
                                              const float* d_scores, Temperatures temperatures,
                                              float min_norm, float* attention, float* d_similarity,
                                              float* weighted, float* d_norms) {
  std::vector<TemperatureGradients> by_caption(tile.captions);
  for_each_pair(tile, patch_mask, [&](int64_t c, int64_t j, Size size, Scratch scratch) {
    const Rows<const float> s = rows_of(tile, similarity, c, j);
    const int64_t pair = c * tile.images + j;
    run<local_alignment::attend<float>>(s, size, temperatures.attention,
                                        rows_of(tile, attention, c, j), scratch);
    run<local_alignment::gradient<float>>(
        s, rows_of(tile, mixed, c, j), norms + tile.starts[c], scores[pair], d_scores[pair], size,
        temperatures, min_norm, rows_of(tile, d_similarity, c, j), rows_of(tile, weighted, c, j),
        d_norms + tile.starts[c], &by_caption[c], scratch);
  });
  return sum_of(by_caption);
}

}  // namespace medfast
