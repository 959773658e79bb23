// What the ranks have of a vector, made one through pointers to the memory of all of them.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arithmetic/rank_merge.h"
#include "cuda/launch.h"

namespace medfast::cuda {

// Each target's [i] = what all sources' [i] are together, in the order of the sources: the
// log-sum-exp of log-sum-exps, or their sum.
void rank_merge(const Vectors& sources, const Vectors& targets, int64_t length,
                bool is_log_sum_exp, cudaStream_t stream);

}  // namespace medfast::cuda
