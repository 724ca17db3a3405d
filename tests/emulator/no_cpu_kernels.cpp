// Stands for csrc/cpu in a build whose operators hand everything to the CUDA kernels.
#include "../../csrc/cpu/dispatch.h"

namespace elbo_ext {

const CpuKernels& cpu_kernels() {
  static CpuKernels none{};
  none.name = "CUDA emulator";
  return none;
}

std::vector<std::string> compiled_instruction_sets() { return {cpu_kernels().name}; }

}  // namespace elbo_ext
