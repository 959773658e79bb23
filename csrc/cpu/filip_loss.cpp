#include "filip_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "bf16.h"
#include "lanes.h"
#include "threads.h"
#include "weighted_sums.h"
#include "word_chunks.h"

namespace medfast {
namespace {

// As many patches and their products with a chunk of words stay in the second-level cache.
template <class Feature>
constexpr int64_t kColumnsAtATime = kTerms<Feature> == 1 ? 448 : 224;
// 32 MiB. Of more words, packed, some are taken after the others.
constexpr int64_t kMostPacked = int64_t{1} << 23;
// Pairs whose maxima are gathered together: their features stay in the second-level cache.
constexpr int64_t kTogether = 4;
// With bf16, to gather a maximum's feature takes as long as so many entries of products.
constexpr int64_t kEntriesPerMaximum = 40;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Best {
  float value;
  int32_t place;
};

// The highest of a row's patches and the first place where it is; NaN at 0 where one is NaN or
// there is none.
MEDFAST_KERNEL Best best_of_row(const float* row, const float* shares, int64_t patches) {
  float highest = -INFINITY;
  int32_t nans = 0;
#pragma omp simd reduction(max : highest) reduction(+ : nans)
  for (int64_t p = 0; p < patches; ++p) {
    const float x = shares[p] > 0.0f ? row[p] : -INFINITY;
    highest = x > highest ? x : highest;
    nans += x != x ? 1 : 0;
  }
  constexpr int32_t kNowhere = std::numeric_limits<int32_t>::max();
  int32_t place = kNowhere;
#pragma omp simd reduction(min : place)
  for (int32_t p = 0; p < static_cast<int32_t>(patches); ++p) {
    const int32_t here = shares[p] > 0.0f && row[p] == highest ? p : place;
    place = here < place ? here : place;
  }
  if (nans > 0 || place == kNowhere) return {kNan, 0};
  return {highest, place};
}

// Caption of n words against one image, whose columns start at similarity. It reads `width`
// columns, in whole vectors: those behind the patches must be of share 0, and may hold anything.
template <class Index>
MEDFAST_KERNEL void maxima_of_pair(const float* similarity, int64_t stride, const float* shares,
                                   int64_t n, int64_t patches, int64_t width, float* image_to_text,
                                   float* text_to_image, Index* best_patch, Index* best_word,
                                   float* highest, int32_t* places) {
  for (int64_t p = 0; p < width; ++p) {
    highest[p] = similarity[p];
    places[p] = 0;
  }
  float of_words = 0;
  for (int64_t t = 0; t < n; ++t) {
    const float* row = similarity + t * stride;
    const int32_t place = static_cast<int32_t>(t);
#pragma omp simd
    for (int64_t p = 0; p < width; ++p) {
      // Once NaN, always NaN.
      const bool is_better = (row[p] > highest[p]) | (row[p] != row[p]);
      highest[p] = is_better ? row[p] : highest[p];
      places[p] = is_better ? place : places[p];
    }
    const Best best = best_of_row(row, shares, width);
    of_words += best.value;
    if (best_patch != nullptr) best_patch[t] = static_cast<Index>(best.place);
  }
  float of_patches = 0;
#pragma omp simd reduction(+ : of_patches)
  for (int64_t p = 0; p < width; ++p)
    of_patches += shares[p] > 0.0f ? shares[p] * highest[p] : 0.0f;
  *image_to_text = of_patches;
  *text_to_image = of_words / static_cast<float>(n);
  if (best_word != nullptr)
    for (int64_t p = 0; p < patches; ++p) best_word[p] = static_cast<Index>(places[p]);
}

// The places of a pair's maxima, and their gradients: d_word of each word's, and of that of patch p
// d_patch * shares[p].
template <class Index>
struct MaximaOfPair {
  const Index* patch_of;
  const Index* word_of;
  const float* shares;
  float d_word;
  float d_patch;
};

template <class Index>
struct Maxima {
  const FilipFeatures& sizes;
  const float* shares;
  const float* d_image_to_text;
  const float* d_text_to_image;
  const Index* best_patch;
  const Index* best_word;

