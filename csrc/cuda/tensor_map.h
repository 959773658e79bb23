// How a matrix of features is named to the copies of boxes of sm_90a.

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace medfast::cuda {

// The driver's function that makes maps; it is asked for by name, so that nothing links to a driver.
inline decltype(&cuTensorMapEncodeTiled) encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                         cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
  if (result != cudaDriverEntryPointSuccess)
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is too old");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// The map of a matrix [length, D] whose boxes are slabs [rows, 64], permuted as `swizzled` says.
template <class Feature>
CUtensorMap slabs_of(const void* matrix, int64_t length, int64_t D, int rows) {
  static const auto encode = encoder();
  // The driver wants the device's context, which a thread that has launched nothing has not yet.
  int device;
  check(cudaGetDevice(&device), "cuTensorMapEncodeTiled");
  check(cudaSetDevice(device), "cuTensorMapEncodeTiled");
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(length)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(D) * sizeof(Feature)};
  const cuuint32_t box[] = {kSlab, static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult done = encode(
      &map,
      std::is_same_v<Feature, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (done != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(done)));
  return map;
}

}  // namespace medfast::cuda
