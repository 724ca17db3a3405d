// The list of terms. A new likelihood is a header next to this one, its two lines here, and an entry in
// elbo_ext/likelihoods.py (CONTRIBUTING.md, "Add a likelihood").
#pragma once

#include "bernoulli.h"
#include "continuous_bernoulli.h"
#include "discretized_gaussian.h"
#include "discretized_logistic.h"
#include "gaussian.h"
#include "gaussian_kl.h"
#include "laplace.h"
#include "negative_binomial.h"
#include "poisson.h"
#include "student_t.h"
#include "zero_inflated_negative_binomial.h"

// X(number in the operator schema, template of the formula, name in Python)
#define ELBO_FOR_EACH_TERM(X)                                           \
  X(0, Gaussian, "gaussian")                                            \
  X(1, Bernoulli, "bernoulli")                                          \
  X(2, GaussianKL, "gaussian_kl")                                       \
  X(3, Laplace, "laplace")                                              \
  X(4, Poisson, "poisson")                                              \
  X(5, NegativeBinomial, "negative_binomial")                           \
  X(6, ZeroInflatedNegativeBinomial, "zero_inflated_negative_binomial") \
  X(7, StudentT, "student_t")                                           \
  X(10, ContinuousBernoulli, "continuous_bernoulli")                    \
  X(11, DiscretizedLogistic, "discretized_logistic")                    \
  X(12, DiscretizedGaussian, "discretized_gaussian")
