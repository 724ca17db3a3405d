// Launching, and what has to be known of the device for it.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <unordered_map>

#include "interface.h"

namespace elbo_ext {
namespace {

// What CUDA says of an error, null if there is none. An error of a launch is not sticky, and must not be left for
// somebody else to find.
inline const char* message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Makes a device current for as long as it lives. The operators have done so by torch's means; this is for the CUDA runtime
// that this library has of its own.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = true;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  const char* error() const { return message(error_); }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool changed_ = false;
};

// The number of multiprocessors of a device; asked for once.
inline int multiprocessors(int device) {
  static std::mutex mutex;
  static std::unordered_map<int, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& count = known[device];
  if (count == 0 && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) count = 0;
  return count == 0 ? 1 : count;
}

// What an operator is told if torch has no memory for a kernel to work in; it then raises torch's own error.
constexpr const char* kOutOfMemory = "no memory to work in";

template <class Params>
const char* launch(void (*kernel)(Params), dim3 blocks, int threads, const Params& params, const CudaCall& call) {
  static_assert(sizeof(Params) <= 4096, "the parameters of a kernel");
  if (call.out_of_memory) return kOutOfMemory;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(call.stream);
  return message(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace
}  // namespace elbo_ext
