// Rounding of a float to bf16, which is its upper half.

#pragma once

#include <cstdint>
#include <cstring>

#include "arithmetic/host_device.h"

namespace medfast {

// The nearest, ties to even, but for NaN. Vector code comes of it.
MEDFAST_HD uint16_t upper_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace medfast
