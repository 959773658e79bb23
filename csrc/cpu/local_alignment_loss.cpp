#include "local_alignment_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "exponential.h"
#include "panels.h"

namespace medfast {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();
// e^-60 and sums of such terms are far from what fp32 cannot hold.
constexpr float kHeadroom = 60.0f;

// In memory of the kernels a row of patches is followed by zeros up to a whole number of vectors:
// what is left over would be a good part of the time, an entry at a time.
constexpr int64_t kLanes = 16;

MEDFAST_KERNEL int64_t padded(int64_t patches) { return (patches + kLanes - 1) / kLanes * kLanes; }

// The kernels below are about one caption of n words: row t * images + j is that of word t and
// image j.
struct Rows {
  int64_t n;
  int64_t images;
  int64_t patches;
};

// Memory of a thread for them.
struct Scratch {
  float* over_words;   // [n * images, padded]
  float* d_sharpened;  // [n * images, padded]
  float* of_words;     // [n * images]
  float* mask;         // [images, padded]
  float* highest;      // [images, padded]
  float* sums;         // [images, padded]
  float* similarity;   // [padded], as the rest
  float* mixed;
  float* attention;
};

template <class T>
MEDFAST_KERNEL const float* read_row(const T* from, float unit, int64_t patches, float* to) {
  const int64_t whole = patches / kLanes * kLanes;
  load_all(from, unit, whole, to);
  if (whole == patches) return to;
  T last[kLanes] = {};
  for (int64_t p = 0; p < kLanes; ++p)
    if (whole + p < patches) last[p] = from[whole + p];
  load_all(last, unit, kLanes, to + whole);
  return to;
}

template <class T>
MEDFAST_KERNEL void write_row(const float* from, float factor, int64_t patches, T* to) {
  const int64_t whole = patches / kLanes * kLanes;
  store_all(from, factor, whole, to);
  if (whole == patches) return;
  T last[kLanes];
  store_all(from + whole, factor, kLanes, last);
  for (int64_t p = 0; p < kLanes; ++p)
    if (whole + p < patches) to[whole + p] = last[p];
}

// over_words = softmax of the similarity over the words, but for the division by its sums, which
// become their inverses.
MEDFAST_KERNEL void softmax_over_words(const float* similarity, Rows rows, Scratch scratch) {
  const int64_t width = padded(rows.patches);
  float* highest = scratch.highest;
  float* sums = scratch.sums;
  std::fill(highest, highest + rows.images * width, -INFINITY);
  std::fill(sums, sums + rows.images * width, 0.0f);
  for (int64_t i = 0; i < rows.n * rows.images; ++i) {
    float* row = scratch.over_words + i * width;
    read_row(similarity + i * rows.patches, 1.0f, rows.patches, row);
    float* high = highest + i % rows.images * width;
#pragma omp simd
    for (int64_t p = 0; p < width; ++p) high[p] = row[p] > high[p] ? row[p] : high[p];
  }
  for (int64_t i = 0; i < rows.n * rows.images; ++i) {
    const float* high = highest + i % rows.images * width;
    float* sum = sums + i % rows.images * width;
    float* row = scratch.over_words + i * width;
#pragma omp simd
    for (int64_t p = 0; p < width; ++p) {
      row[p] = exponential(row[p] - high[p]);
      sum[p] += row[p];
    }
  }
#pragma omp simd
  for (int64_t p = 0; p < rows.images * width; ++p) sums[p] = 1.0f / sums[p];
}

// Divides row i of over_words by its sums; attention = softmax of temperature times that. Returns
// it as it was rounded.
template <class Operand>
MEDFAST_KERNEL const float* softmax_of_row(int64_t i, Rows rows, float temperature,
                                           Operand* attention, Scratch scratch) {
  const int64_t width = padded(rows.patches);
  float* over_words = scratch.over_words + i * width;
  const float* inverse_sums = scratch.sums + i % rows.images * width;
  const float* mask = scratch.mask + i % rows.images * width;
  float* row = scratch.attention;
#pragma omp simd
  for (int64_t p = 0; p < width; ++p) over_words[p] *= inverse_sums[p];
  // Nothing is larger: of the other softmax no entry is above 1, or below 0.
  float highest = std::max(temperature, 0.0f);
  if (!(std::abs(temperature) <= kHeadroom)) {
    highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t p = 0; p < width; ++p) {
      const float x = mask[p] > 0.0f ? temperature * over_words[p] : -INFINITY;
      highest = x > highest ? x : highest;
    }
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < width; ++p) {
    row[p] = mask[p] * exponential(temperature * over_words[p] - highest);
    sum += row[p];
  }
  write_row(row, 1.0f / sum, rows.patches, attention + i * rows.patches);
  return read_row(attention + i * rows.patches, 1.0f, rows.patches, row);
}

