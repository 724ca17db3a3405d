"""Samples of the latent, alone and beside what the bound needs of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments, autograd, validation
from ..arguments import SCALES
from ..autograd import LatentSpec
from ..autograd.torch_internals import is_recorded
from ..dispatch import public
from ..likelihoods import GAUSSIAN_KL
from ..ops import NONE, WITH_KL, WITH_LOG_PROB, Z_ALONE, draw_on_cuda, draw_seed, sample_dtype, value_dtype
from .operands import Generators, Scale, operands_and_constants, posterior_and_prior, sum_of_term

__all__ = [
    "rsample",
    "rsample_kl",
    "rsample_with_log_prob",
]


@public
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
    generator: Generators = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Reparameterized Gaussian sample, z = mu + sigma * eps, eps ~ N(0, I).

    Kingma & Welling 2014 ("Auto-Encoding Variational Bayes"), section 2.4. Gradients: dz/dmu = 1, dz/dsigma = eps.
    The noise is Philox4x32-10 and Box-Muller, made in registers from one drawn seed and made again in the backward
    pass; element i of z in row-major order gets normal number i of the seed's stream, on every device, with any number
    of threads and for any memory layout. Inside of torch.jit.trace and torch.onnx.export it is torch's own randn.

    Args:
        mu: mean, any shape.
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=``, ``rho=`` (sigma = softplus(rho)) in its place, and
            ``min_std=`` or ``min_var=``, a number, beside it.
        num_samples: K adds a leading axis of K samples; None adds no axis.
        generator: where the seed is drawn from; by default torch's generator of mu's device. A list has one for each example
            along the first dimension, which then draws what a call on that example alone would; that stores the noise.
        noise: eps itself, of z's shape, instead of a draw; any dtype, taken in the precision of mu and the scale.

    Returns:
        z of the joint shape S of mu and the scale, or ``[K, *S]``; its dtype is what the two promote to.

    Raises:
        ValueError, TypeError: see :mod:`elbo_ext.functional`; also if noise has not z's shape or a generator comes with it.
    """
    name, scale, form, floor = arguments.scale(SCALES, (logvar, log_std, std, var, rho, min_std, min_var))
    named = {"mu": arguments.tensor("mu", mu), name: scale}
    shape = arguments.broadcast(named)
    inputs, constants = operands_and_constants(named.values(), (0.0, floor))
    # The prior, which there is none of, is of the same form: kernels are compiled for pairs of forms.
    forms = GAUSSIAN_KL.pack((0, form, 0, form if floor == 0 else 0))
    validation.operands(GAUSSIAN_KL, named, forms, None)
    spec = LatentSpec(constants, forms, arguments.num_samples(num_samples), Z_ALONE, len(shape), NONE)
    z: Tensor = autograd.latent(spec, *_seed_or_noise(mu, shape, spec, generator, noise, inputs), inputs)
    return z


