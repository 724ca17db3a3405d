// Problems on CUDA: handed to the kernels of the CUDA library, with the stream to run on and memory from torch.
#include "device.h"

#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../cuda/interface.h"
#include "../terms/sample.h"
#include "cuda_loader.h"

namespace elbo_ext {
namespace {

using CurrentStream = AOTITorchError(int32_t device_index, void** stream);

const CudaKernels* kernels = nullptr;
CurrentStream* current_stream = nullptr;
std::string absence = "its CUDA library is not loaded";

std::string last_dl_error() {
  const char* message = dlerror();
  return message == nullptr ? "unknown error" : message;
}

#if defined(ELBO_EMULATOR)
// tests/emulator: the kernels run on the CPU, on CPU tensors, which have neither streams nor a current device.
CurrentStream* find_current_stream() {
  return [](int32_t, void**) -> AOTITorchError { return 0; };
}
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
// Part of torch's stable C interface, but in libtorch_cuda, which a torch without CUDA does not have and which therefore
// cannot be linked to. torch has loaded it by now.
CurrentStream* find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch_cuda == nullptr) throw std::runtime_error("torch has not loaded libtorch_cuda.so");
  void* function = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  if (function == nullptr) throw std::runtime_error(last_dl_error());
  return reinterpret_cast<CurrentStream*>(function);
}
using torch::stable::accelerator::DeviceGuard;
#endif

// dlopen maps as much of a file as the file's header says, and the process dies of SIGBUS where an interrupted download or
// copy has left less. The table of sections stands at the end; of a file that is no ELF file dlopen says so.
void check_whole(const std::string& path) {
  Elf64_Ehdr header{};
  std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(&header), sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return;
  const uint64_t whole = header.e_shoff + uint64_t{header.e_shentsize} * header.e_shnum;
  const uint64_t size = std::filesystem::file_size(path);
  if (size < whole)
    throw std::runtime_error(path + " is cut off: " + std::to_string(size) + " of " + std::to_string(whole) + " bytes");
}

class CudaDevice final : public Device {
 public:
  void term_sum(const Site& site, TermSumProblem& problem) const override {
    run(site, kernels->term_sum, problem);
  }
  int latent(const Site& site, const LatentProblems& problems) const override {
    int sums = 0;
    const auto next_sum = [&] {
      Values kl = problems.kl;
      if (kl.total == nullptr) return kl;
      kl.total = static_cast<char*>(kl.total) + sums++ * bytes_of(problems.kl_type);
      return kl;
    };
    for_each_list(
        problems.each, /*backward=*/false,
        [&](LatentList list) {
      list.kl = next_sum();
      run(site, kernels->latent_list, list);
    },
        [&](LatentProblem& problem) {
      if (problems.kl.total != nullptr) problem.kl = next_sum();
      run(site, problem.results >= kPathwise ? kernels->sample_log_prob : kernels->latent, problem);
    });
    return sums;
  }
  void latent_backward(const Site& site, const std::vector<LatentProblem*>& problems) const override {
    for_each_list(
        problems, /*backward=*/true, [&](const LatentList& list) { run(site, kernels->latent_list, list); },
        [&](LatentProblem& problem) {
      run(site, problem.with_log_prob ? kernels->sample_log_prob_backward : kernels->latent_backward, problem);
    });
  }

  void categorical(const Site& site, CategoricalProblem& problem) const override {
    run(site, kernels->categorical, problem);
  }

  void fold(const Site& site, const FoldProblem& problem) const override { run(site, kernels->fold, problem); }

  void noise(const Site& site, NoiseKind kind, const Tensor& seed, int64_t first, const Tensor& out) const override {
    run(site, kernels->noise,
        NoiseProblem{kind, static_cast<const int64_t*>(seed.data_ptr()), out.size(0), out.size(1), first,
                     dtype_of(out) == DType::kDouble, out.data_ptr()});
  }

  void importance(const Site& site, const ImportanceProblem& problem) const override {
    run(site, kernels->importance, problem);
  }

  void stored_gradients(const Site& site, const StoredGradients& problem) const override {
    if (problem.count > 0 || problem.kl_gradient != nullptr) run(site, kernels->stored_gradients, problem);
  }

 private:
  // Problems in lists, or else one by one.
  template <class OfList, class OfOne>
  static void for_each_list(const std::vector<LatentProblem*>& problems, bool backward, OfList&& of_list, OfOne&& of_one) {
    const int count = static_cast<int>(problems.size());
    if (count < 2 || !kernels->lists({problems.data(), count, backward, {}})) {
      for (LatentProblem* problem : problems) of_one(*problem);
      return;
    }
    for (int first = 0; first < count; first += kMostListed)
      of_list(LatentList{problems.data() + first, std::min(count - first, kMostListed), backward, {}});
  }

  template <class Problem>
  static void run(const Site& site, const char* (*function)(const Problem&, const CudaCall&), const Problem& problem) {
    // The tensors are given back when this returns, and torch's allocator hands their memory only to later work on the
    // same stream.
    struct Workspace {
      const Tensor& like;
      std::vector<Tensor> tensors;
      std::exception_ptr failure;  // of torch's allocator, kept while the CUDA library, which knows no exceptions, returns
    } workspace{site.like, {}, nullptr};
    const auto allocate = [](void* owner, int64_t bytes) noexcept -> void* {
      Workspace& own = *static_cast<Workspace*>(owner);
      try {
        own.tensors.push_back(empty({(bytes + 7) / 8}, DType::kDouble, own.like));
        return own.tensors.back().data_ptr();
      } catch (...) {
        own.failure = std::current_exception();
        return nullptr;
      }
    };
    CudaCall call{site.like.get_device_index(), nullptr, allocate, &workspace};
    // torch's guard, because it goes back to a device that nobody has used yet without making a context there.
    const DeviceGuard guard(call.device);
    TORCH_ERROR_CODE_CHECK(current_stream(call.device, &call.stream));
    const char* error = function(problem, call);
    if (workspace.failure) std::rethrow_exception(workspace.failure);
    STD_TORCH_CHECK(error == nullptr, "elbo_ext::", site.op, " of shape ", text_of(site.shape),
                    " failed on CUDA device ", call.device, ": ", error);
  }
};

}  // namespace

std::string load_cuda_library(const std::string& path) {
  check_whole(path);
  CurrentStream* const stream = find_current_stream();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(last_dl_error());
  auto* const entry = reinterpret_cast<CudaEntry*>(dlsym(library, kCudaEntry));
  const CudaKernels* table = entry == nullptr ? nullptr : entry(kCudaVersion);
  if (table == nullptr) throw std::runtime_error(path + " belongs to another version of elbo_ext");
  if (const char* complaint = table->driver_complaint()) throw std::runtime_error(complaint);
  current_stream = stream;
  kernels = table;
  return kernels->architectures;
}

void set_cuda_absence(const std::string& reason) { absence = reason; }

const Device& cuda_device() {
  static const CudaDevice device;
  STD_TORCH_CHECK(kernels != nullptr, "elbo_ext was given CUDA tensors, but ", absence);
  return device;
}

}  // namespace elbo_ext
