// fp16 as storage of numbers that a factor has brought near 1: it has three bits more than bf16.

#pragma once

#include <cmath>
#include <cstdint>

#include "bits.h"
#include "instruction_set.h"

namespace medfast {

struct fp16 {
  uint16_t bits;
};

// Stores x, rounded to the nearest, ties to even. Below 2^-14 it becomes 0, so that no denormal is
// ever met, and what is not below 65520 NaN: with an infinity nothing is left of a loss either.
MEDFAST_KERNEL void store(float x, fp16* to) {
  constexpr uint32_t kExponents = 112u << 23;
  constexpr uint32_t kSmallest = 113u << 23;
  constexpr uint32_t kLargest = 0x7bff;
  constexpr uint32_t kNan = 0x7e00;
  const uint32_t bits = bits_of(x);
  const uint32_t size = bits & 0x7fffffff;
  uint32_t rounded = (size + 0xfff + (size >> 13 & 1) - kExponents) >> 13;
  rounded = rounded > kLargest ? kNan : rounded;
  rounded = size < kSmallest ? 0 : rounded;
  to->bits = static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000));
}

MEDFAST_KERNEL float load(const fp16* from) {
  // The sign is extended, so it is still the highest bit of what has been shifted.
  const auto wide = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(from->bits)));
  const float x = float_of(wide << 13 & 0x8fffe000) * 0x1p112f;
  return x < 65536.0f && x > -65536.0f ? x : NAN;
}

}  // namespace medfast
