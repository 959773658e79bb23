// log(1 + x) for x in [0, 1] in a form that compilers turn into vector code.

#pragma once

#include "instruction_set.h"

namespace medfast {

// Relative error below 3e-7, also for the smallest x.
MEDFAST_KERNEL float log1p_of_unit(float x) {
  // log(1 + x) = 2 artanh(w), an odd series in w = x / (2 + x) <= 1/3.
  const float w = x / (2.0f + x);
  const float v = w * w;
  float p = 1.0f / 13.0f;
  p = p * v + 1.0f / 11.0f;
  p = p * v + 1.0f / 9.0f;
  p = p * v + 1.0f / 7.0f;
  p = p * v + 1.0f / 5.0f;
  p = p * v + 1.0f / 3.0f;
  p = p * v + 1.0f;
  return 2.0f * w * p;
}

}  // namespace medfast
