#include "cuda/clip_loss.h"

#include <cuda_runtime.h>

#include "cuda/clip_loss_passes.h"
#include "cuda/clip_loss_sums.h"
#include "cuda/tensor_map.h"
#include "cuda/tile_products.h"

namespace medfast::cuda {
namespace {

// The kernels for sm_90a multiply by groups; for all else, and where a batch is not one for a
// single shift, blocks do.
template <class Feature, class Pass>
__global__ void __launch_bounds__(BlockLayout::kThreads, 2)
    clip_loss_block_kernel(const Feature* rows, const Feature* columns,
                           const __grid_constant__ Rectangle r,
                           const __grid_constant__ typename Pass::Arguments arguments) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  block_tiles<Feature, Pass>(rows, columns, r, arguments,
                             *reinterpret_cast<BlockShared<Pass>*>(shared));
#endif
}

template <class Feature, class Pass>
__global__ void __launch_bounds__(kGroupThreads, 1)
    clip_loss_group_kernel(const __grid_constant__ TensorMap rows,
                           const __grid_constant__ TensorMap columns,
                           const __grid_constant__ Rectangle r,
                           const __grid_constant__ typename Pass::Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  group_tiles<Feature, Pass>(&rows, &columns, r, arguments,
                             *reinterpret_cast<GroupShared<Pass>*>(shared));
#endif
}

template <class Feature>
__global__ void __launch_bounds__(BlockLayout::kThreads) clip_loss_online_kernel(
    const Feature* rows, const Feature* columns, const __grid_constant__ Rectangle r,
    const __grid_constant__ ClipLossOnline<BlockLayout>::Arguments arguments) {
  using Pass = ClipLossOnline<BlockLayout>;
  extern __shared__ __align__(1024) unsigned char shared[];
  if (clip_loss_any(arguments.flags, arguments.flag_count, BlockLayout::kThreads))
    block_tiles<Feature, Pass>(rows, columns, r, arguments,
                               *reinterpret_cast<BlockShared<Pass>*>(shared));
}

template <class Feature>
__global__ void __launch_bounds__(kSumThreads)
    clip_loss_end_kernel(const __grid_constant__ Rectangle r,
                         const __grid_constant__ ClipLossEnds<Feature> ends) {
  clip_loss_end(r, ends);
}

__global__ void __launch_bounds__(kRangeThreads)
    clip_loss_range_kernel(const __grid_constant__ ClipLossRange range) {
  __shared__ float shared[kRangeThreads / 32];
  clip_loss_range(range, shared);
}

// Calls `run` with a pointer to the type of the features.
template <class Run>
void with_feature(Dtype dtype, const Run& run) {
  if (dtype == Dtype::bf16) return run(static_cast<const bf16*>(nullptr));
  if (dtype == Dtype::fp16) return run(static_cast<const fp16*>(nullptr));
  throw std::invalid_argument("the CUDA kernels of clip_loss take bf16 and fp16 alone");
}

Rectangle rectangle(const ClipLossFeatures& f, const ClipLossSpan& s) {
  return {f.M,          f.N,           f.D,           f.offset,       s.row_start,
          s.row_stop,   s.column_start, s.column_stop, s.parts};
}

unsigned grid(int64_t blocks) {
  if (blocks >= int64_t{1} << 31) throw std::invalid_argument("clip_loss: too many tiles");
  return static_cast<unsigned>(blocks);
}

// Launches a kernel that takes more shared memory than is given without asking, in clusters of
// `together` blocks.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, int together,
            cudaStream_t stream, const char* what, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        what);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = together;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = grid(blocks);
  how.blockDim = threads;
  how.dynamicSmemBytes = shared;
  how.stream = stream;
  how.attrs = &cluster;
  // Older GPUs know no clusters.
  how.numAttrs = together > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&how, kernel, arguments...), what);
}

bool multiplies_by_groups() {
#if defined(MEDFAST_SM90A)
  int device, major;
  check(cudaGetDevice(&device), "clip_loss");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "clip_loss");
  return major == 9;
#else
  return false;
#endif
}

// Launches the kernel that suits the device: groups with the one pass, or blocks with the other.
template <class Feature, class OfGroups, class OfBlocks>
void launch_pass(const ClipLossFeatures& f, const Rectangle& r,
                 const typename OfBlocks::Arguments& arguments, cudaStream_t stream,
                 const char* what) {
#if defined(MEDFAST_SM90A)
  if (multiplies_by_groups()) {
    launch(clip_loss_group_kernel<Feature, OfGroups>, Unit::height(r, kPair) * r.parts,
           kGroupThreads, sizeof(GroupShared<OfGroups>), kPair, stream, what,
           slabs_of<Feature>(f.rows, f.M, f.D, kTile),
           slabs_of<Feature>(f.columns, f.N, f.D, kTile / kPair), r, arguments);
    return;
  }
#endif
  launch(clip_loss_block_kernel<Feature, OfBlocks>, r.row_blocks() * r.parts, BlockLayout::kThreads,
         sizeof(BlockShared<OfBlocks>), 1, stream, what, static_cast<const Feature*>(f.rows),
         static_cast<const Feature*>(f.columns), r, arguments);
}

}  // namespace

