"""How training steers the KL: schedules, capacity, free bits, balance. Part of :mod:`elbo_ext.bounds`.

All of them act on KLs that :func:`elbo_ext.gaussian_kl` computed in one pass. With ``batch_dims`` = number of
dimensions that pass gives one KL per latent dimension, which is also what :mod:`elbo_ext.diagnostics` looks at::

    kl = gaussian_kl(mu, logvar, batch_dims=2)                            # [B, D], mu [B, D]
    kl = free_bits(kl, 0.5, per="batch")                                  # scalar
    elbo_loss(decoder(z), x, kl=kl, beta=LinearSchedule(10_000)(step))

Only beta = 1 without any control gives a lower bound of ln p(x). All KLs are in nats.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import arguments, autograd, validation
from ..dispatch import public
from ..functional import Scale, gaussian_kl
from ..ops import value_dtype

__all__ = [
    "CosineSchedule",
    "CyclicalSchedule",
    "LinearSchedule",
    "LogisticSchedule",
    "balanced_kl",
    "capacity",
    "free_bits",
]


# ---- schedules: a number for each step of the training, for beta or for a capacity ----


class Schedule(Protocol):
    def __call__(self, step: float) -> float: ...


@dataclass(frozen=True)
class LinearSchedule:
    """From ``start`` to ``end`` in equal steps, then constant (warm-up; Sonderby et al. 2016, "Ladder VAE").

    ``schedule(step)`` takes the number of the training step, 0 for the first, and returns a Python float. As ``beta``
    of :func:`elbo_ext.elbo_loss` that float may change at every step of compiled code too.

    Args:
        steps: how long the way takes.
        start, end: the values before and after.

    Raises:
        ValueError, TypeError: if a number is not finite, ``steps`` not positive, or ``step`` negative.
    """

    steps: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _keep_numbers(self, steps=arguments.number("steps", self.steps, low=0, above=True))
        _keep_numbers(self, start=arguments.number("start", self.start), end=arguments.number("end", self.end))

    def __call__(self, step: float) -> float:
        return _between(self.start, self.end, self._progress(step))

    def _progress(self, step: float) -> float:
        return min(arguments.number("step", step, low=0) / self.steps, 1.0)


@dataclass(frozen=True)
class CosineSchedule(LinearSchedule):
    """As :class:`LinearSchedule`, along half a period of a cosine: without a kink at either end (Fu et al. 2019)."""

    def __call__(self, step: float) -> float:
        return _between(self.start, self.end, (1 - math.cos(math.pi * self._progress(step))) / 2)


@dataclass(frozen=True)
class LogisticSchedule:
    """start + (end - start) * sigmoid(rate * (step - midpoint)) (Bowman et al. 2016, "Generating Sentences").

    Args:
        midpoint: the step halfway between the two values.
        rate: steepness, per step; 0.0025 with a midpoint of 2500 is common.
        start, end: the limits far before and far after.

    Raises:
        ValueError, TypeError: if a number is not finite, ``rate`` not positive, or ``step`` negative.
    """

    midpoint: float
    rate: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _keep_numbers(self, midpoint=arguments.number("midpoint", self.midpoint))
        _keep_numbers(self, rate=arguments.number("rate", self.rate, low=0, above=True))
        _keep_numbers(self, start=arguments.number("start", self.start), end=arguments.number("end", self.end))

    def __call__(self, step: float) -> float:
        distance = self.rate * (arguments.number("step", step, low=0) - self.midpoint)
        return _between(self.start, self.end, (1 + math.tanh(distance / 2)) / 2)  # sigmoid, for any distance


@dataclass(frozen=True)
class CyclicalSchedule:
    """Another schedule from its beginning again every ``period`` steps (Fu et al. 2019, "Cyclical Annealing Schedule").

    Theirs, which rises over the first half of each cycle, is ``CyclicalSchedule(LinearSchedule(period / 2), period)``.

    Args:
        schedule: what happens within a cycle: any function of the step.
        period: steps of a cycle.

    Raises:
        ValueError, TypeError: if ``schedule`` cannot be called, ``period`` is not positive, or ``step`` negative.
    """

    schedule: Schedule
    period: float

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise TypeError(f"schedule must be a function of the step, got {type(self.schedule).__name__}")
        _keep_numbers(self, period=arguments.number("period", self.period, low=0, above=True))

    def __call__(self, step: float) -> float:
        step = arguments.number("step", step, low=0)
        if torch.compiler.is_compiling():  # inductor has no remainder of numbers that change from call to call
            return self.schedule(max(step - self.period * math.floor(step / self.period), 0.0))
        return self.schedule(step % self.period)


def _keep_numbers(schedule: Any, **numbers: float) -> None:
    """Fields as Python's numbers, which compiled code may see change and every checkpoint can hold; an int stays one."""
    for name, number in numbers.items():
        if type(getattr(schedule, name)) not in (int, float):
            object.__setattr__(schedule, name, number)


def _between(start: float, end: float, fraction: float) -> float:
    # Exactly end at fraction 1; of Python, also where a number of the schedule is NumPy's.
    return float((1 - fraction) * start + fraction * end)


# ---- penalties made of KLs ----


