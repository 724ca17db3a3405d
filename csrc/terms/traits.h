// What a term may declare next to its formula, of how it is evaluated, and what holds where it does not. All of it is for the
// CUDA kernels, but for kTensors, which all of them rely on.
#pragma once

namespace elbo_ext {
namespace {

// kTensors: how many of the inputs may be tensors. Those after them are numbers alone, and kernels keep no room for their
// vectors and gradients.
template <class Term>
constexpr int tensors_of() {
  if constexpr (requires { Term::kTensors; }) return Term::kTensors;
  else return Term::kInputs;
}

// kElementsAtOnce, an even number: how many elements a thread works on at once. For formulas that need many registers.
template <class Term>
constexpr int elements_at_once() {
  if constexpr (requires { Term::kElementsAtOnce; }) return Term::kElementsAtOnce;
  else return 4;
}

// kFastPathInputs: a bit for each input that is ordinarily a tensor of the data's shape, the others being one number. There
// are kernels for exactly these, and for these without the scale, which keep up with the memory.
template <class Term>
constexpr unsigned fast_path_inputs_of() {
  if constexpr (requires { Term::kFastPathInputs; }) return Term::kFastPathInputs;
  else return 0;
}

// kSharedInputs: a bit for each input that all examples often share (a scale for each pixel, a dispersion for each gene). A
// kernel reads these once and sums their gradients as it goes.
template <class Term>
constexpr unsigned shared_inputs_of() {
  if constexpr (requires { Term::kSharedInputs; }) return Term::kSharedInputs;
  else return 0;
}

}  // namespace
}  // namespace elbo_ext
