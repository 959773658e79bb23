// What every launcher of a kernel shares.

#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace medfast::cuda {

// The dtype of features, as the bindings take it.
enum class Dtype { fp32 = 0, bf16 = 1, fp16 = 2 };

// Throws CUDA's own sentence, which becomes a RuntimeError. After a launch `error` is
// cudaGetLastError(): what fails while the kernel runs shows at a later call, as for any kernel.
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace medfast::cuda
