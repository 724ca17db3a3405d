// A sample z = mu + sigma * eps of q = N(mu, sigma^2), with log q(z) from its noise and log p(z) of the prior:
//   log q(z) = -1/2 (eps^2 + log sigma^2 + log 2 pi).
// Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, section 2.4. (z - mu) / sigma is eps again, but has lost
// its digits to the rounding of z where sigma is small next to mu.
#pragma once

#include "gaussian.h"

namespace elbo_ext {
namespace {

// What the latent stage returns. log q depends on the parameters of q directly and by way of z; the last three say which
// of the two its gradient takes account of: both; z alone (Roeder, Wu & Duvenaud 2017); the direct dependence alone, z
// being a constant (Williams 1992). The numbers are part of the operator schema.
enum Results : int {
  kZAlone = 0,
  kWithKL = 1,
  kPathwise = 2,
  kStickingTheLanding = 3,
  kScore = 4
};

template <class T>
ELBO_INLINE T log_prob_of_sample(const ScaleForm<Real<T>>& form, T scale, T eps) {
  using R = Real<T>;
  return (eps * eps + (log_variance(form, scale) + T(R(kLogTwoPi)))) * T(R(-0.5));
}

// What q's scale means for its samples.
template <class T>
struct SampleScale {
  T sigma;
  T slope;         // d sigma / d(the scale as given), and
  T over_sigma;    // 1 / sigma: both kept finite, so that nothing times them stays nothing
  T logvar_slope;  // d log sigma^2 / d(the scale as given)
};

template <class T>
ELBO_INLINE SampleScale<T> make_sample_scale(const ScaleForm<Real<T>>& form, T scale) {
  using R = Real<T>;
  SampleScale<T> s;
  if (!form.ordinary()) {
    const FlooredScale<T> floored = floored_scale(form, scale);
    s.sigma = floored.sigma.value;
    s.slope = minimum(floored.sigma.slope, T(kLargest<T>));
    s.over_sigma = minimum(T(R(1)) / s.sigma, T(kLargest<T>));
    s.logvar_slope = floored.logvar_slope;
    return s;
  }
  s.sigma = standard_deviation(form, scale);
  s.slope = minimum(standard_deviation_slope(form, scale, s.sigma), T(kLargest<T>));
  switch (form.number) {
    case kLogvar: s.over_sigma = fast_exp(scale * T(R(-0.5))); break;
    case kLogStd: s.over_sigma = fast_exp(T(R(0)) - scale); break;
    default: s.over_sigma = T(R(1)) / s.sigma; break;
  }
  s.over_sigma = minimum(s.over_sigma, T(kLargest<T>));
  s.logvar_slope = log_variance_slope_without_floor(form.number, scale);
  return s;
}

// The gradients by one sample of one element, given those of z, log q and log p.
template <class T>
struct SampleGradient {
  T mu, scale, prior_mu, prior_scale, eps;

  ELBO_INLINE SampleGradient(int results, const SampleScale<T>& q, const Scale<T>& prior, T in_mu, T in_prior_mu, T noise,
                             T grad_z, T grad_q, T grad_p) {
    using R = Real<T>;
    const T in[3] = {q.sigma * noise + in_mu, in_prior_mu, T(R(0))};
    T d[3];
    Gaussian<T>::gradient(prior, in, d);
    prior_mu = grad_p * d[1];
    prior_scale = grad_p * d[2];
    const T half = T(R(0.5)), noise_q = grad_q * noise;
    if (results == kScore) {
      mu = noise_q * q.over_sigma;                                      // (z - mu) / sigma^2
      scale = (noise_q * noise - grad_q) * (half * q.logvar_slope);       // d/dlogvar = (eps^2 - 1) / 2
      eps = T(R(0));
      return;
    }
    const T by_z = grad_z + grad_p * d[0];
    mu = by_z;                                                          // dz/dmu = 1
    scale = by_z * noise * q.slope;                                     // dz/dscale = eps dsigma/dscale
    eps = by_z * q.sigma - noise_q;                                     // dz/deps = sigma
    if (results == kStickingTheLanding) {
      mu = mu - noise_q * q.over_sigma;                                 // d log q / dz = -eps / sigma
      scale = scale - noise_q * noise * (half * q.logvar_slope);        // ... times eps dsigma, dsigma / sigma = dlogvar / 2
    } else {
      scale = scale - grad_q * (half * q.logvar_slope);                   // eps is a constant
    }
  }
};

}  // namespace
}  // namespace elbo_ext