MEDFAST_KERNEL float dot(const float* x, const float* y, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

template <class Operand>
MEDFAST_KERNEL void attend_caption(const float* similarity, Rows rows, float temperature,
                                   Operand* attention, float* dots, Scratch scratch) {
  softmax_over_words(similarity, rows, scratch);
  for (int64_t i = 0; i < rows.n * rows.images; ++i) {
    const float* a = softmax_of_row(i, rows, temperature, attention, scratch);
    dots[i] = dot(a, similarity + i * rows.patches, rows.patches);
  }
}

// One row of a panel of a product. Returns what it adds to a square.
MEDFAST_KERNEL float mix_row(const float* product, int64_t columns, float unit,
                             const bf16* attention, fp16* mixed) {
  alignas(64) float a[kPanel];
  alignas(64) float m[kPanel];
  store_all(product, 1.0f / unit, columns, mixed);
  load_all(attention, 1.0f, columns, a);
  load_all(mixed, unit, columns, m);
  return dot(a, m, columns);
}

MEDFAST_KERNEL void mix_panel(const float* product, int64_t rows, int64_t columns, float unit,
                              const bf16* attention, fp16* mixed, int64_t stride, bool is_first,
                              float* squares, int64_t next_square) {
  for (int64_t i = 0; i < rows; ++i) {
    // Of nearly all panels the compiler knows the width.
    const float added = columns == kPanel
                            ? mix_row(product, kPanel, unit, attention, mixed)
                            : mix_row(product, columns, unit, attention, mixed);
    *squares = is_first ? added : *squares + added;
    product += kPanel;
    attention += stride;
    mixed += stride;
    squares += next_square;
  }
}

MEDFAST_KERNEL void squares_of_rows(const float* attention, const float* mixed, int64_t rows,
                                    int64_t patches, float* squares) {
  for (int64_t i = 0; i < rows; ++i)
    squares[i] = dot(attention + i * patches, mixed + i * patches, patches);
}

struct Cosine {
  float value;
  float context_norm;
};

MEDFAST_KERNEL Cosine cosine(float dot, float square, float word_norm, float min_norm) {
  // NaN stays NaN.
  const float norm = square < 0.0f ? 0.0f : std::sqrt(square);
  const float divisor = word_norm * norm;
  return {dot / (divisor < min_norm ? min_norm : divisor), norm};
}

// From the dots, which become logits.
MEDFAST_KERNEL void score_caption(float* dots, const float* squares, const float* norms,
                                  int64_t words, int64_t images, float temperature, float min_norm,
                                  float* scores) {
  std::fill(scores, scores + images, -INFINITY);
  for (int64_t t = 0; t < words; ++t)
    for (int64_t j = 0; j < images; ++j) {
      const int64_t i = t * images + j;
      dots[i] = temperature * cosine(dots[i], squares[i], norms[t], min_norm).value;
      scores[j] = dots[i] > scores[j] ? dots[i] : scores[j];
    }
  for (int64_t j = 0; j < images; ++j) {
    float sum = 0;
    for (int64_t t = 0; t < words; ++t) sum += exponential(dots[t * images + j] - scores[j]);
    scores[j] += std::log(sum);
  }
}

template <class Operand>
MEDFAST_KERNEL void gradient_caption(const float* similarity, Mixed<Operand> mixed,
                                     const float* norms, const float* scores,
                                     const float* d_scores, Rows rows, float temp_attention,
                                     float temp_words, float min_norm, Operand* attention,
                                     Operand* d_similarity, Operand* weighted, float* d_norms,
                                     TemperatureGradients* d_temperatures, Scratch scratch) {
  const int64_t width = padded(rows.patches);
  softmax_over_words(similarity, rows, scratch);
  float* d_dots = scratch.of_words;
  float* d_sums = scratch.highest;
  float* row = scratch.similarity;
  std::fill(d_sums, d_sums + rows.images * width, 0.0f);
  double d_words = 0;
  for (int64_t i = 0; i < rows.n * rows.images; ++i) {
    const int64_t t = i / rows.images;
    const int64_t j = i % rows.images;
    const int64_t at = i * rows.patches;
    const float* a = softmax_of_row(i, rows, temp_attention, attention, scratch);
    const float* s = read_row(similarity + at, 1.0f, rows.patches, scratch.similarity);
    const float* m = read_row(mixed.data + at, mixed.unit, rows.patches, scratch.mixed);
    const Cosine found = cosine(dot(a, s, width), dot(a, m, width), norms[t], min_norm);
    // A word takes the share of its caption's gradient that it has in the log-sum-exp.
    const float share = d_scores[j] * exponential(temp_words * found.value - scores[j]);
    const float divisor = norms[t] * found.context_norm;
    const float d_dot = share * temp_words / (divisor < min_norm ? min_norm : divisor);
    const float d_divisor = divisor > min_norm ? -d_dot * found.value : 0.0f;
    const float d_square =
        d_divisor * norms[t] / (found.context_norm < kTiny ? kTiny : found.context_norm);
    d_norms[t] += d_divisor * found.context_norm;
    d_words += share * found.value;
    d_dots[i] = d_dot;
    write_row(a, d_square, rows.patches, weighted + at);

    float* d_sharpened = scratch.d_sharpened + i * width;
    float mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t p = 0; p < width; ++p) {
      d_sharpened[p] = d_dot * s[p] + d_square * m[p];
      mean += d_sharpened[p] * a[p];
    }
    const float* over_words = scratch.over_words + i * width;
    float* sums = d_sums + j * width;
#pragma omp simd
    for (int64_t p = 0; p < width; ++p) {
      d_sharpened[p] = a[p] * (d_sharpened[p] - mean) * over_words[p];
      sums[p] += d_sharpened[p];
    }
  }
  for (int64_t i = 0; i < rows.n * rows.images; ++i) {
    const float d_dot = d_dots[i];
    const float* over_words = scratch.over_words + i * width;
    const float* d_sharpened = scratch.d_sharpened + i * width;
    const float* sums = d_sums + i % rows.images * width;
    const float* a = read_row(attention + i * rows.patches, 1.0f, rows.patches, scratch.attention);
    // The parts of the first term may be large, and cancel.
#pragma omp simd
    for (int64_t p = 0; p < width; ++p)
      row[p] = temp_attention * (d_sharpened[p] - over_words[p] * sums[p]) + d_dot * a[p];
    write_row(row, 1.0f, rows.patches, d_similarity + i * rows.patches);
  }
  *d_temperatures = {std::accumulate(d_sums, d_sums + rows.images * width, 0.0), d_words};
}

