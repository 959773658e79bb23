// The instructions that CUDA C++ has no words for, each by itself: the tests replace this file by
// one that does the same on a CPU. Addresses in shared memory are 32-bit.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define MEDFAST_DEVICE __device__ __forceinline__

namespace medfast::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using TensorMap = CUtensorMap;

MEDFAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MEDFAST_DEVICE int64_t block_index() { return blockIdx.x; }

MEDFAST_DEVICE void sync_block() { __syncthreads(); }

// Waits for all threads; whether any of them says so.
MEDFAST_DEVICE bool sync_any(bool is) { return __syncthreads_or(is); }

template <class T>
MEDFAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

MEDFAST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

MEDFAST_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
MEDFAST_DEVICE float to_float(fp16 x) { return __half2float(x); }

// Two numbers, rounded to the nearest; the first in the lower half.
template <class Feature>
MEDFAST_DEVICE uint32_t packed(float first, float second);
template <>
MEDFAST_DEVICE uint32_t packed<bf16>(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
template <>
MEDFAST_DEVICE uint32_t packed<fp16>(float first, float second) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

MEDFAST_DEVICE void store_16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *static_cast<uint4*>(to) = make_uint4(a, b, c, d);
}

// sm_80: copies to shared memory in groups, and tiles of 16 x 8 x 16.

// Copies 16 bytes; zeros where `exists` is false.
MEDFAST_DEVICE void copy_async(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

MEDFAST_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kept` of this thread's groups are under way.
template <int kept>
MEDFAST_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kept) : "memory");
}

// Four matrices of 8 x 8: lane l gives the address of row l % 8 of matrix l / 8, and receives of
// each the entries 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
MEDFAST_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8].
template <class Feature>
MEDFAST_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define MEDFAST_MULTIPLY(Feature, name)                                                       \
  template <>                                                                                 \
  MEDFAST_DEVICE void multiply<Feature>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,   \
                                        uint32_t b1) {                                        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));             \
  }
MEDFAST_MULTIPLY(bf16, "bf16")
MEDFAST_MULTIPLY(fp16, "f16")
#undef MEDFAST_MULTIPLY

// sm_90a: barriers in shared memory, copies of boxes, and products of a group of four warps.

// A named barrier: waits until `threads` threads have come, those that only report included.
MEDFAST_DEVICE void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

MEDFAST_DEVICE void report_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

MEDFAST_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Shows initialised barriers to the copies of boxes.
MEDFAST_DEVICE void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Of the pair of blocks, which this one is.
MEDFAST_DEVICE int pair_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of both blocks.
MEDFAST_DEVICE void sync_pair() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrives at this barrier as the block of that rank has it.
MEDFAST_DEVICE void barrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Arrives, and has the phase wait for so many bytes besides.
MEDFAST_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity, 0 for the first, is over. Of a new barrier the phase before
// the first, of parity 1, is.
MEDFAST_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t is_over = 0;
  while (is_over == 0)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(is_over)
        : "r"(barrier), "r"(parity)
        : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Copies the box of a matrix whose first entry is at `row`, `column`, and reports its bytes to the
// barrier. What lies beyond the matrix is 0.
MEDFAST_DEVICE void copy_box(uint32_t to, const TensorMap* map, int column, int row,
                             uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same to this place, and this barrier, of both blocks of a pair.
MEDFAST_DEVICE void copy_box_to_pair(uint32_t to, const TensorMap* map, int column, int row,
                                     uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Registers of each thread of the group of four warps.
template <int count>
MEDFAST_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
MEDFAST_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

MEDFAST_DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

MEDFAST_DEVICE void close_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kept` groups of products are under way.
template <int kept>
MEDFAST_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kept) : "memory");
}

// The compiler must not move accumulators while products are under way.
MEDFAST_DEVICE void hold(float (&d)[16][4]) {
#pragma unroll
  for (auto& part : d)
#pragma unroll
    for (float& x : part) asm volatile("" : "+f"(x)::"memory");
}

// d [64, 128] += a [64, 16] b [128, 16]^T, of tiles that the descriptors name.
// d[j][2 h + c] is in row 16 w + l / 4 + 8 h and column 8 j + 2 (l % 4) + c, for lane l of the
// group's warp w.
template <class Feature>
MEDFAST_DEVICE void multiply_group(float (&d)[16][4], uint64_t a, uint64_t b);

#define MEDFAST_8(j)                                                                       \
  "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), "+f"(d[j + 1][0]),           \
      "+f"(d[j + 1][1]), "+f"(d[j + 1][2]), "+f"(d[j + 1][3])
#define MEDFAST_MULTIPLY_GROUP(Feature, name)                                                \
  template <>                                                                                \
  MEDFAST_DEVICE void multiply_group<Feature>(float (&d)[16][4], uint64_t a, uint64_t b) {   \
    asm volatile(                                                                            \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name                         \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "   \
        "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "   \
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "            \
        "%64, %65, 1, 1, 1, 0, 0;"                                                           \
        : MEDFAST_8(0), MEDFAST_8(2), MEDFAST_8(4), MEDFAST_8(6), MEDFAST_8(8),              \
          MEDFAST_8(10), MEDFAST_8(12), MEDFAST_8(14)                                        \
        : "l"(a), "l"(b));                                                                   \
  }
MEDFAST_MULTIPLY_GROUP(bf16, "bf16")
MEDFAST_MULTIPLY_GROUP(fp16, "f16")
#undef MEDFAST_MULTIPLY_GROUP
#undef MEDFAST_8

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace medfast::cuda
