// Sums of exponentials with a running maximum, of numbers in powers of two (times log2 e).

#pragma once

#include <cmath>

#include "arithmetic/power.h"

namespace medfast {

// The sum is sum * 2^highest. NaN stays NaN, and so does what holds two infinities of one sign.
template <class T>
struct LogSum {
  T highest = -static_cast<T>(INFINITY);
  T sum = 0;

  MEDFAST_HD void add(T x) { merge({x, 1}); }

  MEDFAST_HD void merge(const LogSum& other) {
    // -infinity less itself is no number: what is empty adds 0.
    const T most = highest < other.highest ? other.highest : highest;
    const T shift = most == -static_cast<T>(INFINITY) ? 0 : most;
    sum = sum * power_of_two(highest - shift) + other.sum * power_of_two(other.highest - shift);
    highest = most;
  }

  // The natural logarithm of the sum.
  MEDFAST_HD T value() const {
    const T shift = highest == -static_cast<T>(INFINITY) ? 0 : highest;
    return (shift + log_of_two(sum)) * kLn2<T>;
  }
};

}  // namespace medfast
