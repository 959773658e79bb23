// Rows in memory of the kernels are followed by zeros up to a whole number of vectors: what is left
// over would be a good part of the time, an entry at a time.

#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace medfast {

constexpr int64_t kLanes = 16;

MEDFAST_KERNEL int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

}  // namespace medfast
