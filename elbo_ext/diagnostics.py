"""How good a bound is, and what the latent variables do: looked at during training or after it, not optimized.

    ln p(x) - ELBO = KL(q(z|x) || p(z|x))    elbo_gap; of it, what a better encoder would save: amortization_gap
    ln p(x)                                  log_evidence, from many samples in bounded memory
    mean KL(q(z|x) || p(z))                  kl_per_dimension, collapse_report, active_units
        = I_q(n; z) + KL(q(z) || p(z))       aggregate_posterior

Nothing here has a gradient. q is a diagonal Gaussian given by ``mu`` and ``logvar`` (or ``log_std=``, ``std=``,
``var=``, ``rho=`` in its place, with ``min_std=`` or ``min_var=``). Everything is in nats. Bad arguments raise the errors
of the package: see :mod:`elbo_ext.functional`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments
from .dispatch import public, public_with_callback
from .functional import Generators, Scale, gaussian_kl, gaussian_log_prob, rsample
from .ops import draw_seed

__all__ = [
    "AggregatePosterior",
    "AmortizationGap",
    "CollapseReport",
    "LogEvidence",
    "active_units",
    "aggregate_posterior",
    "amortization_gap",
    "collapse_report",
    "elbo_gap",
    "kl_per_dimension",
    "log_evidence",
]

LogWeights = Tensor | Iterable[Tensor]

_PRIOR = ("prior_mu", *arguments.PRIOR_SCALES)
_SCALES_AND_PRIOR = (*arguments.SCALES, *_PRIOR)


# ---- from log-weights ln w = ln p(x, z) - ln q(z|x) ----


class LogEvidence(NamedTuple):
    """What :func:`log_evidence` returns; each a float64 tensor ``[*batch]``, but for the number of samples.

    Attributes:
        value: the estimate of ln p(x), in nats.
        standard_error: of value, in nats.
        effective_sample_size: between 1 and num_samples; 0 if all weights are zero.
        elbo: the mean of ln w, which is the ELBO's estimate from the same samples, in nats.
        num_samples: K.
    """

    value: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    elbo: Tensor
    num_samples: int


@public_with_callback
@torch.no_grad()
def log_evidence(log_weights: LogWeights) -> LogEvidence:
    """ln p(x) by importance sampling from q, ln 1/K sum_k w_k, with its standard error, in one pass over any K.

    The mean of the weights is unbiased for p(x); its logarithm is a lower bound in expectation, too low by about half
    the squared standard error (Burda et al. 2016; Nowozin 2018). The error comes from the weights' sample variance s^2
    by the delta method, s / (mean sqrt(K)); effective sample size = (sum w)^2 / sum w^2 (Kong 1992). Both are computed
    from the weights that were drawn: where q misses a region in which p(x, z) is large, they know nothing of it, and
    the error is too small. An effective sample size of a few is a warning.

    Args:
        log_weights: ln w ``[K, *batch]``; or an iterable of such chunks, each as large as memory allows and gone before
            the next one is made: ``log_evidence(draw(1000) for _ in range(100))``. Chunks may differ in K. The chunks
            of a generator are made without gradients.

    Returns:
        :class:`LogEvidence`, accumulated in float64. -inf if all weights are zero (ln w = -inf), with an error of NaN.
        With K = 1 the error is NaN as well: one number has no spread.

    Raises:
        ValueError, TypeError: if there is no sample, a chunk is no floating-point tensor, or their batches differ.
    """
    w = _accumulate(log_weights)
    # Squared coefficient of variation, from deviations: sum w^2 - (sum w)^2 / K would cancel for weights close
    # together.
    variation = w.squares / (w.number * w.mean.square())
    size = torch.where(w.mean == 0, 0.0, w.number / (1 + variation))
    error = (variation / (w.number - 1)).sqrt() if w.number > 1 else torch.full_like(variation, math.nan)
    return LogEvidence(w.log_scale + w.mean.log(), error, size, w.log_mean, w.number)


@public_with_callback
def elbo_gap(log_weights: LogWeights, *, elbo: Tensor | None = None) -> Tensor:
    """ln p(x) - ELBO = KL(q(z|x) || p(z|x)), estimated from samples of q: ln 1/K sum w - 1/K sum ln w.

    Never negative (Jensen's inequality for the sample). Biased as the estimate of ln p(x) is: too low, by what
    :func:`elbo_ext.bounds.iwae_bound` of K samples is below ln p(x). It says how well q fits the posterior of *this*
    model; not how good the model is, nor how useful z.

    Args:
        log_weights: as in :func:`log_evidence`.
        elbo: the ELBO ``[*batch]`` if it is known better than from these samples, for example with an analytic KL. The
            difference may then be negative by the noise of either.

    Returns:
        The gap in nats, ``[*batch]``, float64. If only some weights are zero, q has mass where the posterior has none,
        and the gap is inf; if all are, NaN.

    Raises:
        ValueError, TypeError: as :func:`log_evidence`.
    """
    evidence = log_evidence(log_weights)
    if elbo is None:
        return evidence.value - evidence.elbo
    arguments.broadcasts_to_batch("elbo of shape {}", arguments.tensor("elbo", elbo), evidence.value.shape)
    arguments.broadcast({"log_weights": evidence.value, "elbo": elbo})  # for the device
    return evidence.value - elbo.detach()


class _Weights(NamedTuple):
    """Moments of weights w = exp(log_scale) * v: of v, which is at most 1, and of ln w."""

    number: int  # of weights
    log_scale: Tensor  # the largest ln w so far; 0 where that is infinite, as nothing can be measured by it
    mean: Tensor  # of v
    squares: Tensor  # sum of (v - mean)^2
    log_mean: Tensor  # mean of ln w


def _accumulate(log_weights: LogWeights) -> _Weights:
    if isinstance(log_weights, Tensor):
        log_weights = (log_weights,)
    elif not isinstance(log_weights, Iterable):
        raise TypeError(f"log_weights must be a torch.Tensor or an iterable of them, got {type(log_weights).__name__}")
    total = None
    for chunk in log_weights:
        new = _moments(arguments.samples("log_weights", chunk))
        if total is not None and new.mean.shape != total.mean.shape:
            raise ValueError(
                f"log_weights must have one batch shape in all chunks, got {tuple(total.mean.shape)} and "
                f"{tuple(new.mean.shape)}"
            )
        total = new if total is None else _merge(total, new)
        del chunk  # before the next one is made
    if total is None:
        raise ValueError("log_weights must have at least one sample, got no chunks")
    return total


def _moments(log_weights: Tensor) -> _Weights:
    log_weights = log_weights.double()
    largest = log_weights.amax(0)
    log_scale = torch.where(largest.isinf(), 0.0, largest)
    weights = (log_weights - log_scale).exp()
    mean = weights.mean(0)
    return _Weights(weights.shape[0], log_scale, mean, (weights - mean).square().sum(0), log_weights.mean(0))


def _merge(a: _Weights, b: _Weights) -> _Weights:
    """Chan, Golub & LeVeque 1983, after both were brought to one scale."""
    # A side of weights that are all zero has no scale of its own.
    scale_a, scale_b = (torch.where(w.mean == 0, -torch.inf, w.log_scale) for w in (a, b))
    largest = torch.maximum(scale_a, scale_b)
    log_scale = torch.where(largest.isinf(), 0.0, largest)
    factor_a, factor_b = (scale_a - log_scale).exp(), (scale_b - log_scale).exp()
    count = a.number + b.number
    mean_a, mean_b = a.mean * factor_a, b.mean * factor_b
    share = b.number / count
    return _Weights(
        count,
        log_scale,
        mean_a * (1 - share) + mean_b * share,
        a.squares * factor_a.square() + b.squares * factor_b.square() + (mean_b - mean_a).square() * a.number * share,
        a.log_mean * (1 - share) + b.log_mean * share,
    )


# ---- what the latent dimensions carry ----


@public
@torch.no_grad()
def kl_per_dimension(mu: Tensor, logvar: Scale = None, *, batch_dims: int = 1, **options: Any) -> Tensor:
    """KL(q(z_j|x) || p(z_j)) of each latent dimension j, its mean over the examples.

    Args:
        mu, logvar: of q, ``[*batch, *latent]``; at least one example.
        batch_dims: number of batch dimensions.
        options: the other forms of the scale, and the prior, as in :func:`elbo_ext.gaussian_kl`.

    Returns:
        ``[*latent]`` in nats; its sum is the mean KL.
    """
    return _elementwise_kl(mu, logvar, batch_dims, options).mean(0)


def _elementwise_kl(mu: Tensor, logvar: Scale, batch_dims: int, options: dict[str, Any]) -> Tensor:
    """``[N, *latent]``, the batch dimensions made one."""
    arguments.keywords(options, _SCALES_AND_PRIOR)
    arguments.tensor("mu", mu)
    arguments.examples("mu", mu, arguments.batch_dims(batch_dims, mu.shape))
    if batch_dims == 0:
        raise ValueError("batch_dims must be at least 1, as the mean is over examples, got 0")
    return gaussian_kl(mu, logvar, batch_dims=mu.dim(), **options).flatten(0, batch_dims - 1)


@public
@torch.no_grad()
def active_units(mu: Tensor, *, threshold: float = 0.01, batch_dims: int = 1) -> Tensor:
    """Which latent dimensions the data moves: Var_x(E_q(z|x)[z_j]) > threshold.

    Burda et al. 2016, with their threshold of 0.01; the variance is over the examples, divided by N - 1.

    Args:
        mu: means of q ``[*batch, *latent]`` for N >= 2 examples, best a whole data set.
        threshold: of the variance, in units of z^2.
        batch_dims: number of batch dimensions.

    Returns:
        bool ``[*latent]``; its ``.sum()`` is the number of active units.
    """
    return _variance_of_means(mu, batch_dims) > arguments.number("threshold", threshold, low=0)


def _variance_of_means(mu: Tensor, batch_dims: int) -> Tensor:
    arguments.tensor("mu", mu)
    arguments.examples("mu", mu, arguments.batch_dims(batch_dims, mu.shape), low=2)
    # In float64: the square of a collapsed mean, and the mean of a million of them.
    return mu.double().flatten(0, batch_dims - 1).var(0)


@dataclass(frozen=True)
class CollapseReport:
    """What :func:`collapse_report` returns: numbers per latent dimension, ``[*latent]``; ``print`` shows a table.

    Attributes:
        kl: mean over the examples of KL(q(z_j|x) || p(z_j)), in nats.
        silent: fraction of the examples whose KL is below ``epsilon``.
        collapsed: bool, silent >= 1 - delta.
        variance_of_means: Var_x(E_q[z_j]), what :func:`active_units` looks at.
        active: bool, as from :func:`active_units`.
    """

    kl: Tensor
    silent: Tensor
    collapsed: Tensor
    variance_of_means: Tensor
    active: Tensor

    def __str__(self) -> str:
        lines = [f"{'dimension':>9} {'KL (nats)':>11} {'silent':>8} {'Var E[z]':>11}"]
        columns = [
            t.flatten().tolist() for t in (self.kl, self.silent, self.variance_of_means, self.collapsed, self.active)
        ]
        rows = sorted(enumerate(zip(*columns, strict=True)), key=lambda row: -row[1][0])
        for number, (kl, silent, variance, collapsed, active) in rows:
            marks = "  collapsed" * collapsed + "  not active" * (not active)
            lines.append(f"{number:>9} {kl:>11.4g} {silent:>8.1%} {variance:>11.4g}{marks}")
        total, size = float(self.kl.sum()), self.kl.numel()
        collapsed, active = int(self.collapsed.sum()), int(self.active.sum())
        lines.append(f"{collapsed} of {size} dimensions collapsed, {active} active, KL {total:.4g} nats")
        return "\n".join(lines)


@public
@torch.no_grad()
def collapse_report(
    mu: Tensor,
    logvar: Scale = None,
    *,
    epsilon: float = 0.01,
    delta: float = 0.01,
    threshold: float = 0.01,
    batch_dims: int = 1,
    **options: Any,
) -> CollapseReport:
    """Posterior collapse: z_j is collapsed if KL(q(z_j|x) || p(z_j)) < epsilon for at least 1 - delta of the examples.

    Lucas et al. 2019 ("Don't Blame the ELBO!"). A collapsed dimension is not active, but one that is not
    active need not be collapsed: its variance may differ from the prior's though its mean stays.

    Args:
        mu, logvar: of q, ``[*batch, *latent]``, two examples or more.
        epsilon: in nats.
        delta: fraction of the examples that may be above it, in [0, 1].
        threshold: of :func:`active_units`.
        batch_dims: number of batch dimensions.
        options: the other forms of the scale, and the prior, as in :func:`elbo_ext.gaussian_kl`.
    """
    epsilon = arguments.number("epsilon", epsilon, low=0, above=True)
    delta = arguments.number("delta", delta, low=0)
    if delta > 1:
        raise ValueError(f"delta must be a fraction between 0 and 1, got {delta:g}")
    variance = _variance_of_means(mu, batch_dims)
    active = active_units(mu, threshold=threshold, batch_dims=batch_dims)
    kl = _elementwise_kl(mu, logvar, batch_dims, options)
    silent = (kl < epsilon).double().mean(0)
    return CollapseReport(kl.mean(0), silent, silent >= 1 - delta, variance, active)


class AggregatePosterior(NamedTuple):
    """What :func:`aggregate_posterior` returns: scalars in nats, kl = mutual_information + marginal_kl.

    Attributes:
        mutual_information: I_q(n; z) between the index of an example and z; at most ln N.
        marginal_kl: KL(q(z) || p(z)) of the aggregate posterior q(z) = 1/N sum_n q(z|x_n).
        kl: mean over the examples of KL(q(z|x_n) || p(z)), analytic.
    """

    mutual_information: Tensor
    marginal_kl: Tensor
    kl: Tensor


@public
@torch.no_grad()
def aggregate_posterior(
    mu: Tensor,
    logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    rho: Scale = None,
    min_std: float | None = None,
    min_var: float | None = None,
    num_samples: int = 1,
    generator: Generators = None,
    **prior: Any,
) -> AggregatePosterior:
    """Mean KL = I_q(n; z) + KL(q(z) || p(z)), the mutual information I by Monte Carlo.

    Hoffman & Johnson 2016 ("ELBO surgery"). I is the mean of ln q(z|x_n) - ln 1/N sum_m q(z|x_m), over z from each of
    the q(z|x_n). For the N examples given that is unbiased. As an estimate for a larger data set, of which they are a
    minibatch, it is *too low*: it can never exceed ln N, and its expectation rises with N to the truth (it is an
    InfoNCE bound, Poole et al. 2019); the KL of the aggregate is too high by as much. Pass as many examples as there
    are, or at least far more than e^I.

    Args:
        mu, logvar: of q, ``[N, *latent]``, N >= 1; or ``log_std=``, ``std=``, ``var=``, ``rho=`` in place of
            ``logvar``, with ``min_std=`` or ``min_var=``.
        num_samples: draws of z from each q(z|x_n).
        generator: where the seed of the draws comes from; or a list, one for each of the q(z|x_n).
        prior: ``prior_mu``, ``prior_logvar``, ... as in :func:`elbo_ext.gaussian_kl`, the same for all examples.

    Returns:
        :class:`AggregatePosterior`, in float64. Takes num_samples * N^2 densities, in blocks of bounded memory.
    """
    arguments.examples("mu", mu, 1)
    scales = (logvar, log_std, std, var, rho, min_std, min_var)
    name, scale, *_ = arguments.scale(arguments.SCALES, scales)
    arguments.keywords(prior, _PRIOR)
    arguments.count("num_samples", num_samples)
    arguments.broadcasts_to_batch(name + " of shape {}", scale, mu.shape, "shape of mu,")
    for label, value in prior.items():  # broadcast to q(z), which has no examples
        arguments.broadcasts_to_batch(label + " of shape {}", value, torch.Size((1, *mu.shape[1:])), "shape of one z,")
    of_q: dict[str, Any] = {k: v for k, v in zip(arguments.SCALES, scales, strict=True) if v is not None}
    kl = gaussian_kl(mu, **of_q, **prior).double().mean()
    total, count = torch.zeros_like(kl), len(mu)
    rows = max(1, _BLOCK // count)
    for _ in range(num_samples):
        z = rsample(mu, **of_q, generator=generator)
        own = gaussian_log_prob(z, mu, **of_q).double()
        for first in range(0, count, rows):
            block = z[first : first + rows].unsqueeze(1)  # against every q(z|x_m): [rows, N], nothing of z is repeated
            every = gaussian_log_prob(block, mu, **of_q, batch_dims=2).double()
            total = total + (own[first : first + rows] - every.logsumexp(1) + math.log(count)).sum()
    information = total / (num_samples * count)
    return AggregatePosterior(information, kl - information, kl)


_BLOCK = 2**21  # densities at once: 16 MiB in float64


# ---- amortization ----


class AmortizationGap(NamedTuple):
    """What :func:`amortization_gap` returns; the first three ``[*batch]`` in nats.

    Attributes:
        gap: refined - amortized.
        amortized: the bound at the encoder's q.
        refined: the bound at the refined q.
        mu, logvar: of the refined q, as the encoder's.
    """

    gap: Tensor
    amortized: Tensor
    refined: Tensor
    mu: Tensor
    logvar: Tensor


@public_with_callback
def amortization_gap(
    elbo: Callable[[Tensor, Tensor], Tensor],
    mu: Tensor,
    logvar: Tensor,
    *,
    steps: int = 500,
    learning_rate: float = 0.01,
) -> AmortizationGap:
    """What the bound loses because one encoder serves all data: each q refined by gradient ascent, the decoder fixed.

    Cremer, Li & Duvenaud 2018 ("Inference Suboptimality in Variational Autoencoders"): the gap ln p(x) - ELBO is the
    amortization gap, ELBO of the best q of the family - ELBO, plus the approximation gap, which the family leaves
    (:func:`elbo_gap` of the refined q). Adam, with a step size that falls to zero, from the encoder's q on. Where it
    has not converged, the gap is too small: compare two numbers of ``steps``.

    Args:
        elbo: the bound of each example as a function of mu and logvar, ``[*batch]``, larger being better; it holds data
            and decoder, whose parameters are left alone. If it draws z, the bounds before and after are computed with
            the same noise (of torch's default generators, the CPU's and mu's device's); average over many samples.
        mu, logvar: what the encoder gives, ``[*batch, *latent]`` both.
        steps: of the ascent.
        learning_rate: of Adam, at the first step.

    Returns:
        :class:`AmortizationGap`, without gradients.

    Raises:
        ValueError, TypeError: as everywhere; also if elbo returns no tensor that depends on mu and logvar.
    """
    if not callable(elbo):
        raise TypeError(f"elbo must be a function of mu and logvar, got {type(elbo).__name__}")
    arguments.tensor("mu", mu)
    arguments.tensor("logvar", logvar)
    if logvar.shape != mu.shape:
        raise ValueError(f"logvar must have the shape of mu, {tuple(mu.shape)}, got {tuple(logvar.shape)}")
    arguments.count("steps", steps)
    learning_rate = arguments.number("learning_rate", learning_rate, low=0, above=True)
    seed = int(draw_seed(torch.device("cpu")))

    def checked(bound: Any) -> Tensor:
        """The bounds, one for each q."""
        values = arguments.tensor("elbo(mu, logvar)", bound)
        batch = values.shape
        if batch != mu.shape[: len(batch)] or (len(batch) == 0 and mu.dim() > 1):
            raise ValueError(
                f"elbo must return one bound for each example of mu, of shape {tuple(mu.shape)}, got shape {tuple(batch)}"
            )
        return values

    @torch.no_grad()
    def with_the_same_noise(mu: Tensor, logvar: Tensor) -> Tensor:
        gpus = [mu.device] if mu.is_cuda else []
        with torch.random.fork_rng(devices=gpus):
            # Not by torch.manual_seed, which seeds every other GPU as well.
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                torch.cuda.default_generators[gpu.index].manual_seed(seed)
            return checked(elbo(mu, logvar))

    amortized = with_the_same_noise(mu.detach(), logvar.detach())
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [t.detach().clone().requires_grad_() for t in (mu, logvar)]
        optimizer = torch.optim.Adam(leaves, lr=learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            bound = checked(elbo(*leaves))
            if not bound.requires_grad:
                raise ValueError(
                    "elbo must return a tensor that depends on mu and logvar, got one that has no gradient"
                )
            # By these leaves alone: .grad of the decoder's parameters stays as it is.
            for leaf, gradient in zip(leaves, torch.autograd.grad(-bound.sum(), leaves), strict=True):
                leaf.grad = gradient
            optimizer.step()
            decay.step()
    mu, logvar = (t.detach() for t in leaves)
    refined = with_the_same_noise(mu, logvar)
    return AmortizationGap(refined - amortized, amortized, refined, mu, logvar)
