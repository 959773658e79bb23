// bf16 as storage: the upper half of a float.

#pragma once

#include <cstdint>
#include <cstring>

#include "arithmetic/bf16.h"
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
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace medfast
