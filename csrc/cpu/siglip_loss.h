// The pass of siglip_loss over one tile of logits [rows, columns], fp32, all of them negatives.

#pragma once

#include <cstdint>

namespace medfast {

struct SiglipSums {
  double loss;         // of softplus(t)
  double d_bias;       // of sigmoid(t)
  double d_log_scale;  // of sigmoid(t) * l_ij; terms of l_ij = -infinity are left out
};

// With t = l_ij + bias: gradient_ij = sigmoid(t), contiguous, Out is float or bf16; not written
// where gradient is null. The sums do not depend on the number of threads.
template <class Out>
SiglipSums siglip_loss_pass(const float* logits, int64_t stride, int64_t rows, int64_t columns,
                            float bias, Out* gradient);

}  // namespace medfast
