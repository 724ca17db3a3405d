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
#include "terms/philox.h"

namespace {

using Inputs = std::vector<std::vector<std::string>>;

std::map<std::string, std::pair<int, Inputs>> terms() {
  std::map<std::string, std::pair<int, Inputs>> known;
  for (const elbo_ext::TermInfo& term : elbo_ext::terms()) known[term.name] = {term.number, term.inputs};
  return known;
}

// What torch.randint(-2**63, 2**63 - 1, (1,), generator=generator) draws on CUDA, and leaves in the generator,
// without a kernel: the first two words of Philox with the generator's seed for the key and a quarter of its offset for the
// counter, as its first thread takes them. Python's lock is held throughout, so that no other thread draws in between.
int64_t draw_on_cuda(const pybind11::object& generator) {
  const auto seed = generator.attr("initial_seed")().cast<uint64_t>(), offset = generator.attr("get_offset")().cast<uint64_t>();
  generator.attr("set_offset")(offset + 4);
  uint32_t word[4] = {static_cast<uint32_t>(offset / 4), static_cast<uint32_t>(offset / 4 >> 32), 0, 0};
  elbo_ext::philox4x32_10(word, seed);
  const uint64_t drawn = uint64_t{word[0]} << 32 | word[1], range = ~uint64_t{0};
  return static_cast<int64_t>((drawn == range ? 0 : drawn) - (uint64_t{1} << 63));
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
  module.def("draw_on_cuda", &draw_on_cuda, "An int64 from a CUDA generator, as torch.randint draws it, without a kernel.");
  module.def("terms", &terms, "Of each term, by name: its number in the operator schema, and the forms of each of its inputs.");
}
