// What local_alignment_loss does with the words of one caption and the patches of one image.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "bf16.h"
#include "exponential.h"
#include "instruction_set.h"
#include "lanes.h"

namespace medfast {

struct TemperatureGradients {
  double attention;
  double words;
};

inline TemperatureGradients sum_of(const std::vector<TemperatureGradients>& parts) {
  TemperatureGradients sum{};
  for (const TemperatureGradients& part : parts) {
    sum.attention += part.attention;
    sum.words += part.words;
  }
  return sum;
}

// A row of patches for each word. If `is_padded`, there are zeros behind it, as in lanes.h.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  bool is_padded = false;

  MEDFAST_KERNEL T* of(int64_t word) const { return data + word * stride; }
};

struct Size {
  int64_t words;
  int64_t patches;
};

struct Temperatures {
  float attention;
  float words;
};

// Memory of a thread.
struct Scratch {
  // What `attend` leaves, for each word.
  float* over_words;  // [words, padded]
  float* attention;   // [words, padded], as it was rounded
  float* dots;        // [words]
  // For each word.
  float* d_sharpened;  // [words, padded]
  float* of_words;     // [words]
  // For all words.
  float* mask;     // [padded], 1 for every patch that counts
  float* highest;  // [padded], as the rest
  float* sums;
  float* similarity;
  float* mixed;
};

