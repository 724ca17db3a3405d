"""The public functions. They check their arguments, draw the seed, and call the kernels through autograd.

Conventions, the same in every function:

**Scales.** The scale of a Gaussian is passed as ``logvar`` = ln sigma^2, or by exactly one of the keywords
``log_std``, ``std``, ``var``, ``rho`` in its place, sigma = softplus(rho) = ln(1 + e^rho) (``prior_...`` for the prior,
``recon_...`` for the likelihood). It is a tensor that broadcasts to the mean (one number, one per channel, one per
element) or a number, of Python, of NumPy, or an integer in a tensor without dimensions, as wherever a number may stand.
The values of a tensor are not looked at, which would have to wait for its device (:class:`elbo_ext.validate_values` does):
where ``std`` or ``var`` is not above zero, NaN or numbers without a meaning come.

**Floors.** With a scale in any form may come ``min_std`` or ``min_var`` (``prior_min_std`` ...), a number of at least 0:
sigma = (what the scale says) + min_std, or sigma^2 = (what the scale says) + min_var. 0 is none. It is taken in the
precision of the computation, as every number. Next to a prior of the same form and floor a KL is right to full relative
precision; next to N(0, 1) its ln sigma has the error of a rounding of the floor.

**Shapes.** Operands broadcast to a joint shape. Its ``batch_dims`` leading dimensions index examples, the others are
summed; ``batch_dims`` = number of dimensions means no sum: one value per element.

**Reduction.** Over the examples: "none" gives one value per example; "sum" adds them; "mean" = sum / number of
examples, never over elements.

**Weight.** ``weight`` (weights, also integers, or a boolean mask) broadcasts to the joint shape and multiplies each
element's term. An element of weight zero is left out, whatever stands there. ``kl_weight`` does the same for the KL of
functions that do more.

**Dtypes.** float32, float64, bfloat16 and float16, also mixed, without a cast copy. Half precision is computed and
accumulated in float32. Values are float64 if any operand is, else float32 (as in torch, one without
dimensions does not promote those that have some); gradients have their operand's dtype.

**Errors.** TypeError for what is no floating-point tensor (or number, where one may stand), ValueError for shapes that
do not broadcast, tensors on different devices, no or several scales, a floor below 0, with another or without a scale, a
``batch_dims`` or ``reduction`` that does not exist. The message names the argument, what came and what was expected.

**Overriding.** ``__torch_function__`` of any argument is asked first, as by torch's own functions.

All values are natural logarithms (nats).
"""

from ..reference import ELBO
from .categorical import categorical_kl, categorical_log_prob, categorical_rsample_kl, multinomial_log_prob
from .densities import (
    bernoulli_log_prob,
    continuous_bernoulli_log_prob,
    discretized_gaussian_log_prob,
    discretized_logistic_log_prob,
    gaussian_kl,
    gaussian_log_prob,
    laplace_log_prob,
    negative_binomial_log_prob,
    poisson_log_prob,
    student_t_log_prob,
    zero_inflated_negative_binomial_log_prob,
)
from .elbo import elbo_loss
from .latent import rsample, rsample_kl, rsample_with_log_prob
from .operands import Generators as Generators
from .operands import Scale as Scale

__all__ = [
    "ELBO",
    "bernoulli_log_prob",
    "categorical_kl",
    "categorical_log_prob",
    "categorical_rsample_kl",
    "continuous_bernoulli_log_prob",
    "discretized_gaussian_log_prob",
    "discretized_logistic_log_prob",
    "elbo_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "laplace_log_prob",
    "multinomial_log_prob",
    "negative_binomial_log_prob",
    "poisson_log_prob",
    "rsample",
    "rsample_kl",
    "rsample_with_log_prob",
    "student_t_log_prob",
    "zero_inflated_negative_binomial_log_prob",
]
