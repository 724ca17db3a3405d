// The forms of the scales that a kernel is compiled for. The forms of a class take the same steps, so that what the other
// class would take costs a kernel neither registers nor branches.
#pragma once

#include "device.cuh"

namespace elbo_ext {
namespace {

enum class Forms {
  kExponential,  // logvar and log_std
  kDirect,       // std and var
  kAny,          // not known to the kernel
};

constexpr Forms class_of(int form) { return form == kLogvar || form == kLogStd ? Forms::kExponential : Forms::kDirect; }
constexpr Forms class_of(int form, int prior_form) {
  return class_of(form) == class_of(prior_form) ? class_of(form) : Forms::kAny;
}

// A form, in a shape that lets the compiler see the class.
template <Forms forms>
ELBO_INLINE int within(int form) {
  if constexpr (forms == Forms::kExponential) return form == kLogStd ? kLogStd : kLogvar;
  else if constexpr (forms == Forms::kDirect) return form == kStd ? kStd : kVar;
  else return form;
}

}  // namespace
}  // namespace elbo_ext
