#include "local_alignment_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "bf16.h"
#include "exponential.h"

namespace medfast {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();

// The kernels below are about one caption of n words; columns = images * patches.

// Memory of a thread for one caption.
struct Scratch {
  float* over_words;   // [n, columns]
  float* d_sharpened;  // [n, columns]
  float* of_words;     // [n, images]
  float* highest;      // [columns], as the rest
  float* sums;
  float* row;
};

// over_words = softmax of the similarity over the rows, but for the division by its sums, which
// become their inverses.
MEDFAST_KERNEL void softmax_over_rows(const float* similarity, int64_t n, int64_t columns,
                                      Scratch scratch) {
  float* highest = scratch.highest;
  float* sums = scratch.sums;
  for (int64_t c = 0; c < columns; ++c) {
    highest[c] = similarity[c];
    sums[c] = 0;
  }
  for (int64_t t = 1; t < n; ++t) {
    const float* row = similarity + t * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) highest[c] = row[c] > highest[c] ? row[c] : highest[c];
  }
  for (int64_t t = 0; t < n; ++t) {
    const float* row = similarity + t * columns;
    float* out = scratch.over_words + t * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      out[c] = exponential(row[c] - highest[c]);
      sums[c] += out[c];
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) sums[c] = 1.0f / sums[c];
}

// Divides a row of over_words by its sums; attention = softmax of temperature times that.
template <class Operand>
MEDFAST_KERNEL void softmax_of_row(float* over_words, const float* inverse_sums, const float* mask,
                                   int64_t patches, float temperature, Operand* attention,
                                   float* row) {
  float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
  for (int64_t p = 0; p < patches; ++p) {
    over_words[p] *= inverse_sums[p];
    const float x = mask[p] > 0.0f ? temperature * over_words[p] : -INFINITY;
    highest = x > highest ? x : highest;
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < patches; ++p) {
    row[p] = mask[p] * exponential(temperature * over_words[p] - highest);
    sum += row[p];
  }
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t p = 0; p < patches; ++p) store(row[p] * inverse, attention + p);
}

template <class Operand>
MEDFAST_KERNEL void attend_caption(const float* similarity, const float* patch_mask, int64_t n,
                                   int64_t images, int64_t patches, float temperature,
                                   Operand* attention, Scratch scratch) {
  softmax_over_rows(similarity, n, images * patches, scratch);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t j = 0; j < images; ++j) {
      const int64_t at = (t * images + j) * patches;
      softmax_of_row(scratch.over_words + at, scratch.sums + j * patches, patch_mask + j * patches,
                     patches, temperature, attention + at, scratch.row);
    }
}

struct Cosine {
  float value;
  float context_norm;
};

template <class Operand>
MEDFAST_KERNEL Cosine cosine(const float* similarity, const Operand* attention,
                             const float* mixed, int64_t patches, float word_norm,
                             float min_norm) {
  float dot = 0;
  float square = 0;
#pragma omp simd reduction(+ : dot, square)
  for (int64_t p = 0; p < patches; ++p) {
    const float a = load(attention + p);
    dot += a * similarity[p];
    square += a * mixed[p];
  }
  // NaN stays NaN.
  const float norm = square < 0.0f ? 0.0f : std::sqrt(square);
  const float divisor = word_norm * norm;
  return {dot / (divisor < min_norm ? min_norm : divisor), norm};
}

template <class Operand>
MEDFAST_KERNEL void score_caption(const float* similarity, const Operand* attention,
                                  const float* mixed, const float* norms, int64_t n,
                                  int64_t images, int64_t patches, float temperature,
                                  float min_norm, float* scores, float* logits) {
  for (int64_t j = 0; j < images; ++j) {
    float highest = -INFINITY;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t at = (t * images + j) * patches;
      logits[t] = temperature * cosine(similarity + at, attention + at, mixed + at, patches,
                                       norms[t], min_norm)
                                    .value;
      highest = logits[t] > highest ? logits[t] : highest;
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < n; ++t) sum += exponential(logits[t] - highest);
    scores[j] = highest + std::log(sum);
  }
}

