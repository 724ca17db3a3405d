// The special functions of csrc/terms/special.h over arrays, in the registers of one instruction set, for test_special.py.
#include "cpu/vec_math.h"
#include "terms/special.h"

namespace elbo_ext {
namespace {

template <class R, class Function>
void each(const R* x, const R* t, R* to, int64_t count, Function function) {
  for (int64_t i = 0; i < count; i += Vec<R>::size()) {
    const int n = static_cast<int>(std::min<int64_t>(Vec<R>::size(), count - i));
    // What lies beyond the end is 1, which no function minds.
    const Vec<R> a = Vec<R>::set(Vec<R>(R(1)), Vec<R>::loadu(x + i, n), n), b = Vec<R>::set(Vec<R>(R(1)), Vec<R>::loadu(t + i, n), n);
    function(a, b).store(to + i, n);
  }
}

template <class R>
void evaluate(int function, const R* x, const R* t, R* to, int64_t count) {
  switch (function) {
    case 0: return each(x, t, to, count, [](auto a, auto) { return lgamma(a); });
    case 1: return each(x, t, to, count, [](auto a, auto) { return digamma(a); });
    case 2: return each(x, t, to, count, [](auto a, auto b) { return lgamma_difference(a, b); });
    case 3: return each(x, t, to, count, [](auto a, auto b) { return digamma_difference(a, b); });
  }
}

}  // namespace
}  // namespace elbo_ext

extern "C" void evaluate_float(int function, const float* x, const float* t, float* to, int64_t count) {
  elbo_ext::evaluate(function, x, t, to, count);
}
extern "C" void evaluate_double(int function, const double* x, const double* t, double* to, int64_t count) {
  elbo_ext::evaluate(function, x, t, to, count);
}