  MaximaOfPair<Index> of(int64_t caption, int64_t image) const {
    const int64_t pair = sizes.ids[caption] * sizes.images + image;
    const int64_t n = sizes.starts[caption + 1] - sizes.starts[caption];
    return {best_patch + pair * sizes.all_words, best_word + pair * sizes.patches,
            shares + image * sizes.patches, d_text_to_image[pair] / static_cast<float>(n),
            d_image_to_text[image * sizes.captions + sizes.ids[caption]]};
  }
};

// A feature that a maximum came from, times the gradient of that maximum.
template <class Feature>
struct Source {
  int32_t to;
  float weight;
  const Feature* row;
};

template <class Feature>
using Sources = std::vector<Source<Feature>>;

// Sorts by destination, of which there are `count`, keeping the order of equals; starts
// [count + 1].
template <class Feature>
void sort_by_destination(const Sources<Feature>& from, int64_t count, Sources<Feature>& sorted,
                         std::vector<int32_t>& starts) {
  starts.assign(count + 1, 0);
  for (const auto& source : from) ++starts[source.to + 1];
  for (int64_t k = 0; k < count; ++k) starts[k + 1] += starts[k];
  sorted.resize(from.size());
  std::vector<int32_t> next(starts.begin(), starts.end() - 1);
  for (const auto& source : from) sorted[next[source.to]++] = source;
}

// Adds each destination's sources to it, several at a time: rows are in cache, and what counts is
// how often they are loaded and stored.
template <class Feature>
MEDFAST_KERNEL void add_sources(const Source<Feature>* sources, const int32_t* starts,
                                int64_t count, int64_t width, float* destinations) {
  for (int64_t k = 0; k < count; ++k) {
    float* to = destinations + k * width;
    int32_t i = starts[k];
    for (; i + 4 <= starts[k + 1]; i += 4) {
      const Source<Feature>* s = sources + i;
      const Feature *r0 = s[0].row, *r1 = s[1].row, *r2 = s[2].row, *r3 = s[3].row;
      const float w0 = s[0].weight, w1 = s[1].weight, w2 = s[2].weight, w3 = s[3].weight;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d)
        to[d] += (w0 * load(r0 + d) + w1 * load(r1 + d)) + (w2 * load(r2 + d) + w3 * load(r3 + d));
    }
    for (; i < starts[k + 1]; ++i) {
      const Feature* row = sources[i].row;
      const float weight = sources[i].weight;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) to[d] += weight * load(row + d);
    }
  }
}

// Sums in float of what goes to `to` in the end: there, or in memory for all of them at a time.
class Sums {
 public:
  float* start(float* to, int64_t size) {
    std::fill(to, to + size, 0.0f);
    return to;
  }
  float* start(bf16*, int64_t size) {
    memory_.assign(size, 0.0f);
    return memory_.data();
  }
  void finish(float*) const {}
  void finish(bf16* to) const {
    run<store_all<bf16>>(memory_.data(), 1.0f, static_cast<int64_t>(memory_.size()), to);
  }

 private:
  std::vector<float> memory_;
};