template <class Operand>
MEDFAST_KERNEL void gradient_caption(const float* similarity, const float* patch_mask,
                                     const float* mixed, const float* norms, const float* scores,
                                     const float* d_scores, int64_t n, int64_t images,
                                     int64_t patches, float temp_attention, float temp_words,
                                     float min_norm, Operand* attention, Operand* d_similarity,
                                     Operand* weighted, float* d_norms,
                                     TemperatureGradients* d_temperatures, Scratch scratch) {
  const int64_t columns = images * patches;
  attend_caption(similarity, patch_mask, n, images, patches, temp_attention, attention, scratch);
  const float* over_words = scratch.over_words;
  float* d_sharpened = scratch.d_sharpened;
  float* d_dots = scratch.of_words;
  float* column_sums = scratch.sums;
  float* d_row = scratch.row;
  std::fill(column_sums, column_sums + columns, 0.0f);
  double d_attention_total = 0;
  double d_words_total = 0;
  for (int64_t t = 0; t < n; ++t) {
    float d_norm = 0;
    for (int64_t j = 0; j < images; ++j) {
      const int64_t at = (t * images + j) * patches;
      const float* s = similarity + at;
      const float* m = mixed + at;
      const float* softmax = over_words + at;
      const Operand* a = attention + at;
      const Cosine found = cosine(s, a, m, patches, norms[t], min_norm);
      // A word takes the share of its caption's gradient that it has in the log-sum-exp.
      const float share = d_scores[j] * exponential(temp_words * found.value - scores[j]);
      const float divisor = norms[t] * found.context_norm;
      const float d_dot = share * temp_words / (divisor < min_norm ? min_norm : divisor);
      const float d_divisor = divisor > min_norm ? -d_dot * found.value : 0.0f;
      const float d_square =
          d_divisor * norms[t] / (found.context_norm < kTiny ? kTiny : found.context_norm);
      d_norm += d_divisor * found.context_norm;
      d_words_total += share * found.value;
      d_dots[t * images + j] = d_dot;

      float mean = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t p = 0; p < patches; ++p) {
        d_row[p] = d_dot * s[p] + d_square * m[p];
        mean += d_row[p] * load(a + p);
      }
      float total = 0;
      float* out = d_sharpened + at;
      float* sums = column_sums + j * patches;
#pragma omp simd reduction(+ : total)
      for (int64_t p = 0; p < patches; ++p) {
        const float weight = load(a + p);
        const float d = weight * (d_row[p] - mean) * softmax[p];
        total += d;
        sums[p] += d;
        out[p] = d;
        store(d_square * weight, weighted + at + p);
      }
      d_attention_total += total;
    }
    d_norms[t] += d_norm;
  }
  for (int64_t t = 0; t < n; ++t)
    for (int64_t j = 0; j < images; ++j) {
      const int64_t at = (t * images + j) * patches;
      const float d_dot = d_dots[t * images + j];
      const float* sums = column_sums + j * patches;
#pragma omp simd
      for (int64_t p = 0; p < patches; ++p)
        store(temp_attention * (d_sharpened[at + p] - over_words[at + p] * sums[p]) +
                  d_dot * load(attention + at + p),
              d_similarity + at + p);
    }
  *d_temperatures = {d_attention_total, d_words_total};
}

// Calls pass(caption, scratch) for all, by all threads, in turn, since captions are sorted by
// length.
template <class Pass>
void for_each_caption(const TokenTile& tile, const Pass& pass) {
  const int64_t most = tile.longest();
  const int64_t columns = tile.columns();
#pragma omp parallel
  {
    std::vector<float> of_words(most * tile.images), of_columns(3 * columns);
    // Of pages that nobody touches nothing is there.
    const std::unique_ptr<float[]> of_tile(new float[2 * most * columns]);
    const Scratch scratch{of_tile.get(),
                          of_tile.get() + most * columns,
                          of_words.data(),
                          of_columns.data(),
                          of_columns.data() + columns,
                          of_columns.data() + 2 * columns};
#pragma omp for schedule(static, 1)
    for (int64_t c = 0; c < tile.captions; ++c) pass(c, scratch);
  }
}

}  // namespace

template <class Operand>
void local_alignment_attend(const TokenTile& tile, const float* similarity,
                            const float* patch_mask, float temperature, Operand* attention) {
  for_each_caption(tile, [&](int64_t c, const Scratch& scratch) {
    const int64_t at = tile.starts[c] * tile.columns();
    run<attend_caption<Operand>>(similarity + at, patch_mask, tile.words(c), tile.images,
                                 tile.patches, temperature, attention + at, scratch);
  });
}

template <class Operand>
void local_alignment_scores(const TokenTile& tile, const float* similarity,
                            const Operand* attention, const float* mixed, const float* norms,
                            float temperature, float min_norm, float* scores) {
  for_each_caption(tile, [&](int64_t c, const Scratch& scratch) {
    const int64_t row = tile.starts[c];
    const int64_t at = row * tile.columns();
    run<score_caption<Operand>>(similarity + at, attention + at, mixed + at, norms + row,
                                tile.words(c), tile.images, tile.patches, temperature, min_norm,
                                scores + c * tile.images, scratch.of_words);
  });
}

template <class Operand>
TemperatureGradients local_alignment_gradient(
    const TokenTile& tile, const float* similarity, const float* patch_mask, const float* mixed,
    const float* norms, const float* scores, const float* d_scores, float temp_attention,
    float temp_words, float min_norm, Operand* attention, Operand* d_similarity,
    Operand* weighted, float* d_norms) {
  std::vector<TemperatureGradients> by_caption(tile.captions);
  for_each_caption(tile, [&](int64_t c, const Scratch& scratch) {
    const int64_t row = tile.starts[c];
    const int64_t at = row * tile.columns();
    run<gradient_caption<Operand>>(similarity + at, patch_mask, mixed + at, norms + row,
                                   scores + c * tile.images, d_scores + c * tile.images,
                                   tile.words(c), tile.images, tile.patches, temp_attention,
                                   temp_words, min_norm, attention + at, d_similarity + at,
                                   weighted + at, d_norms + row, &by_caption[c], scratch);
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
                                       Operand*);                                                \
  template void local_alignment_scores(const TokenTile&, const float*, const Operand*,           \
                                       const float*, const float*, float, float, float*);        \
  template TemperatureGradients local_alignment_gradient(                                        \
      const TokenTile&, const float*, const float*, const float*, const float*, const float*,    \
      const float*, float, float, float, Operand*, Operand*, Operand*, float*);
MEDFAST_INSTANTIATE(float)
MEDFAST_INSTANTIATE(bf16)

}  // namespace medfast