// Calls pass(caption, rows, scratch) for all, by all threads, in turn, since captions are sorted by
// length. A scratch has the mask.
template <class Pass>
void for_each_caption(const TokenTile& tile, const float* patch_mask, const Pass& pass) {
  const int64_t most = tile.longest() * tile.images;
  const int64_t width = padded(tile.patches);
  const int64_t columns = tile.images * width;
#pragma omp parallel
  {
    // Of pages that nobody touches nothing is there.
    const std::unique_ptr<float[]> of_words(new float[2 * most * width]);
    std::vector<float> rest(most + 3 * columns + 3 * width);
    float* of_images = rest.data() + most;
    float* row = of_images + 3 * columns;
    const Scratch scratch{of_words.get(),
                          of_words.get() + most * width,
                          rest.data(),
                          of_images,
                          of_images + columns,
                          of_images + 2 * columns,
                          row,
                          row + width,
                          row + 2 * width};
    for (int64_t j = 0; j < tile.images; ++j)
      std::copy(patch_mask + j * tile.patches, patch_mask + (j + 1) * tile.patches,
                scratch.mask + j * width);
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < tile.captions; ++c)
      pass(c, Rows{tile.words(c), tile.images, tile.patches}, scratch);
  }
}

}  // namespace

template <class Operand>
void local_alignment_attend(const TokenTile& tile, const float* similarity,
                            const float* patch_mask, float temperature, Operand* attention,
                            float* dots) {
  for_each_caption(tile, patch_mask, [&](int64_t c, Rows rows, Scratch scratch) {
    const int64_t at = tile.starts[c] * tile.columns();
    run<attend_caption<Operand>>(similarity + at, rows, temperature, attention + at,
                                 dots + tile.starts[c] * tile.images, scratch);
  });
}