void clip_loss_sums(const ClipLossFeatures& f, const ClipLossSpan& span, float* row_partials,
                    int64_t row_stride, float* column_partials, cudaStream_t stream) {
  with_feature(f.dtype, [&](const auto* type) {
    using Feature = std::decay_t<decltype(*type)>;
    launch_pass<Feature, ClipLossSums<GroupLayout>, ClipLossSums<BlockLayout>>(
        f, rectangle(f, span), {f.scale, row_partials, column_partials, row_stride}, stream,
        "clip_loss_sums");
  });
}

void clip_loss_ends(const ClipLossFeatures& f, const ClipLossSpan& span,
                    const float* row_partials, int64_t row_stride, const float* column_partials,
                    float* own, float* row_lse, float* column_lse, int* flags,
                    cudaStream_t stream) {
  const Rectangle r = rectangle(f, span);
  with_feature(f.dtype, [&](const auto* type) {
    using Feature = std::decay_t<decltype(*type)>;
    const ClipLossEnds<Feature> ends{static_cast<const Feature*>(f.rows),
                                     static_cast<const Feature*>(f.columns),
                                     f.scale,
                                     row_partials,
                                     column_partials,
                                     row_stride,
                                     own,
                                     row_lse,
                                     column_lse,
                                     flags};
    const int64_t blocks = r.row_blocks() + (r.N + kTile - 1) / kTile;
    clip_loss_end_kernel<Feature><<<grid(blocks), kSumThreads, 0, stream>>>(r, ends);
    check(cudaGetLastError(), "clip_loss_ends");
  });
}

void clip_loss_online(const ClipLossFeatures& f, const int* flags, float* row_lse,
                      float* column_lse, cudaStream_t stream) {
  using Pass = ClipLossOnline<BlockLayout>;
  const int64_t count = (f.M + kTile - 1) / kTile + (f.N + kTile - 1) / kTile;
  with_feature(f.dtype, [&](const auto* type) {
    using Feature = std::decay_t<decltype(*type)>;
    const auto* rows = static_cast<const Feature*>(f.rows);
    const auto* columns = static_cast<const Feature*>(f.columns);
    const Rectangle along{f.M, f.N, f.D, f.offset, 0, f.M, 0, f.N, 1};
    const Rectangle across{f.N, f.M, f.D, -f.offset, 0, f.N, 0, f.M, 1};
    launch(clip_loss_online_kernel<Feature>, along.row_blocks(), BlockLayout::kThreads,
           sizeof(BlockShared<Pass>), 1, stream, "clip_loss_online", rows, columns, along,
           Pass::Arguments{f.scale, row_lse, flags, count});
    launch(clip_loss_online_kernel<Feature>, across.row_blocks(), BlockLayout::kThreads,
           sizeof(BlockShared<Pass>), 1, stream, "clip_loss_online", columns, rows, across,
           Pass::Arguments{f.scale, column_lse, flags, count});
  });
}

void clip_loss_range(const ClipLossFeatures& f, const ClipLossUpstream& upstream, float boost,
                     float* normalisers, cudaStream_t stream) {
  const ClipLossRange range{f.scale,          upstream.row_lse,   upstream.column_lse,
                            upstream.d_own,   upstream.d_rows,    upstream.d_columns,
                            reinterpret_cast<ClipLossNormalisers*>(normalisers),
                            f.M,              f.N,                boost};
  clip_loss_range_kernel<<<1, kRangeThreads, 0, stream>>>(range);
  check(cudaGetLastError(), "clip_loss_range");
}

void clip_loss_gradient(const ClipLossFeatures& f, const ClipLossSpan& span,
                        const ClipLossUpstream& upstream, const float* normalisers,
                        void* gradient, int64_t stride, double* sums, cudaStream_t stream) {
  with_feature(f.dtype, [&](const auto* type) {
    using Feature = std::decay_t<decltype(*type)>;
    launch_pass<Feature, ClipLossGradient<GroupLayout, Feature>,
                ClipLossGradient<BlockLayout, Feature>>(
        f, rectangle(f, span),
        {f.scale, upstream.row_lse, upstream.column_lse, upstream.d_own, upstream.d_rows,
         upstream.d_columns, reinterpret_cast<const ClipLossNormalisers*>(normalisers),
         static_cast<Feature*>(gradient), sums, stride},
        stream, "clip_loss_gradient");
  });
}

int clip_loss_blocks_at_a_time() { return multiplies_by_groups() ? 1 : 2; }

}  // namespace medfast::cuda
