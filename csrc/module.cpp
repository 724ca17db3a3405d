// The Python module _C. Importing it registers the operators (ops/schema.cpp); what it offers itself says how it was
// built and which kernels are in use.
#include <map>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "ops/cuda_loader.h"
#include "terms/list.h"

namespace {

std::map<std::string, int> terms() {
#define ELBO_TERM_ENTRY(number, Term, name) {name, number},
  return {ELBO_FOR_EACH_TERM(ELBO_TERM_ENTRY)};
#undef ELBO_TERM_ENTRY
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Fused ELBO kernels: operators elbo_ext::* and information about this build.";
  module.attr("compiler") = ELBO_COMPILER;
  module.attr("flags") = ELBO_FLAGS;
  module.attr("torch_built_against") = ELBO_TORCH_VERSION;
  module.def("instruction_sets", &elbo_ext::compiled_instruction_sets, "CPU instruction sets compiled in.");
  module.def("instruction_set", [] { return std::string(elbo_ext::cpu_kernels().name); },
             "The CPU instruction set in use: the widest that this machine has and ATEN_CPU_CAPABILITY allows.");
  module.def("load_cuda_library", &elbo_ext::load_cuda_library, "Loads the CUDA kernels; returns their architectures.");
  module.def("set_cuda_absence", &elbo_ext::set_cuda_absence, "Why there are no CUDA kernels, for error messages.");
  module.def("terms", &terms, "The number of each term in the operator schema, by name.");
}
