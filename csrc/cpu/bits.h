// The bits of a float, and the float of bits.

#pragma once

#include <cstdint>
#include <cstring>

#include "instruction_set.h"

namespace medfast {

MEDFAST_KERNEL uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MEDFAST_KERNEL float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace medfast
