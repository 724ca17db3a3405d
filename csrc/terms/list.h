// The list of terms. A new likelihood is a header beside this one, one line here and its include in terms.h, one function
// in elbo_ext/reference.py and one line in the table of the tests (README, "Add a likelihood").
#pragma once

// X(number in the operator schema, template of the formula, name in Python)
#define ELBO_FOR_EACH_TERM(X) \
  X(0, Gaussian, "gaussian")  \
  X(1, Bernoulli, "bernoulli") \
  X(2, GaussianKL, "gaussian_kl")
