// How a formula is declared so that the same text serves the CPU kernels and the CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define ELBO_INLINE __host__ __device__ __forceinline__
#define ELBO_UNROLL _Pragma("unroll")
#define ELBO_NOINLINE ELBO_INLINE  // a call would cost a kernel local memory
#else
#define ELBO_INLINE inline __attribute__((always_inline))
#define ELBO_UNROLL _Pragma("GCC unroll 32")
#define ELBO_NOINLINE __attribute__((noinline))  // long and rarely taken: kept out of the loops
#endif
