"""Samples of the latent, alone and with what the bound needs of them."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import arguments, autograd
from ..autograd import LatentSpec
from ..dispatch import public, public_with_lists
from ..likelihoods import GAUSSIAN_KL
from ..ops import WITH_KL, WITH_LOG_PROB, Z_ALONE, sample_dtype, value_dtype
from .latent_call import prepare, seed_or_noise
from .lists import of_lists
from .operands import Generators, OneOrEach, Scale, TensorOrList, operands_and_constants, sum_of_term

__all__ = [
    "rsample",
    "rsample_kl",
    "rsample_with_log_prob",
]


@public_with_lists(of_lists(Z_ALONE))
def rsample(
    mu: TensorOrList,
    logvar: OneOrEach = None,
    *,
    log_std: OneOrEach = None,
    std: OneOrEach = None,
    var: OneOrEach = None,
    rho: OneOrEach = None,
    min_std: float | None = None,
    min_var: float | None = None,
    num_samples: int | None = None,
    generator: Generators = None,
    noise: Tensor | Sequence[Tensor] | None = None,
) -> TensorOrList:
    """Reparameterized Gaussian sample, z = mu + sigma * eps, eps ~ N(0, I).

    Kingma & Welling 2014 ("Auto-Encoding Variational Bayes"), section 2.4. Gradients: dz/dmu = 1, dz/dsigma = eps.
    The noise is Philox4x32-10 and Box-Muller, made in registers from one drawn seed and made again in the backward
    pass; element i of z in row-major order gets normal number i of the seed's stream, on every device, with any number
    of threads and for any memory layout. Inside of torch.jit.trace and torch.onnx.export it is torch's own randn.

    Args:
        mu: mean, any shape.
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=``, ``rho=`` (sigma = softplus(rho)) in its place, and
            ``min_std=`` or ``min_var=``, a number, with it.
        num_samples: K adds a leading axis of K samples; None adds no axis.
        generator: where the seed is drawn from; by default torch's generator of mu's device. A list has one for each example
            along the first dimension, which then draws what a call on that example alone would; that stores the noise.
        noise: eps itself, of z's shape, instead of a draw; any dtype, taken in the precision of mu and the scale.

    mu may be a list of tensors, of any shapes, such as the weights of a network; then the scale is a list of as many or a
    number, noise a list, and all else is for all of them. The tensors draw one after the other: what a call on each would.

    Returns:
        z of the joint shape S of mu and the scale, or ``[K, *S]``; its dtype is what the two promote to. A list of them, if mu
        is one.

    Raises:
        ValueError, TypeError: see :mod:`elbo_ext.functional`; also if noise has not z's shape or a generator comes with it.
    """
    call = prepare(
        Z_ALONE, mu, (logvar, log_std, std, var, rho, min_std, min_var), None, (), num_samples, 0, "none"
    )  # fmt: skip
    return cast(TensorOrList, autograd.latent(call.spec, *seed_or_noise(call, generator, noise), call.inputs))


@public_with_lists(of_lists(WITH_KL))
def rsample_kl(
    mu: TensorOrList,
    logvar: OneOrEach = None,
    prior_mu: OneOrEach = None,
    prior_logvar: OneOrEach = None,
    *,
    log_std: OneOrEach = None,
    std: OneOrEach = None,
    var: OneOrEach = None,
    rho: OneOrEach = None,
    min_std: float | None = None,
    min_var: float | None = None,
    prior_log_std: OneOrEach = None,
    prior_std: OneOrEach = None,
    prior_var: OneOrEach = None,
    prior_rho: OneOrEach = None,
    prior_min_std: float | None = None,
    prior_min_var: float | None = None,
    num_samples: int | None = None,
    generator: Generators = None,
    noise: Tensor | Sequence[Tensor] | None = None,
    kl_weight: Tensor | Sequence[Tensor] | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> tuple[TensorOrList, Tensor]:
    """:func:`rsample` and :func:`gaussian_kl` in one pass over mu and the scale.

    Args:
        mu, logvar, num_samples, generator, noise: as in :func:`rsample`.
        prior_mu, prior_logvar, batch_dims, reduction: as in :func:`gaussian_kl`.
        kl_weight: the ``weight`` of :func:`gaussian_kl`, such as a mask of the steps of a sequence; it broadcasts to the joint
            shape of the others. With it there are two kernels, one for z and one for the KL.

    mu may be a list of tensors, such as the weights of a network, ``batch_dims=0``; then every argument that could be a tensor
    is a list of as many, or a number for all. They are one node of the graph, on the CPU one parallel region, and on CUDA one
    kernel for 40 tensors if they are dense, of one dtype, float32 or bfloat16, and the prior is numbers. Under torch.func and
    torch.compile, with noise or kl_weight, each has a call of its own.

    Returns:
        ``(z, kl)``: z as from :func:`rsample`, with the joint shape of all four; kl as from :func:`gaussian_kl`, in nats.
        The KL is analytic, so it has no axis of samples. If mu is a list, so is z, and kl is the sum over the list, whose
        tensors have one batch shape.

    Raises:
        ValueError, TypeError: as the two functions; ValueError for lists of different lengths or batch shapes.
    """
    scales, prior_scales = (
        (logvar, log_std, std, var, rho, min_std, min_var),
        (prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var),
    )
    sampled = _sample_with_prior(
        WITH_KL, mu, scales, prior_mu, prior_scales, num_samples, generator, noise, kl_weight, batch_dims, reduction
    )
    return cast(tuple[TensorOrList, Tensor], sampled)


@public
def rsample_with_log_prob(
    mu: Tensor,
    logvar: Scale = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    rho: Scale = None,
    min_std: float | None = None,
    min_var: float | None = None,
    prior_log_std: Scale = None,
    prior_std: Scale = None,
    prior_var: Scale = None,
    prior_rho: Scale = None,
    prior_min_std: float | None = None,
    prior_min_var: float | None = None,
    num_samples: int | None = None,
    generator: Generators = None,
    noise: Tensor | None = None,
    kl_weight: Tensor | None = None,
    batch_dims: int = 1,
    gradient: str = "pathwise",
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample z of q = N(mu, diag sigma^2), ln q(z) and ln p(z) of the prior, N(0, I) by default, in one pass.

    z = mu + sigma * eps as in :func:`rsample`. ln q = sum -1/2 (eps^2 + ln sigma^2 + ln 2 pi) is computed from the noise, so
    that it is exact for any sigma, where (z - mu) / sigma has lost its digits to the rounding of z. ln p is that of z
    before z is rounded to its dtype.

    Args:
        mu, logvar, num_samples, generator, noise: as in :func:`rsample`.
        prior_mu, prior_logvar, batch_dims: as in :func:`gaussian_kl`.
        kl_weight: weights, or a boolean mask, that broadcast to the joint shape of mu, the scale and the prior: of each
            element's ln q and ln p. An element of weight zero is left out, whatever stands there; its z is drawn. With it
            there are two kernels, and arrays of z's size for the elements.
        gradient: ln q depends on mu and sigma directly, and by way of z. What its gradient takes account of:

            - "pathwise": both, which leaves -1/2 d ln sigma^2 (Kingma & Welling 2014, section 2.4);
            - "sticking_the_landing": z alone. What is left out, the score, has mean zero (Roeder, Wu & Duvenaud 2017);
            - "score": the direct dependence alone, eps / sigma for mu and (eps^2 - 1) / 2 for ln sigma^2 (Williams
              1992). z is then a constant, also to ln p and to the caller.

            The last two leave something out of the first derivative, so that second ones are not those of ln q's mean.

    Returns:
        ``(z, log_q, log_p)``: z as from :func:`rsample`, of the joint shape of all four; log_q and log_p in nats, of the
        batch shape; float64 if any operand is, else float32. With K samples all have a leading axis K.

    Raises:
        ValueError, TypeError: see :mod:`elbo_ext.functional`; ValueError for an unknown ``gradient``.
    """
    arguments.one_of("gradient", gradient, tuple(WITH_LOG_PROB))
    scales, prior_scales = (
        (logvar, log_std, std, var, rho, min_std, min_var),
        (prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var),
    )
    z, log_q, log_p = _sample_with_prior(
        WITH_LOG_PROB[gradient], mu, scales, prior_mu, prior_scales, num_samples, generator, noise, kl_weight, batch_dims,
        "none",
    )  # fmt: skip
    return z, log_q, log_p


