// The CUDA library is loaded at run time, by elbo_ext/ops.py, where torch has CUDA.
#pragma once

#include <string>

namespace elbo_ext {

// Raises std::runtime_error if that fails. Returns the architectures that the library was compiled for.
std::string load_cuda_library(const std::string& path);

// What to tell a caller with CUDA tensors as long as no library is loaded; it ends a sentence.
void set_cuda_absence(const std::string& reason);

}  // namespace elbo_ext
