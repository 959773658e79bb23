// bf16 as storage: the upper half of a float.

#pragma once

#include <cstdint>

#include "arithmetic/bf16.h"
#include "bits.h"
#include "instruction_set.h"

namespace medfast {

struct bf16 {
  uint16_t bits;
};

// Stores x, rounded.
MEDFAST_KERNEL void store(float x, float* to) { *to = x; }

MEDFAST_KERNEL void store(float x, bf16* to) {
  to->bits = upper_half(x);
}

MEDFAST_KERNEL float load(const float* from) { return *from; }

MEDFAST_KERNEL float load(const bf16* from) {
  return float_of(static_cast<uint32_t>(from->bits) << 16);
}

}  // namespace medfast