// Adds, for every maximum, the one feature that it came from.
template <class Feature, class Index>
void gather(const Maxima<Index>& maxima, const Feature* words, const Feature* patches,
            Feature* d_words, Feature* d_patches) {
  const FilipFeatures& sizes = maxima.sizes;
  const int64_t P = sizes.patches;
  const int64_t D = sizes.width;
  // Calls `of_word` and `of_patch` for each maximum of a pair with its gradient and the other side.
  const auto each = [&](int64_t c, int64_t j, const auto& of_word, const auto& of_patch) {
    const MaximaOfPair<Index> pair = maxima.of(c, j);
    for (int64_t t = 0; t < sizes.starts[c + 1] - sizes.starts[c]; ++t)
      of_word(t, static_cast<int64_t>(pair.patch_of[t]), pair.d_word);
    for (int64_t p = 0; p < P; ++p)
      if (pair.shares[p] > 0.0f)
        of_patch(p, static_cast<int64_t>(pair.word_of[p]), pair.d_patch * pair.shares[p]);
  };
  const auto add_all = [&](const Sources<Feature>& from, Sources<Feature>& sorted,
                           std::vector<int32_t>& starts, int64_t count, float* to) {
    sort_by_destination(from, count, sorted, starts);
    run<add_sources<Feature>>(sorted.data(), starts.data(), count, D, to);
  };
  const int64_t least = 2 * threads();
  const int64_t blocks = std::min(
      sizes.captions, std::max(least, (sizes.captions + kTogether - 1) / kTogether));
#pragma omp parallel
  {
    Sources<Feature> from, sorted;
    std::vector<int32_t> starts;
    Sums sums;
    if (d_words != nullptr) {
      // An image's patches are loaded into cache once for the captions of a block. Which captions
      // these are does not change the order of any sum.
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * sizes.captions / blocks;
        const int64_t last = (b + 1) * sizes.captions / blocks;
        const int64_t row = sizes.starts[first];
        const int64_t rows = sizes.starts[last] - row;
        float* const to = sums.start(d_words + row * D, rows * D);
        for (int64_t j = 0; j < sizes.images; ++j) {
          const Feature* image = patches + j * P * D;
          from.clear();
          for (int64_t c = first; c < last; ++c) {
            const int32_t start = static_cast<int32_t>(sizes.starts[c] - row);
            each(
                c, j,
                [&](int64_t t, int64_t p, float weight) {
                  from.push_back({start + static_cast<int32_t>(t), weight, image + p * D});
                },
                [&](int64_t p, int64_t t, float weight) {
                  from.push_back({start + static_cast<int32_t>(t), weight, image + p * D});
                });
          }
          add_all(from, sorted, starts, rows, to);
        }
        sums.finish(d_words + row * D);
      }
    }
    if (d_patches != nullptr) {
#pragma omp for schedule(dynamic)
      for (int64_t j = 0; j < sizes.images; ++j) {
        float* const to = sums.start(d_patches + j * P * D, P * D);
        for (int64_t c = 0; c < sizes.captions; c += kTogether) {
          from.clear();
          for (int64_t i = c; i < std::min(c + kTogether, sizes.captions); ++i) {
            const Feature* rows = words + sizes.starts[i] * D;
            each(
                i, j,
                [&](int64_t t, int64_t p, float weight) {
                  from.push_back({static_cast<int32_t>(p), weight, rows + t * D});
                },
                [&](int64_t p, int64_t t, float weight) {
                  from.push_back({static_cast<int32_t>(p), weight, rows + t * D});
                });
          }
          add_all(from, sorted, starts, P, to);
        }
        sums.finish(d_patches + j * P * D);
      }
    }
  }
}

// Some of all words, or of the patches of all images.
struct Range {
  int64_t first;
  int64_t last;
};

// Calls put(is_here, word, patch, gradient) for the gradients of similarities of `words` and
// `patches` that are not 0, few as they are, and where is_here is false for some others: so no
// branch decides, which processors would mispredict.
template <class Index, class Put>
void each_gradient(const Maxima<Index>& maxima, const std::vector<int32_t>& caption_of, Range words,
                   Range patches, const Put& put) {
  const FilipFeatures& sizes = maxima.sizes;
  const int64_t P = sizes.patches;
  for (int64_t c = caption_of[words.first]; c <= caption_of[words.last - 1]; ++c)
    for (int64_t j = patches.first / P; j * P < patches.last; ++j) {
      const auto [patch_of, word_of, shares, d_word, d_patch] = maxima.of(c, j);
      const int64_t word = sizes.starts[c];
      const int64_t patch = j * P;
      const int64_t first_word = std::max(words.first, word) - word;
      const int64_t last_word = std::min(words.last, sizes.starts[c + 1]) - word;
      const int64_t first_patch = std::max(patches.first, patch) - patch;
      const int64_t last_patch = std::min(patches.last, patch + P) - patch;
      for (int64_t t = first_word; t < last_word; ++t) {
        const int64_t p = patch_of[t];
        const float of_patch = word_of[p] == t && shares[p] > 0.0f ? d_patch * shares[p] : 0.0f;
        put((p >= first_patch) & (p < last_patch), word + t, patch + p, d_word + of_patch);
      }
      for (int64_t p = first_patch; p < last_patch; ++p) {
        const int64_t t = word_of[p];
        const bool is_new = (shares[p] > 0.0f) & (patch_of[t] != p);
        put(is_new & (t >= first_word) & (t < last_word), word + t, patch + p,
            d_patch * shares[p]);
      }
    }
}