def _sample_with_prior(
    results: int,
    mu: Any,
    scales: Sequence[Any],
    prior_mu: Any,
    prior_scales: Sequence[Any],
    num_samples: Any,
    generator: Any,
    noise: Any,
    kl_weight: Any,
    batch_dims: Any,
    reduction: Any,
) -> tuple[Tensor, ...]:
    """z and what else of ``results`` (ops.py) there is."""
    call = prepare(results, mu, scales, prior_mu, prior_scales, num_samples, batch_dims, reduction, kl_weight)
    seed, noise = seed_or_noise(call, generator, noise)
    if call.weight is None:
        sampled: tuple[Tensor, ...] = autograd.latent(call.spec, seed, noise, call.inputs)
        return sampled
    # Two kernels. In the dtype that they compute in, so that the gradients of both are added before they are rounded.
    dtype = value_dtype(*call.inputs)
    wide = {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in call.named.items()}
    wide_inputs, _ = operands_and_constants(wide.values(), call.forms.floors)
    if results == WITH_KL:
        z = autograd.latent(call.spec, seed, noise, wide_inputs)[0]
        others = [sum_of_term(GAUSSIAN_KL, wide, call.forms, call.weight, batch_dims, reduction)]
    else:
        z, *others = _weighted_log_prob(call.spec, seed, noise, wide_inputs, call.weight, len(call.shape))
    return z.to(sample_dtype(*call.inputs[:2])), *others


def _weighted_log_prob(
    spec: LatentSpec,
    seed: Tensor | None,
    noise: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    weight: Tensor,
    dims: int,
) -> list[Tensor]:
    """z, and ln q and ln p summed by hand. ``dims``: of one z. The inputs have one dtype."""
    each = spec._replace(batch_dims=dims)
    z, *log_probs = autograd.latent(each, seed, noise, inputs)
    finite = log_probs[0].isfinite() & log_probs[1].isfinite()
    out = (weight == 0) & ~(finite if spec.num_samples is None else finite.all(0))
    # As in formulas.weighted: what is left out is computed of other numbers, since 0 * NaN would come back in the gradient.
    masked = tuple(t if t is None else torch.where(out, 1.0, t) for t in inputs)
    _, *log_probs = autograd.latent(each, seed, noise if noise is None else torch.where(out, 0.0, noise), masked)
    weight = weight.to(value_dtype(*inputs, weight))
    weighted = (torch.where(out, 0.0, t * weight) for t in log_probs)
    return [z, *(autograd.sum_of_elements(t, spec.batch_dims + spec.sample_axes) for t in weighted)]
