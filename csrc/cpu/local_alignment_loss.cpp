#include "local_alignment_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bf16.h"
#include "exponential.h"

namespace medfast {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();

// The kernels below are about one caption of n words; columns = images * patches.

// over_words = softmax of the similarity over the rows.
MEDFAST_KERNEL void softmax_over_rows(const float* similarity, int64_t n, int64_t columns,
                                      float* over_words, float* scratch) {
  float* highest = scratch;
  float* sums = scratch + columns;
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
    float* out = over_words + t * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      out[c] = exponential(row[c] - highest[c]);
      sums[c] += out[c];
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) sums[c] = 1.0f / sums[c];
  for (int64_t t = 0; t < n; ++t) {
    float* out = over_words + t * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) out[c] *= sums[c];
  }
}

// attention = softmax of temperature * over_words over the patches of one row of one image.
template <class Operand>
MEDFAST_KERNEL void softmax_of_row(const float* over_words, const float* mask, int64_t patches,
                                   float temperature, Operand* attention, float* scratch) {
  float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
  for (int64_t p = 0; p < patches; ++p) {
    const float x = mask[p] > 0.0f ? temperature * over_words[p] : -INFINITY;
    highest = x > highest ? x : highest;
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < patches; ++p) {
    scratch[p] = mask[p] * exponential(temperature * over_words[p] - highest);
    sum += scratch[p];
  }
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t p = 0; p < patches; ++p) store(scratch[p] * inverse, attention + p);
}

template <class Operand>
MEDFAST_KERNEL void attend_caption(const float* similarity, const float* patch_mask, int64_t n,
                                   int64_t images, int64_t patches, float temperature,
                                   float* over_words, Operand* attention, float* scratch) {
  softmax_over_rows(similarity, n, images * patches, over_words, scratch);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t j = 0; j < images; ++j) {
      const int64_t at = (t * images + j) * patches;
      softmax_of_row(over_words + at, patch_mask + j * patches, patches, temperature,
                     attention + at, scratch);
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
MEDFAST_KERNEL void gradient_caption(const float* similarity, const float* over_words,
                                     const Operand* attention, const float* mixed,
                                     const float* norms, const float* scores,
                                     const float* d_scores, int64_t n, int64_t images,
                                     int64_t patches, float temp_attention, float temp_words,
                                     float min_norm, Operand* d_similarity, Operand* weighted,
                                     float* d_norms, TemperatureGradients* d_temperatures,
                                     float* scratch, float* d_sharpened, float* d_dots) {
  const int64_t columns = images * patches;
  float* column_sums = scratch;
  float* d_row = scratch + columns;
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

}  // namespace

template <class Operand>
void local_alignment_attend(const TokenTile& tile, const float* similarity,
                            const float* patch_mask, float temperature, float* over_words,
                            Operand* attention) {
  const int64_t columns = tile.columns();
#pragma omp parallel
  {
    std::vector<float> scratch(2 * columns);
    // In turn, since captions are sorted by length.
#pragma omp for schedule(static, 1)
    for (int64_t c = 0; c < tile.captions; ++c) {
      const int64_t at = tile.starts[c] * columns;
      run<attend_caption<Operand>>(similarity + at, patch_mask,
                                   tile.words(c), tile.images, tile.patches, temperature, over_words + at, attention + at, scratch.data());
    }
  }
}

template <class Operand>
void local_alignment_scores(const TokenTile& tile, const float* similarity,
                            const Operand* attention, const float* mixed, const float* norms,
                            float temperature, float min_norm, float* scores) {
  const int64_t columns = tile.columns();
  const int64_t most = tile.longest();
#pragma omp parallel
  {
    std::vector<float> logits(most);
#pragma omp for schedule(static, 1)
    for (int64_t c = 0; c < tile.captions; ++c) {
      const int64_t row = tile.starts[c];
      const int64_t at = row * columns;
      run<score_caption<Operand>>(similarity + at, attention + at, mixed + at, norms + row,
                                  tile.words(c), tile.images, tile.patches, temperature,
                                  min_norm, scores + c * tile.images, logits.data());
    }
  }
}

template <class Operand>
TemperatureGradients local_alignment_gradient(
    const TokenTile& tile, const float* similarity, const float* over_words,
    const Operand* attention, const float* mixed, const float* norms, const float* scores,
    const float* d_scores, float temp_attention, float temp_words, float min_norm,
    Operand* d_similarity, Operand* weighted, float* d_norms) {
  const int64_t columns = tile.columns();
  const int64_t most = tile.longest();
  std::vector<TemperatureGradients> by_caption(tile.captions);
#pragma omp parallel
  {
    std::vector<float> scratch(2 * columns), d_sharpened(most * columns),
        d_dots(most * tile.images);
#pragma omp for schedule(static, 1)
    for (int64_t c = 0; c < tile.captions; ++c) {
      const int64_t row = tile.starts[c];
      const int64_t at = row * columns;
      run<gradient_caption<Operand>>(
          similarity + at, over_words + at, attention + at, mixed + at, norms + row,
          scores + c * tile.images, d_scores + c * tile.images, tile.words(c),
          tile.images, tile.patches, temp_attention, temp_words, min_norm, d_similarity + at,
          weighted + at, d_norms + row, &by_caption[c], scratch.data(), d_sharpened.data(),
          d_dots.data());
    }
  }
  TemperatureGradients total{};
  for (const TemperatureGradients& part : by_caption) {
    total.attention += part.attention;
    total.words += part.words;
  }
  return total;
}

#define MEDFAST_INSTANTIATE(Operand)                                                             \
  template void local_alignment_attend(const TokenTile&, const float*, const float*, float,      \
                                       float*, Operand*);                                        \
  template void local_alignment_scores(const TokenTile&, const float*, const Operand*,           \
                                       const float*, const float*, float, float, float*);        \
  template TemperatureGradients local_alignment_gradient(                                        \
      const TokenTile&, const float*, const float*, const Operand*, const float*, const float*,  \
      const float*, const float*, float, float, float, Operand*, Operand*, float*);
MEDFAST_INSTANTIATE(float)
MEDFAST_INSTANTIATE(bf16)

}  // namespace medfast
