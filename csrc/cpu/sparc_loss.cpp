#include "sparc_loss.h"

#include <cmath>
#include <vector>

#include "exponential.h"
#include "instruction_set.h"

namespace medfast {
namespace {

struct Range {
  float low;
  float spread;
  bool is_constant;
};

MEDFAST_KERNEL Range range_of(const float* row, const float* mask, int64_t patches,
                              float constant) {
  float high = -INFINITY;
  float low = INFINITY;
#pragma omp simd reduction(max : high) reduction(min : low)
  for (int64_t p = 0; p < patches; ++p) {
    const float above = mask[p] > 0.0f ? row[p] : -INFINITY;
    const float below = mask[p] > 0.0f ? row[p] : INFINITY;
    high = above > high ? above : high;
    low = below < low ? below : low;
  }
  const float spread = high - low;
  const float largest = std::fabs(high) > std::fabs(low) ? std::fabs(high) : std::fabs(low);
  return {low, spread, spread <= constant * largest};
}

MEDFAST_KERNEL float share(float similarity, float mask, const Range& range, float least) {
  const float x = (similarity - range.low) / range.spread;
  return mask > 0.0f && !(x < least) ? x : 0.0f;
}

MEDFAST_KERNEL void align_row(const float* row, const float* mask, int64_t patches, float least,
                              float constant, float* weights) {
  const Range range = range_of(row, mask, patches, constant);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < patches; ++p) {
    weights[p] = range.is_constant ? mask[p] : share(row[p], mask[p], range, least);
    sum += weights[p];
  }
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t p = 0; p < patches; ++p) weights[p] *= inverse;
}

MEDFAST_KERNEL void align_gradient_row(const float* row, const float* mask, int64_t patches,
                                       float least, float constant, float* gradient) {
  const Range range = range_of(row, mask, patches, constant);
  if (range.is_constant) {
    for (int64_t p = 0; p < patches; ++p) gradient[p] = 0;
    return;
  }
  float sum = 0;
  float dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t p = 0; p < patches; ++p) {
    const float x = share(row[p], mask[p], range, least);
    sum += x;
    dot += x * gradient[p];
  }
  const float mean = dot / sum;
  const float factor = 1.0f / (sum * range.spread);
  float total = 0;
  float of_highest = 0;
#pragma omp simd reduction(+ : total, of_highest)
  for (int64_t p = 0; p < patches; ++p) {
    const float x = share(row[p], mask[p], range, least);
    gradient[p] = x > 0.0f ? (gradient[p] - mean) * factor : 0.0f;
    total += gradient[p];
    of_highest += gradient[p] * x;
  }
  // The lowest and the highest, of equals the first, move every share of their row.
  int64_t lowest = -1;
  int64_t highest = -1;
  for (int64_t p = patches - 1; p >= 0; --p) {
    if (!(mask[p] > 0.0f)) continue;
    if (row[p] == range.low) lowest = p;
    if (highest < 0 || row[p] >= row[highest]) highest = p;
  }
  if (lowest < 0) return;  // NaN
  gradient[highest] -= of_highest;
  gradient[lowest] -= total - of_highest;
}

MEDFAST_KERNEL void norm_row(const float* row, int64_t width, float* norm) {
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < width; ++d) square += row[d] * row[d];
  *norm = std::sqrt(square);
}

MEDFAST_KERNEL void add_row(const float* row, int64_t width, float factor, float* out) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) out[d] += factor * row[d];
}

