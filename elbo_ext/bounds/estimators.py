"""Estimators of the bound from samples of a Gaussian q, and of its gradient. Part of :mod:`elbo_ext.bounds`.

They differ in what they leave to chance. All take the same arguments:

    log_likelihood: ln p(x|z) of samples as a function of z: ``[K, *batch, *latent]`` -> ``[K, *batch]``, in nats. It
        holds the data and the decoder, and may be any torch code; its tensors get gradients where they require them. All
        but :func:`score_function` differentiate it by z: of a detached one they see the prior and q alone.
    mu, logvar: of q, ``[*batch, *latent]``; or ``log_std=``, ``std=``, ``var=``, ``rho=`` in place of ``logvar``, with
        ``min_std=`` or ``min_var=``.
    num_samples: K >= 1, the number of samples z of each example, on axis 0.
    reduction: over the examples: "none", "sum" or "mean".
    options: ``prior_mu``, ``prior_logvar`` ... of p(z), N(0, I) by default; ``generator``, ``noise``; ``batch_dims``, the
        number of dimensions of the batch; ``kl_weight``: all as in :func:`elbo_ext.rsample_with_log_prob`.

and return an estimate of the bound in nats, ``[*batch]`` or a scalar, to be maximized: its value estimates the bound, its
gradient the bound's gradient. Errors are those of :func:`elbo_ext.rsample_with_log_prob`; also ValueError if K < 1 or if
log_likelihood returns anything but one number for each sample.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import arguments
from ..autograd import importance_bound, in_forward_mode, normalized_weights, weighted_once_more, with_gradient_of
from ..dispatch import public, public_with_callback
from ..functional import Scale, gaussian_log_prob, rsample_kl, rsample_with_log_prob
from ..ops import REDUCTIONS, value_dtype

__all__ = ["dreg", "iwae", "iwae_bound", "score_function", "sgvb_a", "sgvb_b", "sticking_the_landing"]

LogLikelihood = Callable[[Tensor], Tensor]


@public
def iwae_bound(log_weights: Tensor, *, dim: int = 0, reduction: str = "none") -> Tensor:
    """Importance-weighted bound, L_K = ln 1/K sum_k w_k, from log-weights ln w_k = ln p(x, z_k) - ln q(z_k|x).

    Burda, Grosse & Salakhutdinov 2016 ("Importance Weighted Autoencoders"), section 3. ELBO = E[L_1] <= E[L_K] <=
    E[L_K+1] <= ln p(x): the bias is about -Var[w] / (2 K p(x)^2) (Nowozin 2018, "Debiasing Evidence Approximations").
    The trade-off: with K the bound gets tighter and its value less noisy, but the signal-to-noise ratio of its gradient
    by the parameters of q falls as 1 / sqrt(K), while that by the model's parameters rises as sqrt(K) (Rainforth et al.
    2018, "Tighter Variational Bounds are Not Necessarily Better"). One kernel computes the bound and its gradient, the
    normalized weights w_k / sum_j w_j.

    Args:
        log_weights: ln w ``[K, *batch]``, or with the K samples on another axis; K >= 1.
        dim: the axis of the samples.
        reduction: over the batch: "none", "sum" or "mean".

    Returns:
        The bound in nats, ``[*batch]`` or a scalar; float64 if the weights are, else float32. Samples of weight zero
        (-inf) count among the K. If all have weight zero the bound is -inf and its gradient 0: such an example moves
        nothing.

    Raises:
        ValueError, TypeError: if log_weights is no floating-point tensor, dim is none of its axes or has no samples, or
            the reduction does not exist.
    """
    arguments.samples("log_weights", log_weights, dim)
    number = arguments.reduction(reduction)
    bound = importance_bound(log_weights.to(value_dtype(log_weights)).movedim(dim, 0))
    return _reduce(bound, number)


# ---- from a Gaussian q ----


@public_with_callback
def sgvb_a(
    log_likelihood: LogLikelihood,
    mu: Tensor,
    logvar: Scale = None,
    *,
    num_samples: int = 1,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    """The ELBO, all by Monte Carlo: 1/K sum_k ln p(x, z_k) - ln q(z_k|x).

    Kingma & Welling 2014, the estimator "A" of section 2.3. The trade-off: it asks for no closed form of the KL, and
    where q is the posterior its value is ln p(x) for every sample, without any variance; but its gradient keeps the
    noise of the score there (:func:`sticking_the_landing` does not), and far from the posterior it is usually noisier
    than :func:`sgvb_b`.
    """
    z, log_q, log_p = _draw(mu, logvar, num_samples, options, "pathwise")
    return _mean_weight(_of_samples(log_likelihood, z, log_p) + log_p - log_q, reduction)


@public_with_callback
def sgvb_b(
    log_likelihood: LogLikelihood,
    mu: Tensor,
    logvar: Scale = None,
    *,
    num_samples: int = 1,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    """The ELBO with its KL in closed form: 1/K sum_k ln p(x|z_k) - KL(q(z|x) || p(z)).

    Kingma & Welling 2014, the estimator "B" of section 2.3, and what :func:`elbo_ext.elbo_loss` is the loss of. The
    trade-off: only the reconstruction is left to chance, which is usually the estimator of least variance during
    training; but at the posterior its value still has the variance of the reconstruction.
    """
    arguments.count("num_samples", num_samples)
    z, kl = rsample_kl(mu, logvar, num_samples=num_samples, **options)
    samples = kl.expand(num_samples, *kl.shape)
    return _mean_weight(_of_samples(log_likelihood, z, samples) - samples, reduction)


@public_with_callback
def sticking_the_landing(
    log_likelihood: LogLikelihood,
    mu: Tensor,
    logvar: Scale = None,
    *,
    num_samples: int = 1,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    """The value of :func:`sgvb_a`, with a gradient that leaves the score d/dphi ln q(z; phi) out, whose mean is zero.

    Roeder, Wu & Duvenaud 2017 ("Sticking the Landing"). The trade-off: the gradient by the parameters of q vanishes with
    every sample once q is the posterior, so that an optimizer comes to rest there; far from it the score may be
    correlated with the rest so that leaving it out *adds* variance, most of all where q is much too narrow. Second
    derivatives are not the bound's.
    """
    z, log_q, log_p = _draw(mu, logvar, num_samples, options, "sticking_the_landing")
    return _mean_weight(_of_samples(log_likelihood, z, log_p) + log_p - log_q, reduction)


@public_with_callback
def iwae(
    log_likelihood: LogLikelihood,
    mu: Tensor,
    logvar: Scale = None,
    *,
    num_samples: int,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    """The importance-weighted bound ln 1/K sum_k w_k (:func:`iwae_bound`), by reparameterized samples.

    Burda, Grosse & Salakhutdinov 2016. Its gradient is that of each ln w_k times the normalized weight of the sample. The
    trade-off: tighter than the ELBO, but for the parameters of q the signal-to-noise ratio falls with K (Rainforth et
    al. 2018); :func:`dreg` mends that.
    """
    z, log_q, log_p = _draw(mu, logvar, num_samples, options, "pathwise")
    return iwae_bound(_of_samples(log_likelihood, z, log_p) + log_p - log_q, reduction=reduction)


@public_with_callback
def dreg(
    log_likelihood: LogLikelihood,
    mu: Tensor,
    logvar: Scale = None,
    *,
    num_samples: int,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    """The value of :func:`iwae`, with the doubly reparameterized gradient by the parameters of q.

    Tucker, Lawson, Gu & Maddison 2019 ("Doubly Reparameterized Gradient Estimators"): sum_k v_k^2 d ln w_k / dz_k dz_k /
    dphi, v_k the normalized weights; decoder and prior keep the gradient of :func:`iwae`. Unbiased for the bound of K
    samples. The trade-off: its signal-to-noise ratio rises with K instead of falling, and like
    :func:`sticking_the_landing`, which it is at K = 1, it vanishes at the posterior, and is noisier where q is much
    narrower than that; but it is a gradient and not the derivative of the value: there is no forward mode
    (RuntimeError), and second derivatives are not the bound's.
    """
    if in_forward_mode():
        raise RuntimeError("dreg is an estimator of gradients, and has no forward-mode derivative; iwae has one")
    z, log_q, log_p = _draw(mu, logvar, num_samples, _constant_prior(options), "sticking_the_landing")
    # On its way from the decoder to q the gradient, which has the weight v_k already, gets it once more.
    path, zeros = weighted_once_more(z, log_p)
    likelihood = _of_samples(log_likelihood, path, log_p)
    log_weights = (likelihood + log_p - log_q).detach()
    normalized = normalized_weights(log_weights)
    surrogate = normalized * (likelihood + zeros) + normalized.square() * (log_p - log_q)
    of_prior = _log_prior(z.detach(), options)
    if of_prior is not None:
        surrogate = surrogate + normalized * of_prior
    surrogate = _reduce(surrogate.sum(0), arguments.reduction(reduction))
    return with_gradient_of(iwae_bound(log_weights, reduction=reduction), surrogate)


@public_with_callback
def score_function(
    log_likelihood: LogLikelihood,
    mu: Tensor,
    logvar: Scale = None,
    *,
    num_samples: int,
    baseline: str | None = "leave-one-out",
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    """The value of :func:`sgvb_a`, with the score-function gradient: 1/K sum_k (ln w_k - b_k) d/dphi ln q(z_k; phi).

    Williams 1992 ("REINFORCE"); Ranganath, Gerrish & Blei 2014 ("Black Box Variational Inference"). It never
    differentiates ln p(x|z) by z, so that the decoder may be anything at all: a simulator, a table, a discrete choice; but
    where ln p(x|z) is -inf for a sample the ELBO is -inf, and there is no gradient to estimate (inf or NaN comes).
    The trade-off: its variance is larger than that of the reparameterized gradients, usually by orders of magnitude, and
    grows with the number of latent dimensions. With the baseline it vanishes at the posterior, where the weights are all
    the same. Decoder and prior get their ordinary gradients. Second derivatives are not the bound's.

    Args:
        baseline: what is subtracted from ln w_k, without a bias, to lower the variance: "leave-one-out", the mean of the
            other K - 1 samples (Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free"),
            which takes K >= 2; or None.
    """
    if baseline is not None:
        arguments.one_of("baseline", baseline, ("leave-one-out",))
        if arguments.count("num_samples", num_samples) < 2:
            raise ValueError(
                f"num_samples must be at least 2 with baseline='leave-one-out', got {num_samples}; or pass baseline=None"
            )
    z, log_q, log_p = _draw(mu, logvar, num_samples, options, "score")
    log_joint = _of_samples(log_likelihood, z, log_p) + log_p
    log_weights = (log_joint - log_q).detach()
    signal = log_weights
    if baseline is not None:
        signal = (log_weights - log_weights.mean(0)) * (num_samples / (num_samples - 1))
    surrogate = log_joint + signal * log_q
    return with_gradient_of(_mean_weight(log_weights, reduction), _mean_weight(surrogate, reduction))


# ---- in parts ----

_PRIOR = ("prior_mu", *arguments.PRIOR_SCALES)


def _draw(mu: Tensor, logvar: Scale, num_samples: int, options: dict[str, Any], gradient: str) -> tuple[Tensor, ...]:
    arguments.count("num_samples", num_samples)
    return rsample_with_log_prob(mu, logvar, num_samples=num_samples, gradient=gradient, **options)


def _of_samples(log_likelihood: LogLikelihood, z: Tensor, samples: Tensor) -> Tensor:
    """log_likelihood(z), which must have one number for each of ``samples``."""
    if not callable(log_likelihood):
        raise TypeError(f"log_likelihood must be a function of z, got {type(log_likelihood).__name__}")
    value = arguments.tensor("log_likelihood(z)", log_likelihood(z))
    if not arguments.same_shape(value.shape, samples.shape):
        raise ValueError(
            f"log_likelihood(z) must be one number for each sample and example, shape {tuple(samples.shape)}, "
            f"got {tuple(value.shape)}"
        )
    return value


def _mean_weight(log_weights: Tensor, reduction: str) -> Tensor:
    return _reduce(log_weights.mean(0), arguments.reduction(reduction))


def _constant_prior(options: dict[str, Any]) -> dict[str, Any]:
    return {name: v.detach() if name in _PRIOR and isinstance(v, Tensor) else v for name, v in options.items()}


def _log_prior(z: Tensor, options: dict[str, Any]) -> Tensor | None:
    """ln p(z) of samples that are constants, if the prior has a gradient."""
    prior = {name.removeprefix("prior_"): v for name, v in options.items() if name in _PRIOR and v is not None}
    if not any(isinstance(v, Tensor) and v.requires_grad for v in prior.values()):
        return None
    of_kl = {"weight": options.get("kl_weight"), "batch_dims": options.get("batch_dims", 1) + 1}
    return gaussian_log_prob(z, prior.pop("mu", 0.0), **prior, **of_kl)


def _reduce(examples: Tensor, reduction: int) -> Tensor:
    if reduction == REDUCTIONS["sum"]:
        return examples.sum()
    return examples.mean() if reduction == REDUCTIONS["mean"] else examples