// The same by products of the gradients of the similarities.
template <class Index>
void add_products(const Maxima<Index>& maxima, const bf16* words, const bf16* patches,
                  bf16* d_words, bf16* d_patches) {
  const FilipFeatures& sizes = maxima.sizes;
  const int64_t word_count = sizes.starts[sizes.captions];
  const int64_t patch_count = sizes.images * sizes.patches;
  std::vector<int32_t> caption_of(word_count);
  for (int64_t c = 0; c < sizes.captions; ++c)
    std::fill(caption_of.begin() + sizes.starts[c], caption_of.begin() + sizes.starts[c + 1],
              static_cast<int32_t>(c));
  const auto add = [&](int64_t row_count, int64_t term_count, const bf16* features, bf16* out,
                       const auto& each_of) {
    weighted_sums(
        row_count, term_count, sizes.width, features, 1.0f, false, out,
        [&](int64_t row, int64_t term, int64_t steps, uint32_t* memory) {
          const Range rows{row, std::min(row + kPanel, row_count)};
          const Range terms{term, std::min(term + steps * kStepDepth, term_count)};
          bf16* const weights = reinterpret_cast<bf16*>(memory);
          std::fill(weights, weights + steps * kPanel * kStepDepth, bf16{0});
          bf16 elsewhere;
          bf16* const memories[] = {&elsewhere, weights};
          each_of(rows, terms, [&](bool is_here, int64_t i, int64_t j, float gradient) {
            const int64_t k = j - term;
            const int64_t place = (k / kStepDepth * kPanel + i - row) * kStepDepth + k % kStepDepth;
            store(gradient, memories[is_here] + is_here * place);
          });
        });
  };
  if (d_words != nullptr)
    add(word_count, patch_count, patches, d_words, [&](Range rows, Range terms, const auto& put) {
      each_gradient(maxima, caption_of, rows, terms, put);
    });
  if (d_patches != nullptr)
    add(patch_count, word_count, words, d_patches, [&](Range rows, Range terms, const auto& put) {
      each_gradient(maxima, caption_of, terms, rows,
                    [&](bool is_here, int64_t word, int64_t patch, float gradient) {
                      put(is_here, patch, word, gradient);
                    });
    });
}

}  // namespace

template <class Index>
void filip_loss_maxima(const TokenTile& tile, const float* similarity, const float* shares,
                       const FilipScores& scores, Index* best_patch, Index* best_word) {
  const int64_t columns = tile.columns();
#pragma omp parallel
  {
    std::vector<float> highest(tile.patches);
    std::vector<int32_t> places(tile.patches);
    // In turn, since captions are sorted by length.
#pragma omp for schedule(static, 1)
    for (int64_t c = 0; c < tile.captions; ++c)
      for (int64_t j = 0; j < tile.images; ++j) {
        const int64_t caption = scores.ids[c];
        const int64_t image = scores.first_image + j;
        const int64_t pair = caption * scores.all_images + image;
        const bool keeps = best_patch != nullptr;
        run<maxima_of_pair<Index>>(
            similarity + tile.starts[c] * columns + j * tile.patches, columns,
            shares + j * tile.patches, tile.words(c), tile.patches, tile.patches,
            scores.image_to_text + image * scores.all_captions + caption,
            scores.text_to_image + pair,
            keeps ? best_patch + pair * scores.all_words : nullptr,
            keeps ? best_word + pair * tile.patches : nullptr, highest.data(), places.data());
      }
  }
}

