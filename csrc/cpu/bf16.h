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

// Many at once, times a factor. Entries of 16 bits are rounded in a loop of their own: in one loop
// with those of 32 bits, compilers use vectors of half the width.
template <class T>
MEDFAST_KERNEL void store_all(const float* from, float factor, int64_t count, T* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(factor * from[i], to + i);
}

}  // namespace medfast
