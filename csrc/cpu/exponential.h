// e^x in a form that compilers turn into vector code.

#pragma once

#include <cstdint>

#include "bits.h"
#include "instruction_set.h"

namespace medfast {

// Relative error below 1e-7. x is clamped to [-87, 88]: denormal results would be many times
// slower, infinite ones would hide how far off they are. NaN stays NaN.
MEDFAST_KERNEL float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits of the sum.
  const float magic = 12582912.0f;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  // n times the first part of ln 2 is exact, with or without fused multiply-add.
  const float r = (x - n * 0.693359375f) + n * 0.00021219444f;
  // Minimax polynomial of e^r on |r| <= ln(2) / 2 in relative error.
  float p = 0.0013838327f;
  p = p * r + 0.0083691655f;
  p = p * r + 0.0416681021f;
  p = p * r + 0.1666651666f;
  p = p * r + 0.4999999404f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The exponent field of 2^n.
  return p * float_of((bits_of(shifted) + 127) << 23);
}

}  // namespace medfast
