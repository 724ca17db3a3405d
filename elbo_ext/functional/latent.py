"""Samples of the latent, alone and beside what the bound needs of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments, autograd
from ..arguments import SCALES
from ..autograd import LatentSpec
from ..likelihoods import GAUSSIAN_KL
from ..ops import NONE, WITH_KL, WITH_LOG_PROB, Z_ALONE, draw_seed
from .operands import Scale, operands_and_constants, posterior_and_prior

__all__ = [
    "rsample",
    "rsample_kl",
    "rsample_with_log_prob",
]


def rsample(
    mu: Tensor,
    logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    rho: Scale = None,
    min_std: float | None = None,
    min_var: float | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Reparameterized Gaussian sample, z = mu + sigma * eps, eps ~ N(0, I).

    Kingma & Welling 2014 ("Auto-Encoding Variational Bayes"), section 2.4. Gradients: dz/dmu = 1, dz/dsigma = eps.
    The noise is Philox4x32-10 and Box-Muller, made in registers from one drawn seed and made again in the backward
    pass; element i of z in row-major order gets normal number i of the seed's stream, on every device, with any number
    of threads and for any memory layout.

    Args:
        mu: mean, any shape.
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=``, ``rho=`` (sigma = softplus(rho)) in its place, and
            ``min_std=`` or ``min_var=``, a number, beside it.
        num_samples: K adds a leading axis of K samples; None adds no axis.
        generator: where the seed is drawn from; by default torch's generator of mu's device.
        noise: eps itself, of z's shape, instead of a draw; any dtype, taken in the precision of mu and the scale.

    Returns:
        z of the joint shape S of mu and the scale, or ``[K, *S]``; its dtype is what the two promote to.

    Raises:
        ValueError, TypeError: see the module's conventions; also if noise has not z's shape or a generator comes with it.
    """
    name, scale, form, floor = arguments.scale(SCALES, (logvar, log_std, std, var, rho, min_std, min_var))
    named = {"mu": arguments.tensor("mu", mu), name: scale}
    shape = arguments.broadcast(named)
    inputs, constants = operands_and_constants(named.values(), (0.0, floor))
    # The prior, which there is none of, is of the same form: kernels are compiled for pairs of forms.
    forms = GAUSSIAN_KL.pack((0, form, 0, form if floor == 0 else 0))
    spec = LatentSpec(constants, forms, arguments.num_samples(num_samples), Z_ALONE, len(shape), NONE)
    z: Tensor = autograd.latent(spec, *_seed_or_noise(mu, shape, spec, generator, noise), inputs)
    return z


def rsample_kl(
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
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """:func:`rsample` and :func:`gaussian_kl` in one pass over mu and the scale.

    Args:
        mu, logvar, num_samples, generator, noise: as in :func:`rsample`.
        prior_mu, prior_logvar, batch_dims, reduction: as in :func:`gaussian_kl`.

    Returns:
        ``(z, kl)``: z as from :func:`rsample`, with the joint shape of all four; kl as from :func:`gaussian_kl`, in nats.
        The KL is analytic, so it has no axis of samples.

    Raises:
        ValueError, TypeError: as the two functions.
    """
    scales, prior_scales = (
        (logvar, log_std, std, var, rho, min_std, min_var),
        (prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var),
    )
    z, kl = _sample_beside_prior(
        WITH_KL, mu, scales, prior_mu, prior_scales, num_samples, generator, noise, batch_dims, reduction
    )
    return z, kl


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
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
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
        ValueError, TypeError: see the module's conventions; ValueError for an unknown ``gradient``.
    """
    arguments.one_of("gradient", gradient, tuple(WITH_LOG_PROB))
    scales, prior_scales = (
        (logvar, log_std, std, var, rho, min_std, min_var),
        (prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var),
    )
    z, log_q, log_p = _sample_beside_prior(
        WITH_LOG_PROB[gradient], mu, scales, prior_mu, prior_scales, num_samples, generator, noise, batch_dims, "none"
    )
    return z, log_q, log_p


def _sample_beside_prior(
    results: int,
    mu: Any,
    scales: Sequence[Scale],
    prior_mu: Any,
    prior_scales: Sequence[Scale],
    num_samples: Any,
    generator: Any,
    noise: Any,
    batch_dims: Any,
    reduction: Any,
) -> tuple[Tensor, ...]:
    """z and what else of ``results`` (ops.py) there is."""
    named, forms = posterior_and_prior(mu, scales, prior_mu, prior_scales)
    shape = arguments.broadcast(named)
    inputs, constants = operands_and_constants(named.values(), forms.floors)
    spec = LatentSpec(
        constants,
        forms.number,
        arguments.num_samples(num_samples),
        results,
        arguments.batch_dims(batch_dims, shape),
        arguments.reduction(reduction),
    )
    sampled: tuple[Tensor, ...] = autograd.latent(spec, *_seed_or_noise(mu, shape, spec, generator, noise), inputs)
    return sampled


def _seed_or_noise(
    mu: Tensor, shape: torch.Size, spec: LatentSpec, generator: torch.Generator | None, noise: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the latent operators take: a fresh seed, or the caller's noise."""
    arguments.generator(generator)
    if noise is None:
        if torch.compiler.is_compiling() and generator is None:
            return torch.ops.elbo_ext.draw_seed(mu), None
        return draw_seed(mu.device, generator), None
    if generator is not None:
        raise ValueError("noise and generator were both given; noise leaves nothing to draw")
    arguments.tensor("noise", noise)
    expected = shape if spec.num_samples is None else (spec.num_samples, *shape)
    if not arguments.same_shape(noise.shape, expected):
        raise ValueError(f"noise must have the shape of the sample, {tuple(expected)}, got {tuple(noise.shape)}")
    arguments.broadcast({"mu": mu, "noise": noise})  # for the device
    return None, noise
