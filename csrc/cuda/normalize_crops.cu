#include "cuda/normalize_crops.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>

namespace medfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostInY = 65535;

struct Half {
  __half value;
};

__device__ void round_to(float x, Half* to) { to->value = __float2half_rn(x); }

// The grid's x are places in a crop, its y are crops.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    normalize_crops_kernel(const __grid_constant__ Crops crops,
                           const __grid_constant__ Affine affine, Out* out) {
  normalize_at(crops, affine, out, blockIdx.x * kThreads + threadIdx.x, blockIdx.y, gridDim.y);
}

template <class Out>
void launch(const Crops& crops, const Affine& affine, void* out, cudaStream_t stream) {
  const int64_t blocks = (crop_places(crops) + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(std::min(crops.count, kMostInY)));
  normalize_crops_kernel<<<grid, kThreads, 0, stream>>>(crops, affine, static_cast<Out*>(out));
  check(cudaGetLastError(), "normalize_crops");
}

}  // namespace

void normalize_crops(const Crops& crops, const Affine& affine, void* out, Dtype dtype,
                     cudaStream_t stream) {
  // A place is a number of 32 bits, which divides faster than one of 64.
  if (crops.crop_height * crops.crop_width >= (int64_t{1} << 32) / kChannels)
    throw std::invalid_argument("normalize_crops: a crop must have less than 2^32 values");
  if (dtype == Dtype::bf16) return launch<UpperHalf>(crops, affine, out, stream);
  if (dtype == Dtype::fp16) return launch<Half>(crops, affine, out, stream);
  launch<float>(crops, affine, out, stream);
}

}  // namespace medfast::cuda
