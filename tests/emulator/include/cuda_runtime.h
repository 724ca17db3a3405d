// As much of CUDA as the kernels of csrc/cuda use, for a C++ compiler and a CPU: see runtime.cpp. Whatever a kernel uses
// beyond it does not compile, and is to be added here.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>
#include <typeinfo>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
// One block runs at a time, so that there is one copy of its memory. thread_local gathers it in one place, where every
// block finds it filled with the bytes of NaN; the sanitizers watch the surroundings of plain variables only.
#if defined(ELBO_EMULATOR_SANITIZED)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- the host ----

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);

// ---- the device ----

namespace emulator {

// A line of a kernel: of the call that has it for its default argument.
struct Place {
  const char* file;
  int line;
};
#define EMULATOR_HERE ::emulator::Place at = {__builtin_FILE(), __builtin_LINE()}

cudaError_t launch(dim3 grid, dim3 block, void* kernel, void (*thread)(void*), void* call);
void barrier(Place at);
double shuffle_xor(double number, int lanes, Place at);  // by a whole warp
[[noreturn]] void fail_access(const void* address, size_t bytes, Place at);

template <class T>
void check(const T* at, Place place) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) fail_access(at, sizeof(T), place);
}

}  // namespace emulator

inline uint3 threadIdx, blockIdx;
inline dim3 gridDim, blockDim;

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  const auto thread = [](void* of) {
    const Call& call = *static_cast<Call*>(of);
    call.kernel(call.params);
  };
  return emulator::launch(config->gridDim, config->blockDim, reinterpret_cast<void*>(kernel), thread, &call);
}

inline void __syncthreads(EMULATOR_HERE) { emulator::barrier(at); }
inline void __threadfence() {}
inline double __shfl_xor_sync(unsigned mask, double number, int lanes, EMULATOR_HERE) {
  static_cast<void>(mask);  // always all 32
  return emulator::shuffle_xor(number, lanes, at);
}
inline unsigned atomicAdd(unsigned* to, unsigned number, EMULATOR_HERE) {
  emulator::check(to, at);
  const unsigned before = *to;
  *to += number;
  return before;
}

#define EMULATOR_LOAD(NAME)                    \
  template <class T>                           \
  inline T NAME(const T* from, EMULATOR_HERE) { \
    emulator::check(from, at);                 \
    return *from;                              \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldcg)
#undef EMULATOR_LOAD
template <class T>
inline void __stcs(T* to, T value, EMULATOR_HERE) {
  emulator::check(to, at);
  *to = value;
}

// ---- bits ----

namespace emulator {
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulator

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline int __double2loint(double x) { return static_cast<int>(emulator::bits<uint64_t>(x)); }
inline int __double2hiint(double x) { return static_cast<int>(emulator::bits<uint64_t>(x) >> 32); }
inline double __hiloint2double(int high, int low) {
  return emulator::bits<double>(uint64_t{static_cast<unsigned>(high)} << 32 | static_cast<unsigned>(low));
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
