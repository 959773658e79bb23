// Crops of decoded images, normalised: what stands between a loader and an image tower.

#pragma once

#include <cuda_runtime_api.h>

#include "arithmetic/normalize_crops.h"
#include "cuda/launch.h"

namespace medfast::cuda {

// out[b, i, j, c] = images[b, y_b + i, x_b + j, c] * factor[c] + shift[c], rounded to `dtype`, in
// the order of memory that torch calls channels last. Throws std::invalid_argument for a crop of
// 2^32 values or more.
void normalize_crops(const Crops& crops, const Affine& affine, void* out, Dtype dtype,
                     cudaStream_t stream);

}  // namespace medfast::cuda