template <class Feature, class Index>
void filip_loss_fused_maxima(const FilipFeatures& sizes, const Feature* words,
                             const Feature* patches, const float* shares, float* image_to_text,
                             float* text_to_image, Index* best_patch, Index* best_word) {
  const int64_t P = sizes.patches;
  const int64_t D = sizes.width;
  const WordChunks<Feature> chunks({sizes.starts, sizes.captions, sizes.images, P}, D);
  const int64_t at_a_time =
      std::clamp<int64_t>(kMostPacked / chunks.packed_size(), 1, chunks.count());
  const int64_t together = std::clamp<int64_t>(kColumnsAtATime<Feature> / P, 1, sizes.images);
  const int64_t groups = ceil_div(sizes.images, together);
  const int64_t word_shares = chunks.shares(at_a_time, groups);
  const int64_t stride = whole_panels(together * P);
  const int64_t packed_size = packed_entries<Feature>(together * P, D);
  // The maxima of the last image read on.
  const int64_t size = chunks.rows() * stride + kLanes;
  uint32_t* rows = memory_of_b(at_a_time * chunks.packed_size());
#pragma omp parallel
  {
    const TileRegisters while_it_runs;
    uint32_t* packed = memory_of_a(packed_size + size);
    float* similarity = reinterpret_cast<float*>(packed + packed_size);
    // In whole vectors: what is behind an image's patches has no share.
    std::vector<float> shares_of(padded(P)), highest(padded(P));
    std::vector<int32_t> places(padded(P));
    for (int64_t start = 0; start < chunks.count(); start += at_a_time) {
      const int64_t count = std::min(at_a_time, chunks.count() - start);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < count; ++k)
        chunks.pack_rows(start + k, words, rows + k * chunks.packed_size());
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < groups * word_shares; ++task) {
        const int64_t first = task / word_shares * together;
        const int64_t images = std::min(together, sizes.images - first);
        const int64_t share = task % word_shares;
        pack_all(Lines<Feature>{patches + first * P * D, D, 1}, images * P, D, false, packed);
        for (int64_t k = share * count / word_shares; k < (share + 1) * count / word_shares; ++k) {
          const Chunk& chunk = chunks[start + k];
          multiply_all<Feature>(rows + k * chunks.packed_size(), packed, chunk.rows, images * P, D,
                                false, similarity, stride);
          for (int64_t j = 0; j < images; ++j) {
            const float* of_image = shares + (first + j) * P;
            std::copy(of_image, of_image + P, shares_of.data());
            for (int64_t c = chunk.first; c < chunk.last; ++c) {
              const int64_t caption = sizes.ids[c];
              const int64_t pair = caption * sizes.images + first + j;
              const bool keeps = best_patch != nullptr;
              run<maxima_of_pair<Index>>(
                  similarity + (sizes.starts[c] - chunk.row) * stride + j * P, stride,
                  shares_of.data(), sizes.starts[c + 1] - sizes.starts[c], P, padded(P),
                  image_to_text + (first + j) * sizes.captions + caption, text_to_image + pair,
                  keeps ? best_patch + pair * sizes.all_words : nullptr,
                  keeps ? best_word + pair * P : nullptr, highest.data(), places.data());
            }
          }
        }
      }
    }
  }
  release_large_memory_of_b();
}

template <class Feature, class Index>
void filip_loss_gradient(const FilipFeatures& sizes, const Feature* words, const Feature* patches,
                         const float* shares, const float* d_image_to_text,
                         const float* d_text_to_image, const Index* best_patch,
                         const Index* best_word, Feature* d_words, Feature* d_patches) {
  const Maxima<Index> maxima{sizes,           shares,     d_image_to_text,
                             d_text_to_image, best_patch, best_word};
  if constexpr (std::is_same_v<Feature, bf16>) {
    // Of one image and all captions.
    const int64_t word_maxima = sizes.starts[sizes.captions];
    const int64_t patch_maxima = sizes.captions * sizes.patches;
    const int64_t entries = word_maxima * sizes.patches;
    if (entries <= kEntriesPerMaximum * (word_maxima + patch_maxima))
      return add_products(maxima, words, patches, d_words, d_patches);
  }
  gather(maxima, words, patches, d_words, d_patches);
}

#define MEDFAST_INSTANTIATE_FOR(Feature, Index)                                                 \
  template void filip_loss_fused_maxima(const FilipFeatures&, const Feature*, const Feature*,   \
                                        const float*, float*, float*, Index*, Index*);          \
  template void filip_loss_gradient(const FilipFeatures&, const Feature*, const Feature*,       \
                                    const float*, const float*, const float*, const Index*,     \
                                    const Index*, Feature*, Feature*);
#define MEDFAST_INSTANTIATE(Index)                                                              \
  template void filip_loss_maxima(const TokenTile&, const float*, const float*,                 \
                                  const FilipScores&, Index*, Index*);                          \
  MEDFAST_INSTANTIATE_FOR(float, Index)                                                         \
  MEDFAST_INSTANTIATE_FOR(bf16, Index)
MEDFAST_INSTANTIATE(uint8_t)
MEDFAST_INSTANTIATE(int16_t)
MEDFAST_INSTANTIATE(int32_t)

}  // namespace medfast
