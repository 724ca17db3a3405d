// Forms of a Gaussian's scale other than the four ordinary ones (scale.h): rho, where sigma = softplus(rho), and any of the
// five with a floor, sigma = (what the scale says) + min_std or sigma^2 = (what the scale says) + min_var.
#pragma once

#include "forms.h"
#include "math.h"

namespace elbo_ext {
namespace {

// What the scale tensor holds: sigma without its floor, in one of five forms; kFormsOfScale * Floor + Form is the form's
// number in the operator schema. The floor is the constant of the input (Forms).
enum Form : int {
  kLogvar = 0,
  kLogStd = 1,
  kStd = 2,
  kVar = 3,
  kRho = 4
};
enum Floor : int {
  kNoFloor = 0,
  kMinStd = 1,
  kMinVar = 2
};
constexpr int kFormsOfScale = 5, kFormsWithFloors = kFormsOfScale * 3;
#define ELBO_SCALE(prefix) \
  prefix "logvar|" prefix "log_std|" prefix "std|" prefix "var|" prefix "rho^" prefix "min_std^" prefix "min_var"

template <class R>
struct ScaleForm {
  int number;  // Form
  int floor_kind;
  R floor;

  // A floor that the compute type takes for 0 is none.
  ELBO_INLINE ScaleForm(const Forms& forms, int input) {
    const int both = form_of(forms, input);
    number = both < kFormsOfScale ? both : both % kFormsOfScale;
    floor = both < kFormsOfScale ? R(0) : static_cast<R>(forms.constant[input]);
    floor_kind = floor > R(0) ? both / kFormsOfScale : kNoFloor;
  }
  ScaleForm() = default;
  ELBO_INLINE bool ordinary() const { return number <= kVar && floor_kind == kNoFloor; }
  ELBO_INLINE bool operator==(const ScaleForm& other) const {
    return number == other.number && floor_kind == other.floor_kind && floor == other.floor;
  }
};

// ---- without the floor; of rho where softplus(rho) leaves the range of T: rho if it is large, else exp(rho) ----

template <class T>
ELBO_INLINE T log_variance_without_floor(int form, T s) {
  using R = Real<T>;
  switch (form) {
    case kLogvar: return s;
    case kLogStd: return s * T(R(2));
    case kStd: return log(s) * T(R(2));
    case kVar: return log(s);
    default: return select(s > T(R(0)), log(s), s) * T(R(2));
  }
}

// d log(sigma^2) / d(the scale as given)
template <class T>
ELBO_INLINE T log_variance_slope_without_floor(int form, T s) {
  using R = Real<T>;
  switch (form) {
    case kLogvar: return T(R(1));
    case kLogStd: return T(R(2));
    case kStd: return T(R(2)) / s;
    case kVar: return T(R(1)) / s;
    default: return select(s > T(R(0)), T(R(2)) / s, T(R(2)));
  }
}

// sigma, and its derivative by the scale as given.
template <class T>
struct SigmaAndSlope {
  T value;
  T slope;
};

template <class T>
ELBO_INLINE SigmaAndSlope<T> sigma_without_floor(int form, T s) {
  using R = Real<T>;
  switch (form) {
    case kLogvar:
    case kLogStd: {
      const T factor = T(form == kLogvar ? R(0.5) : R(1)), f = exp(s * factor);
      return {f, f * factor};
    }
    case kStd: return {s, T(R(1))};
    case kVar: {
      const T f = sqrt(s);
      return {f, T(R(0.5)) / f};
    }
    default: {
      const Softplus<T> f = softplus(s);
      return {f.value, f.slope};
    }
  }
}

// sigma - 1, or sigma^2 - 1 if `of_square`, to full relative precision, given sigma.
template <class T>
ELBO_INLINE T excess_without_floor(int form, bool of_square, T s, T f) {
  using R = Real<T>;
  const T one = T(R(1));
  T excess;
  switch (form) {
    case kLogvar: excess = expm1_parts(s * T(R(0.5)), f).value; break;
    case kLogStd: excess = expm1_parts(s, f).value; break;
    case kStd: excess = s - one; break;
    case kVar: return of_square ? s - one : (s - one) / (f + one);
    default: excess = softplus_minus_1(s); break;
  }
  return of_square ? excess * (T(R(2)) + excess) : excess;
}

// sigma_a - sigma_b, to full relative precision, given sigma_a, and sigma_b with its slope.
template <class T>
ELBO_INLINE T difference_without_floor(int form, T a, T b, T sigma_a, const SigmaAndSlope<T>& sigma_b) {
  using R = Real<T>;
  const T difference = a - b;
  switch (form) {
    case kLogvar:
    case kLogStd: {
      const T exponent = form == kLogvar ? difference * T(R(0.5)) : difference;
      return sigma_b.value * expm1_parts(exponent, exp(exponent)).value;
    }
    case kStd: return difference;
    case kVar: return difference / (sigma_a + sigma_b.value + T(std::numeric_limits<R>::min()));  // 0 where both are
    default: return log1p(sigma_b.slope * expm1_parts(difference, exp(difference)).value);  // (1 + e^a) / (1 + e^b) - 1
  }
}

// ---- with the floor ----

// sigma with its floor or, where the floor is one of the variance, sigma^2 with its floor. `half_slope`: d sigma / d(the
// scale as given), or half of d sigma^2.
template <class T>
struct FlooredSize {
  T size;
  T half_slope;
};

template <class T>
ELBO_INLINE FlooredSize<T> add_floor(const ScaleForm<Real<T>>& form, T s, const SigmaAndSlope<T>& unfloored) {
  using R = Real<T>;
  const T floor(form.floor);
  if (form.floor_kind != kMinVar) return {unfloored.value + floor, unfloored.slope};
  if (form.number == kVar) return {s + floor, T(R(0.5))};
  return {unfloored.value * unfloored.value + floor, unfloored.value * unfloored.slope};
}

template <class T>
ELBO_INLINE SigmaAndSlope<T> sigma_of_size(const ScaleForm<Real<T>>& form, const SigmaAndSlope<T>& unfloored,
                                           const FlooredSize<T>& floored) {
  if (form.floor_kind != kMinVar) return {floored.size, floored.half_slope};
  const T sigma = sqrt(floored.size);
  const auto beyond = floored.size > T(kLargest<T>);  // a square; next to it the floor is nothing
  return {select(beyond, unfloored.value, sigma), select(beyond, unfloored.slope, floored.half_slope / sigma)};
}

template <class T>
ELBO_NOINLINE SigmaAndSlope<T> floored_sigma(ScaleForm<Real<T>> form, T s) {
  const SigmaAndSlope<T> unfloored = sigma_without_floor(form.number, s);
  return sigma_of_size(form, unfloored, add_floor(form, s, unfloored));
}

template <class T>
struct FlooredScale {
  SigmaAndSlope<T> sigma;
  T logvar;
  T logvar_slope;  // by the scale as given
};

// The range in which log(size) and its slope are right without more ado. Only softplus can leave it downwards.
template <class T>
constexpr Real<T> kSmallSize = std::numeric_limits<Real<T>>::min() / std::numeric_limits<Real<T>>::epsilon();
template <class T>
constexpr Real<T> kLargeSize = std::numeric_limits<Real<T>>::max() * std::numeric_limits<Real<T>>::epsilon();

template <class T>
ELBO_NOINLINE FlooredScale<T> floored_scale(ScaleForm<Real<T>> form, T s) {
  using R = Real<T>;
  const T one = T(R(1)), two = T(R(2));
  const bool of_square = form.floor_kind == kMinVar;
  const SigmaAndSlope<T> unfloored = sigma_without_floor(form.number, s);
  const FlooredSize<T> floored = add_floor(form, s, unfloored);
  FlooredScale<T> scale;
  scale.sigma = sigma_of_size(form, unfloored, floored);
  scale.logvar = log(floored.size);
  // Next to 1 the logarithm is as exact as what is left when 1 is taken away, before anything is rounded.
  const auto near = abs(floored.size - one) < T(R(0.5));
  if (any(near)) {
    const T excess = excess_without_floor(form.number, of_square, s, unfloored.value);
    scale.logvar = select(near, log1p(excess + T(form.floor)), scale.logvar);
  }
  if (!of_square) scale.logvar = scale.logvar * two;
  scale.logvar_slope = two * floored.half_slope / floored.size;
  const auto small = floored.size < T(form.floor_kind == kNoFloor ? kSmallSize<T> : R(0));
  const auto large = floored.size > T(kLargest<T>);
  if (any(small) || any(large)) {  // there is no floor, or it is nothing
    const T logvar = log_variance_without_floor(form.number, s), slope = log_variance_slope_without_floor(form.number, s);
    scale.logvar = select(small, logvar, select(large, logvar, scale.logvar));
    scale.logvar_slope = select(small, slope, select(large, slope, scale.logvar_slope));
  }
  return scale;
}

// expm1(d) and expm1(d) - d for d = log(sigma_a^2 / sigma_b^2), both scales in one form and with one floor. `log_ratio` is
// the difference of the two logarithms, for where sigma or the quotient leaves the range of T.
template <class T>
ELBO_NOINLINE Expm1<T> floored_ratio(ScaleForm<Real<T>> form, T a, T b, T log_ratio) {
  using R = Real<T>;
  const bool of_square = form.floor_kind == kMinVar;
  const SigmaAndSlope<T> unfloored_a = sigma_without_floor(form.number, a);
  const SigmaAndSlope<T> unfloored_b = sigma_without_floor(form.number, b);
  const T size_a = add_floor(form, a, unfloored_a).size, size_b = add_floor(form, b, unfloored_b).size;
  T difference = difference_without_floor(form.number, a, b, unfloored_a.value, unfloored_b);
  if (of_square) difference = difference * (unfloored_a.value + unfloored_b.value);
  const T quotient = size_a / size_b, relative = difference / size_b;
  T d = select(abs(relative) < T(R(0.5)), log1p(relative), log(quotient)), ratio = quotient;
  if (!of_square) {
    d = d * T(R(2));
    ratio = ratio * ratio;
  }
  const T least = minimum(minimum(size_a, size_b), quotient), most = select(size_a > size_b, size_a, size_b);
  const auto small = least<T(kSmallSize<T>), large = most> T(kLargeSize<T>), far = quotient > T(kLargeSize<T>);
  if (any(small) || any(large) || any(far)) {
    const T exp_log_ratio = exp(log_ratio);
    d = select(small, log_ratio, select(large, log_ratio, select(far, log_ratio, d)));
    ratio = select(small, exp_log_ratio, select(large, exp_log_ratio, select(far, exp_log_ratio, ratio)));
  }
  return expm1_parts(d, ratio);
}

}  // namespace
}  // namespace elbo_ext
