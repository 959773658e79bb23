// Arithmetic that CUDA kernels and the CPU share is marked so: the tests run it on the CPU.

#pragma once

#if defined(__CUDACC__)
#define MEDFAST_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MEDFAST_HD __attribute__((always_inline)) inline
#else
#define MEDFAST_HD inline
#endif