@public
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
    generator: Generators = None,
    noise: Tensor | None = None,
    kl_weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """:func:`rsample` and :func:`gaussian_kl` in one pass over mu and the scale.

    Args:
        mu, logvar, num_samples, generator, noise: as in :func:`rsample`.
        prior_mu, prior_logvar, batch_dims, reduction: as in :func:`gaussian_kl`.
        kl_weight: the ``weight`` of :func:`gaussian_kl`, such as a mask of the steps of a sequence; it broadcasts to the joint
            shape of the others. With it there are two kernels, one for z and one for the KL.

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
        WITH_KL, mu, scales, prior_mu, prior_scales, num_samples, generator, noise, kl_weight, batch_dims, reduction
    )
    return z, kl


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
    z, log_q, log_p = _sample_beside_prior(
        WITH_LOG_PROB[gradient], mu, scales, prior_mu, prior_scales, num_samples, generator, noise, kl_weight, batch_dims,
        "none",
    )  # fmt: skip
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
    kl_weight: Any,
    batch_dims: Any,
    reduction: Any,
) -> tuple[Tensor, ...]:
    """z and what else of ``results`` (ops.py) there is."""
    named, forms = posterior_and_prior(mu, scales, prior_mu, prior_scales)
    shape = arguments.broadcast(named)
    weight = arguments.kl_weight(kl_weight, mu, shape)
    validation.operands(GAUSSIAN_KL, named, forms.number, weight)
    inputs, constants = operands_and_constants(named.values(), forms.floors)
    spec = LatentSpec(
        constants,
        forms.number,
        arguments.num_samples(num_samples),
        results,
        arguments.batch_dims(batch_dims, shape),
        arguments.reduction(reduction),
    )
    seed, noise = _seed_or_noise(mu, shape, spec, generator, noise, inputs)
    if weight is None:
        sampled: tuple[Tensor, ...] = autograd.latent(spec, seed, noise, inputs)
        return sampled
    # Two kernels. In the dtype that they compute in, so that the gradients of both are added before they are rounded.
    dtype = value_dtype(*inputs)
    wide = {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in named.items()}
    wide_inputs, _ = operands_and_constants(wide.values(), forms.floors)
    if results == WITH_KL:
        z = autograd.latent(spec, seed, noise, wide_inputs)[0]
        others = [sum_of_term(GAUSSIAN_KL, wide, forms, weight, batch_dims, reduction)]
    else:
        z, *others = _weighted_log_prob(spec, seed, noise, wide_inputs, weight, len(shape))
    return z.to(sample_dtype(*inputs[:2])), *others


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


def _seed_or_noise(
    mu: Tensor,
    shape: torch.Size,
    spec: LatentSpec,
    generator: Generators,
    noise: Tensor | None,
    inputs: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """What the latent operators take: a fresh seed, or the caller's noise."""
    arguments.generator(generator, shape)
    if noise is None:
        if generator is None and autograd.in_trace():
            return None, _noise_of_torch(spec, inputs)
        if generator is not None and not isinstance(generator, torch.Generator):
            return None, _noise_of_each(mu, shape, spec, generator, value_dtype(*inputs))
        if torch.compiler.is_compiling() and generator is None:
            return torch.ops.elbo_ext.draw_seed(mu), None
        return _draw_seed(mu.device, generator), None
    if generator is not None:
        raise ValueError("noise and generator were both given; noise leaves nothing to draw")
    arguments.tensor("noise", noise)
    expected = spec.sample_shape(shape)
    if not arguments.same_shape(noise.shape, expected):
        raise ValueError(f"noise must have the shape of the sample, {tuple(expected)}, got {tuple(noise.shape)}")
    arguments.broadcast({"mu": mu, "noise": noise})  # for the device
    return None, noise


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """As draw_seed; for CUDA on the CPU, read off the generator's state, where nothing records the draw: a tenth of the time
    that it takes to launch a kernel. The kernels take the seed from either."""
    if device.type == "cuda" and not is_recorded():
        generator = torch.cuda.default_generators[device.index] if generator is None else generator
        return torch.tensor([draw_on_cuda(generator)])
    return draw_seed(device, generator)


def _noise_of_each(
    mu: Tensor, shape: torch.Size, spec: LatentSpec, generators: Sequence[torch.Generator], dtype: torch.dtype
) -> Tensor:
    """For every example what the kernels would make from a seed of its own generator."""
    seeds = [_draw_seed(mu.device, generator) for generator in generators]
    if not seeds:
        return mu.new_empty(spec.sample_shape(shape), dtype=dtype)
    noise = autograd.explicit_noise(torch.cat(seeds), spec.sample_shape(shape[1:]), dtype, mu.device)
    return noise.movedim(0, spec.sample_axes)


def _noise_of_torch(spec: LatentSpec, inputs: tuple[Tensor | None, ...]) -> Tensor:
    """By an operator that a traced program runs anew at every call."""
    like = torch.broadcast_tensors(*(t for t in inputs if t is not None))[0]
    if spec.num_samples is not None:
        like = like.unsqueeze(0).expand(spec.num_samples, *(-1,) * like.dim())
    return torch.randn_like(like, dtype=value_dtype(*inputs))
