// 2^x, the exponential that GPUs have in hardware.

#pragma once

#include <cmath>

#include "arithmetic/host_device.h"

namespace medfast {

template <class T>
constexpr T kLog2E = static_cast<T>(1.4426950408889634074);
template <class T>
constexpr T kLn2 = static_cast<T>(0.69314718055994530942);

MEDFAST_HD double power_of_two(double x) { return exp2(x); }

// On a GPU within two roundings, and 0 below 2^-126.
MEDFAST_HD float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

MEDFAST_HD double log_of_two(double x) { return log2(x); }
MEDFAST_HD float log_of_two(float x) { return log2f(x); }

}  // namespace medfast
