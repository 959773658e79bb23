#include "cuda/rank_merge.h"

namespace medfast::cuda {
namespace {

constexpr int kThreads = 256;

template <class Merge>
__global__ void __launch_bounds__(kThreads)
    rank_merge_kernel(const __grid_constant__ Vectors sources,
                      const __grid_constant__ Vectors targets, int64_t length, bool is_aligned) {
  merge_at<Merge>(sources, targets, length, is_aligned,
                  int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

}  // namespace

void rank_merge(const Vectors& sources, const Vectors& targets, int64_t length,
                bool is_log_sum_exp, cudaStream_t stream) {
  if (length == 0) return;
  const bool is_aligned = are_aligned(sources) && are_aligned(targets);
  const int64_t blocks = (merge_places(length, is_aligned) + kThreads - 1) / kThreads;
  const auto kernel =
      is_log_sum_exp ? rank_merge_kernel<LogSumExp<float>> : rank_merge_kernel<Sum<float>>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(sources, targets, length,
                                                                 is_aligned);
  check(cudaGetLastError(), "rank_merge");
}

}  // namespace medfast::cuda