namespace local_alignment {

constexpr float kTiny = std::numeric_limits<float>::min();
// e^-60 and sums of such terms are far from what fp32 cannot hold.
constexpr float kHeadroom = 60.0f;

// Returns a row followed by zeros: `to`, if it must be copied.
MEDFAST_KERNEL const float* read_row(Rows<const float> rows, int64_t word, int64_t patches,
                                     float* to) {
  const float* from = rows.of(word);
  if (rows.is_padded) return from;
  const int64_t whole = patches / kLanes * kLanes;
#pragma omp simd
  for (int64_t p = 0; p < whole; ++p) to[p] = from[p];
  if (whole == patches) return to;
#pragma omp simd
  for (int64_t p = 0; p < kLanes; ++p) to[whole + p] = whole + p < patches ? from[whole + p] : 0.0f;
  return to;
}

template <class T>
MEDFAST_KERNEL void write_row(const float* from, float factor, int64_t patches, Rows<T> rows,
                              int64_t word) {
  T* to = rows.of(word);
  const int64_t whole = (rows.is_padded ? padded(patches) : patches) / kLanes * kLanes;
  store_all(from, factor, whole, to);
  if (whole >= patches) return;
  T last[kLanes];
  store_all(from + whole, factor, kLanes, last);
#pragma omp simd
  for (int64_t p = 0; p < kLanes; ++p)
    if (whole + p < patches) to[whole + p] = last[p];
}

// x as an operand has it.
template <class Operand>
MEDFAST_KERNEL float rounded(float x) {
  if constexpr (std::is_same_v<Operand, float>) return x;
  Operand stored;
  store(x, &stored);
  return load(&stored);
}

MEDFAST_KERNEL float dot(const float* x, const float* y, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

// over_words = softmax of the similarity over the words, but for the division by its sums, which
// become their inverses.
MEDFAST_KERNEL void softmax_over_words(Rows<const float> similarity, Size size, Scratch scratch) {
  const int64_t width = padded(size.patches);
  float* highest = scratch.highest;
  float* sums = scratch.sums;
  std::fill(highest, highest + width, -INFINITY);
  std::fill(sums, sums + width, 0.0f);
  for (int64_t t = 0; t < size.words; ++t) {
    const float* s = read_row(similarity, t, size.patches, scratch.over_words + t * width);
#pragma omp simd
    for (int64_t p = 0; p < width; ++p) highest[p] = s[p] > highest[p] ? s[p] : highest[p];
  }
  for (int64_t t = 0; t < size.words; ++t) {
    float* row = scratch.over_words + t * width;
    const float* s = similarity.is_padded ? similarity.of(t) : row;
#pragma omp simd
    for (int64_t p = 0; p < width; ++p) {
      row[p] = exponential(s[p] - highest[p]);
      sums[p] += row[p];
    }
  }
#pragma omp simd
  for (int64_t p = 0; p < width; ++p) sums[p] = 1.0f / sums[p];
}

// Divides a row of over_words by its sums, and writes the exponentials of the temperature times
// that. Returns their sum.
MEDFAST_KERNEL float exponentials_of_row(float* over_words, float temperature, int64_t width,
                                         float* row, Scratch scratch) {
  const float* inverse_sums = scratch.sums;
  const float* mask = scratch.mask;
  // Nothing is larger: of the other softmax no entry is above 1, or below 0.
  float highest = std::max(temperature, 0.0f);
  if (!(std::abs(temperature) <= kHeadroom)) {
    highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t p = 0; p < width; ++p) {
      const float x = mask[p] > 0.0f ? temperature * (over_words[p] * inverse_sums[p]) : -INFINITY;
      highest = x > highest ? x : highest;
    }
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < width; ++p) {
    over_words[p] *= inverse_sums[p];
    row[p] = mask[p] * exponential(temperature * over_words[p] - highest);
    sum += row[p];
  }
  return sum;
}

// Writes the attention: with the softmax of the similarity over the words, for every patch, the
// softmax over the patches of the temperature times that, 0 where the mask is 0. In `scratch`, also
// that first softmax and the sums of the similarity with the attention as weights.
template <class Operand>
MEDFAST_KERNEL void attend(Rows<const float> similarity, Size size, float temperature,
                           Rows<Operand> attention, Scratch scratch) {
  const int64_t width = padded(size.patches);
  softmax_over_words(similarity, size, scratch);
  // No row waits for the sum of the one before.
  float* sums = scratch.of_words;
  for (int64_t t = 0; t < size.words; ++t)
    sums[t] = exponentials_of_row(scratch.over_words + t * width, temperature, width,
                                  scratch.attention + t * width, scratch);
  for (int64_t t = 0; t < size.words; ++t) {
    const float inverse = 1.0f / sums[t];
    float* row = scratch.attention + t * width;
#pragma omp simd
    for (int64_t p = 0; p < width; ++p) row[p] = rounded<Operand>(inverse * row[p]);
    write_row(row, 1.0f, size.patches, attention, t);
    scratch.dots[t] = dot(row, similarity.of(t), size.patches);
  }
}

struct Cosine {
  float value;
  float context_norm;
};

MEDFAST_KERNEL Cosine cosine(float dot, float square, float word_norm, float min_norm) {
  // What rounding leaves of a context that nearly vanishes may be less than its share along the
  // word, or negative: no cosine is above 1. NaN stays NaN.
  const float least = std::abs(dot) / (word_norm < kTiny ? kTiny : word_norm);
  const float found = square < 0.0f ? 0.0f : std::sqrt(square);
  const float norm = found < least ? least : found;
  const float divisor = word_norm * norm;
  return {dot / (divisor < min_norm ? min_norm : divisor), norm};
}

// Writes the score, the log-sum-exp of temperature * cosine over the words. dots: as `attend`
// leaves them; mixed: the attention times the image's Gram matrix; norms: of the words.
MEDFAST_KERNEL void score(Rows<const float> attention, Rows<const float> mixed, const float* dots,
                          const float* norms, Size size, float temperature, float min_norm,
                          float* logits, float* to) {
  for (int64_t t = 0; t < size.words; ++t)
    logits[t] = dot(attention.of(t), mixed.of(t), size.patches);
  float highest = -INFINITY;
  for (int64_t t = 0; t < size.words; ++t) {
    logits[t] = temperature * cosine(dots[t], logits[t], norms[t], min_norm).value;
    highest = logits[t] > highest ? logits[t] : highest;
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < size.words; ++t) sum += exponential(logits[t] - highest);
  *to = highest + std::log(sum);
}

// After `attend`: writes d_similarity, and weighted = attention times twice the gradient of
// |context|^2. Adds to the gradients of the norms and of the temperatures.
template <class Operand>
MEDFAST_KERNEL void gradient(Rows<const float> similarity, Rows<const float> mixed,
                             const float* norms, float score, float d_score, Size size,
                             Temperatures temperatures, float min_norm, Rows<Operand> d_similarity,
                             Rows<Operand> weighted, float* d_norms,
                             TemperatureGradients* d_temperatures, Scratch scratch) {
  const int64_t width = padded(size.patches);
  float* d_dots = scratch.of_words;
  float* d_sums = scratch.highest;
  std::fill(d_sums, d_sums + width, 0.0f);
  for (int64_t t = 0; t < size.words; ++t) {
    const float* a = scratch.attention + t * width;
    const float* s = read_row(similarity, t, size.patches, scratch.similarity);
    const float* m = read_row(mixed, t, size.patches, scratch.mixed);
    const float square = dot(a, m, width);
    const Cosine found = cosine(scratch.dots[t], square, norms[t], min_norm);
    // A word takes the share of its caption's gradient that it has in the log-sum-exp.
    const float share = d_score * exponential(temperatures.words * found.value - score);
    const float divisor = norms[t] * found.context_norm;
    const float d_dot = share * temperatures.words / (divisor < min_norm ? min_norm : divisor);
    const float d_divisor = divisor > min_norm ? -d_dot * found.value : 0.0f;
    const float d_square =
        d_divisor * norms[t] / (found.context_norm < kTiny ? kTiny : found.context_norm);
    d_norms[t] += d_divisor * found.context_norm;
    d_temperatures->words += share * found.value;
    d_dots[t] = d_dot;
    write_row(a, d_square, size.patches, weighted, t);

    const float* over_words = scratch.over_words + t * width;
    float* d_sharpened = scratch.d_sharpened + t * width;
    // Of the attention's gradient, with the attention as weights.
    const float mean = d_dot * scratch.dots[t] + d_square * square;
#pragma omp simd
    for (int64_t p = 0; p < width; ++p) {
      d_sharpened[p] = a[p] * (d_dot * s[p] + d_square * m[p] - mean) * over_words[p];
      d_sums[p] += d_sharpened[p];
    }
  }
  float* row = scratch.similarity;
  for (int64_t t = 0; t < size.words; ++t) {
    const float d_dot = d_dots[t];
    const float* over_words = scratch.over_words + t * width;
    const float* d_sharpened = scratch.d_sharpened + t * width;
    const float* a = scratch.attention + t * width;
    // The parts of the first term may be large, and cancel.
#pragma omp simd
    for (int64_t p = 0; p < width; ++p)
      row[p] = temperatures.attention * (d_sharpened[p] - over_words[p] * d_sums[p]) + d_dot * a[p];
    write_row(row, 1.0f, size.patches, d_similarity, t);
  }
  d_temperatures->attention += std::accumulate(d_sums, d_sums + width, 0.0);
}

}  // namespace local_alignment
}  // namespace medfast