@public
def free_bits(kl: Tensor, nats: Tensor | float, *, per: str, batch_dims: int = 1) -> Tensor:
    """sum over groups g of max(nats, KL_g): a group's KL costs nothing until it exceeds ``nats``.

    A group is a latent dimension, or whatever dimensions the KL was summed over: channels from
    ``gaussian_kl(mu, logvar, batch_dims=2)`` of a mu ``[B, C, H, W]``, the whole latent vector from a KL ``[B]``. The
    literature takes the maximum in two places, which differ in value and in gradient:

    - ``per="batch"``: sum_g max(nats, mean over the batch of KL_g) (Kingma et al. 2016, "Inverse Autoregressive
      Flow"). A group may be informative about a few examples and silent about the others.
    - ``per="example"``: sum_g max(nats, KL_g) for each example. Below the floor an example's KL has no gradient,
      whatever the other examples do (Dreamer's later versions); its mean over the batch is never below the other
      form's.

    Args:
        kl: KLs ``[*batch, *groups]``; ``groups`` may have any number of dimensions, none included.
        nats: the floor of each group, not negative; a number, or a tensor that broadcasts to the groups.
        per: "batch" or "example".
        batch_dims: number of batch dimensions of ``kl``.

    Returns:
        ``[*batch]`` per example, a scalar per batch, in nats; either may be the ``kl`` of :func:`elbo_ext.elbo_loss`.

    Raises:
        ValueError, TypeError: for a ``per`` that does not exist, a negative number for ``nats`` (a tensor's are not
            looked at), and as
            :func:`elbo_ext.gaussian_kl`.
    """
    kl = _kls(kl, per)
    batch_dims = arguments.batch_dims(batch_dims, kl.shape)
    groups = kl.shape[batch_dims:]
    nats = _nats(nats, kl, groups, "shape of the groups,")
    if per == "batch":
        kl = kl.mean(tuple(range(batch_dims))) if batch_dims else kl
        batch_dims = 0
    # max(nats, kl). Where a KL equals the floor its gradient passes, so that a floor of 0 changes nothing: relu's derivative
    # at 0 is 0 in every torch, while that of clamp and maximum at a tie has changed from version to version.
    floored = kl + (nats - kl).relu()
    return floored.flatten(batch_dims).sum(-1) if groups else floored


@public
def capacity(kl: Tensor, nats: Tensor | float, *, per: str) -> Tensor:
    """|KL - C|, which draws the KL to a chosen capacity C = ``nats`` (Burgess et al. 2018).

    Training raises C step by step, for example ``LinearSchedule(100_000, 0, 25)(step)``, and weighs the penalty with a
    large ``beta``. As for :func:`free_bits` there are two places for the absolute value: ``per="example"``, as the
    equation is written for one x, or ``per="batch"``, |mean of KL - C|, where examples may differ in their KL.

    Args:
        kl: KL of each example, any shape ``[*batch]``.
        nats: C; a number, or a tensor that broadcasts to the batch (a scalar for ``per="batch"``).
        per: "batch" or "example".

    Returns:
        ``[*batch]`` per example, a scalar per batch, in nats; either may be the ``kl`` of :func:`elbo_ext.elbo_loss`.

    Raises:
        ValueError, TypeError: for a ``per`` that does not exist, and as :func:`elbo_ext.gaussian_kl`.
    """
    kl = _kls(kl, per)
    if per == "batch":
        kl = kl.mean()
    return (kl - _nats(nats, kl, kl.shape, "shape of the KL,")).abs()


def _kls(kl: Any, per: Any) -> Tensor:
    checked = arguments.tensor("kl", kl)
    arguments.one_of("per", per, ("batch", "example"))
    return checked.to(value_dtype(checked))


def _nats(value: Any, kl: Tensor, shape: torch.Size, target: str) -> Tensor | float:
    value = arguments.tensor_or_number("nats", value)
    if not isinstance(value, Tensor):
        return arguments.number("nats", value, low=0)
    arguments.broadcasts_to_batch("nats of shape {}", value, shape, target)
    arguments.broadcast({"kl": kl, "nats": value})  # for the device
    return value


# ---- balance ----


@public
def balanced_kl(
    mu: Tensor,
    logvar: Scale = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Scale = None,
    *,
    posterior_weight: float,
    prior_weight: float,
    **options: Any,
) -> Tensor:
    """:func:`elbo_ext.gaussian_kl` whose gradient reaches the posterior times one weight and the prior times another.

    KL balancing of a learned prior (Hafner et al. 2021, "Mastering Atari with Discrete World Models", section 2): with
    stop-gradient sg, prior_weight * KL(sg(q) || p) + posterior_weight * KL(q || sg(p)). They take 0.8 for the prior and
    0.2 for the posterior, so that the prior learns to predict faster than the posterior forgets. The value is the plain
    KL, bit for bit, and not the weighted sum. There is one KL: one forward and one backward kernel, which gives the
    gradients of all four operands, and each of these is then multiplied by its weight.

    Args:
        mu, logvar, prior_mu, prior_logvar: as in :func:`elbo_ext.gaussian_kl`.
        posterior_weight: factor of the gradients of ``mu`` and its scale, not negative.
        prior_weight: factor of the gradients of ``prior_mu`` and its scale, not negative.
        options: the other forms of the scales, ``weight`` (its own gradient is not changed), ``batch_dims`` and
            ``reduction`` of :func:`elbo_ext.gaussian_kl`.

    Returns:
        The KL in nats, as :func:`elbo_ext.gaussian_kl`.

    Raises:
        ValueError, TypeError: for a negative weight, and as :func:`elbo_ext.gaussian_kl`.
    """
    posterior_weight = arguments.number("posterior_weight", posterior_weight, low=0)
    prior_weight = arguments.number("prior_weight", prior_weight, low=0)
    operands = {"mu": mu, "logvar": logvar, "prior_mu": prior_mu, "prior_logvar": prior_logvar, **options}
    for name, value in operands.items():
        if isinstance(value, Tensor) and name != "weight":
            factor = prior_weight if name.startswith("prior_") else posterior_weight
            checked = arguments.tensor_or_number(name, value)
            operands[name] = autograd.weighted_gradient(factor, checked) if isinstance(checked, Tensor) else checked
            validation.checked_where_used(name, value)
    return gaussian_kl(**operands)
