// Kernels that make the errors that the emulator has to see: test_emulator.py runs each of them.
#include <cuda_runtime.h>

#include <string>

namespace {

struct Params {
  char* memory;
};

__global__ void access_between(Params p) { __stcs(reinterpret_cast<uint2*>(p.memory + 4), make_uint2(1, 2)); }

__global__ void skip_shuffle(Params) {
  if (threadIdx.x != 37) __shfl_xor_sync(0xFFFFFFFFu, 1.0, 1);
}

__global__ void end_before_barrier(Params) {
  if (threadIdx.x == 200) return;
  __syncthreads();
}

__global__ void part_at_barriers(Params) {
  if (threadIdx.x < 64) __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffle_at_barrier(Params) {
  if (threadIdx.x < 16) __syncthreads();
  else __shfl_xor_sync(0xFFFFFFFFu, 1.0, 1);
}

__global__ void read_unwritten_shared(Params p) {
  __shared__ double of_block[2];
  __syncthreads();
  if (threadIdx.x == 0) *reinterpret_cast<double*>(p.memory) = of_block[1];
  of_block[1] = 1.0;
}

__global__ void write_beyond(Params p) { p.memory[threadIdx.x * 64] = 1; }

__global__ void nothing(Params) {}

__global__ void order(Params p) {
  if (threadIdx.x % 32 == 0) p.memory[1 + blockIdx.x * 4 + threadIdx.x / 32] = p.memory[0]++;
}

struct Fault {
  const char* name;
  void (*kernel)(Params);
  dim3 grid = 1, block = 256;
};
constexpr Fault kFaults[] = {
    {"access_between", access_between},
    {"skip_shuffle", skip_shuffle},
    {"end_before_barrier", end_before_barrier},
    {"part_at_barriers", part_at_barriers},
    {"shuffle_at_barrier", shuffle_at_barrier},
    {"read_unwritten_shared", read_unwritten_shared, 2},
    {"write_beyond", write_beyond},
    {"no_block", nothing, 0},
    {"too_many_blocks", nothing, 0x80000000u},
    {"too_many_rows", nothing, dim3(1, 65536)},
    {"too_many_threads", nothing, 1, 1025},
    {"nothing", nothing, dim3(2, 3), 1024},
    {"order", order, 3, 128},
};

}  // namespace

// What the emulator says of a kernel; null: nothing.
extern "C" __attribute__((visibility("default"))) const char* run_fault(const char* name, char* memory) {
  for (const Fault& fault : kFaults) {
    if (std::string(name) != fault.name) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = fault.grid;
    config.blockDim = fault.block;
    const cudaError_t error = cudaLaunchKernelEx(&config, fault.kernel, Params{memory});
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "there is no such fault";
}
