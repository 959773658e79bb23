#include "siglip_loss.h"

#include <cmath>
#include <vector>

#include "bf16.h"
#include "exponential.h"
#include "logarithm.h"

namespace medfast {
namespace {

template <class Out>
MEDFAST_KERNEL void pass_row(const float* row, int64_t columns, float bias, Out* gradient,
                             SiglipSums* sums) {
  float loss = 0;
  float d_bias = 0;
  float d_log_scale = 0;
#pragma omp simd reduction(+ : loss, d_bias, d_log_scale)
  for (int64_t j = 0; j < columns; ++j) {
    const float t = row[j] + bias;
    const float e = exponential(t < 0.0f ? t : -t);
    const float inverse = 1.0f / (1.0f + e);
    const float sigmoid = t < 0.0f ? e * inverse : inverse;
    // NaN is neither below 0 nor above it; it passes through the exponential.
    loss += (t > 0.0f ? t : 0.0f) + log1p_of_unit(e);
    d_bias += sigmoid;
    d_log_scale += row[j] == -INFINITY ? 0.0f : sigmoid * row[j];
    if (gradient != nullptr) store(sigmoid, gradient + j);
  }
  *sums = {loss, d_bias, d_log_scale};
}

}  // namespace

template <class Out>
SiglipSums siglip_loss_pass(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                            float bias, Out* gradient) {
  std::vector<SiglipSums> by_row(rows);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    run<pass_row<Out>>(logits + i * stride, columns, bias,
                       gradient == nullptr ? nullptr : gradient + i * columns, &by_row[i]);
  SiglipSums sums{};
  for (const SiglipSums& row : by_row) {
    sums.loss += row.loss;
    sums.d_bias += row.d_bias;
    sums.d_log_scale += row.d_log_scale;
  }
  return sums;
}

template SiglipSums siglip_loss_pass(const float*, int64_t, int64_t, int64_t, float, float*);
template SiglipSums siglip_loss_pass(const float*, int64_t, int64_t, int64_t, float, bf16*);

}  // namespace medfast
