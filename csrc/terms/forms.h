// The forms in which an input of a formula may come: a scale as log-variance, standard deviation and so on. The forms of all
// inputs of a term travel as one number, four bits an input; 0 is the first form of each, which is the one by position in
// Python. What the numbers mean is between a formula and its entry in elbo_ext/likelihoods.py: a formula lists the names in
// its kSignature, where the forms of an input are separated by |.
#pragma once

#include "macros.h"

namespace elbo_ext {
namespace {

// What a term is told of its inputs: their forms, and for each input its constant (problem.h), which is the floor of a scale
// that has one (terms/scale.h).
struct Forms {
  int number;
  const double* constant = nullptr;
  ELBO_INLINE constexpr operator int() const { return number; }
};

ELBO_INLINE constexpr int form_of(int forms, int input) { return forms >> (4 * input) & 15; }

// Forms of a class take the same steps, so that what another class would take costs a kernel that is compiled for one class
// neither registers nor branches. A term inherits its classes: how many there are; which one forms are of, or kAnyForms
// (of none, or of inputs in different ones: kernels that look at run time); and forms in a shape that lets the compiler see
// the class.
constexpr int kAnyForms = -1;

struct OneForm {
  static constexpr int kFormClasses = 1;
  ELBO_INLINE static constexpr int form_class(int /*forms*/) { return 0; }
  template <int kClass>
  ELBO_INLINE static constexpr int within(int /*forms*/) {
    return 0;
  }
};

// One input has two forms, which have nothing in common.
template <int input>
struct TwoForms {
  static constexpr int kFormClasses = 2;
  ELBO_INLINE static constexpr int form_class(int forms) { return form_of(forms, input); }
  template <int kClass>
  ELBO_INLINE static constexpr int within(int forms) {
    return kClass == kAnyForms ? forms : kClass << (4 * input);
  }
};

// Inputs whose forms are looked at while a kernel runs, all in one class: what they differ by is little compared to the rest.
struct ManyForms {
  static constexpr int kFormClasses = 1;
  ELBO_INLINE static constexpr int form_class(int /*forms*/) { return 0; }
  template <int kClass>
  ELBO_INLINE static constexpr int within(int forms) {
    return forms;
  }
};

}  // namespace
}  // namespace elbo_ext
