// The Python module _C. Importing it registers the operators (ops/schema.cpp); what it offers itself says how it was
// built and which kernels are in use.
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "ops/cuda_loader.h"
#include "ops/terms.h"

namespace {

using Inputs = std::vector<std::vector<std::string>>;

std::map<std::string, std::pair<int, Inputs>> terms() {
  std::map<std::string, std::pair<int, Inputs>> known;
  for (const elbo_ext::TermInfo& term : elbo_ext::terms()) known[term.name] = {term.number, term.inputs};
  return known;
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
  module.def("terms", &terms, "Of each term, by name: its number in the operator schema, and the forms of each of its inputs.");
}