float softplus(float x) { return x > 0.0f ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// The log-sum-exps of all rows and columns of [n, n], own entries left out; -inf for n = 1.
MEDFAST_KERNEL void log_sum_exps(const float* logits, int64_t n, float* rows, float* columns,
                                 float* highest) {
  for (int64_t j = 0; j < n; ++j) {
    highest[j] = -INFINITY;
    columns[j] = 0;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float* row = logits + i * n;
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < n; ++j) {
      const float x = i == j ? -INFINITY : row[j];
      most = x > most ? x : most;
      highest[j] = x > highest[j] ? x : highest[j];
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += i == j ? 0.0f : exponential(row[j] - most);
    rows[i] = n > 1 ? most + std::log(sum) : -INFINITY;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float* row = logits + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
      columns[j] += i == j ? 0.0f : exponential(row[j] - highest[j]);
  }
  for (int64_t j = 0; j < n; ++j)
    columns[j] = n > 1 ? highest[j] + std::log(columns[j]) : -INFINITY;
}

// The gradient of the logits but own ones, [n, n], from the log-sum-exps over all.
MEDFAST_KERNEL void weigh(const float* logits, int64_t n, const float* rows, const float* columns,
                          float weight, float* gradient) {
  for (int64_t i = 0; i < n; ++i)
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
      gradient[i * n + j] = weight * (exponential(logits[i * n + j] - rows[i]) +
                                      exponential(logits[i * n + j] - columns[j]));
}

float log_add_exp(float a, float b) {
  const float high = a > b ? a : b;
  const float low = a > b ? b : a;
  return high + std::log1p(std::exp(low - high));
}

SparcSums contrast(const float* contexts, const float* words, int64_t n, int64_t width, float scale,
                   float weight, float min_norm, float* products, float* through_contexts,
                   float* through_words) {
  std::vector<float> lengths(2 * n), inverse(2 * n), sums(3 * n), cosines(n * n),
      logits(n * n);
  for (int64_t i = 0; i < 2 * n; ++i)
    run<norm_row>(i < n ? contexts + i * width : words + (i - n) * width, width, &lengths[i]);
  for (int64_t i = 0; i < 2 * n; ++i)
    inverse[i] = 1.0f / (lengths[i] < min_norm ? min_norm : lengths[i]);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      cosines[i * n + j] = products[i * n + j] * inverse[i] * inverse[n + j];
      logits[i * n + j] = scale * cosines[i * n + j];
    }

  float* const rows = sums.data();
  float* const columns = rows + n;
  run<log_sum_exps>(logits.data(), n, rows, columns, columns + n);
  SparcSums total{};
  std::vector<float> d_own(n);
  for (int64_t i = 0; i < n; ++i) {
    const float own = logits[i * n + i];
    total.loss += softplus(rows[i] - own) + softplus(columns[i] - own);
    d_own[i] = -weight * (sigmoid(rows[i] - own) + sigmoid(columns[i] - own));
    rows[i] = log_add_exp(rows[i], own);
    columns[i] = log_add_exp(columns[i], own);
  }
  run<weigh>(logits.data(), n, rows, columns, weight, products);
  for (int64_t i = 0; i < n; ++i) products[i * n + i] = d_own[i];

  // The derivative of a unit vector has no part along it, unless it was divided by more than its
  // own length.
  std::vector<double> along(2 * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double both = static_cast<double>(products[i * n + j]) * cosines[i * n + j];
      total.d_scale += both;
      along[i] += scale * both;
      along[n + j] += scale * both;
      products[i * n + j] *= scale * inverse[i] * inverse[n + j];
    }
  for (int64_t i = 0; i < 2 * n; ++i) {
    const float through =
        lengths[i] > min_norm ? static_cast<float>(-along[i]) * inverse[i] * inverse[i] : 0.0f;
    (i < n ? through_contexts : through_words - n)[i] = through;
  }
  return total;
}

}  // namespace

void sparc_loss_align(const float* similarity, const float* mask, int64_t n, int64_t patches,
                      float least, float constant, float* weights) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < n; ++t)
    run<align_row>(similarity + t * patches, mask, patches, least, constant,
                   weights + t * patches);
}

void sparc_loss_align_gradient(const float* similarity, const float* mask, int64_t n,
                               int64_t patches, float least, float constant, float* gradient) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < n; ++t)
    run<align_gradient_row>(similarity + t * patches, mask, patches, least, constant,
                            gradient + t * patches);
}

SparcSums sparc_loss_contrast(const float* contexts, const float* words, int64_t pairs, int64_t n,
                              int64_t width, float scale, float weight, float min_norm,
                              float* products, float* through_contexts, float* through_words) {
  std::vector<SparcSums> by_pair(pairs);
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < pairs; ++k)
    by_pair[k] = contrast(contexts + k * n * width, words + k * n * width, n, width, scale, weight,
                          min_norm, products + k * n * n, through_contexts + k * n,
                          through_words + k * n);
  SparcSums total{};
  for (const SparcSums& pair : by_pair) {
    total.loss += pair.loss;
    total.d_scale += pair.d_scale;
  }
  return total;
}

void sparc_loss_add_rows(const float* rows, const float* factors, int64_t n, int64_t width,
                         float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; ++i)
    run<add_row>(rows + i * width, width, factors[i], out + i * width);
}

}  // namespace medfast