void local_alignment_mix(const TokenTile& tile, const bf16* attention, const bf16* grams,
                         float unit, fp16* mixed, float* squares) {
  const int64_t words = tile.starts[tile.captions];
  const int64_t patches = tile.patches;
  const Matrix<bf16> a{attention, tile.columns(), 1, patches};
  const Matrix<bf16> b{grams, patches, 1, patches * patches};
  for_each_product(
      tile.images, words, patches, patches, a, b, {rows_of_block(tile.images, words), patches},
      [&](const float* product, int64_t image, int64_t i, int64_t p, int64_t height,
          int64_t width, bool) {
        const int64_t at = i * tile.columns() + image * patches + p;
        run<mix_panel>(product, height, width, unit, attention + at, mixed + at, tile.columns(),
                       p == 0, squares + i * tile.images + image, tile.images);
      });
}

void local_alignment_squares(const TokenTile& tile, const float* attention, const float* mixed,
                             float* squares) {
  const int64_t rows = tile.starts[tile.captions] * tile.images;
  const int64_t block_rows = rows_of_block(1, rows);
  const int64_t blocks = ceil_div(rows, block_rows);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * block_rows;
    run<squares_of_rows>(attention + first * tile.patches, mixed + first * tile.patches,
                         std::min(block_rows, rows - first), tile.patches, squares + first);
  }
}

void local_alignment_scores(const TokenTile& tile, float* dots, const float* squares,
                            const float* norms, float temperature, float min_norm, float* scores) {
  for (int64_t c = 0; c < tile.captions; ++c) {
    const int64_t at = tile.starts[c] * tile.images;
    run<score_caption>(dots + at, squares + at, norms + tile.starts[c], tile.words(c), tile.images,
                       temperature, min_norm, scores + c * tile.images);
  }
}

template <class Operand>
TemperatureGradients local_alignment_gradient(
    const TokenTile& tile, const float* similarity, const float* patch_mask, Mixed<Operand> mixed,
    const float* norms, const float* scores, const float* d_scores, float temp_attention,
    float temp_words, float min_norm, Operand* attention, Operand* d_similarity,
    Operand* weighted, float* d_norms) {
  std::vector<TemperatureGradients> by_caption(tile.captions);
  for_each_caption(tile, patch_mask, [&](int64_t c, Rows rows, Scratch scratch) {
    const int64_t at = tile.starts[c] * tile.columns();
    const int64_t of_caption = c * tile.images;
    run<gradient_caption<Operand>>(similarity + at, Mixed<Operand>{mixed.data + at, mixed.unit},
                                   norms + tile.starts[c], scores + of_caption,
                                   d_scores + of_caption, rows, temp_attention, temp_words,
                                   min_norm, attention + at, d_similarity + at, weighted + at,
                                   d_norms + tile.starts[c], &by_caption[c], scratch);
  });
  TemperatureGradients total{};
  for (const TemperatureGradients& part : by_caption) {
    total.attention += part.attention;
    total.words += part.words;
  }
  return total;
}

#define MEDFAST_INSTANTIATE(Operand)                                                             \
  template void local_alignment_attend(const TokenTile&, const float*, const float*, float,      \
                                       Operand*, float*);                                        \
  template TemperatureGradients local_alignment_gradient(                                        \
      const TokenTile&, const float*, const float*, Mixed<Operand>, const float*, const float*,  \
      const float*, float, float, float, Operand*, Operand*, Operand*, float*);
MEDFAST_INSTANTIATE(float)
MEDFAST_INSTANTIATE(bf16)

}  // namespace medfast
