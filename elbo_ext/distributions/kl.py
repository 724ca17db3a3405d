"""What ``torch.distributions.kl_divergence`` finds for our classes, by themselves or with torch's class of the same name."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, register_kl

from .. import functional
from ..autograd.torch_internals import remember_kl
from .base import wide
from .bernoulli import Bernoulli, ContinuousBernoulli, mean_of_falling
from .categorical import Categorical, OneHotCategoricalStraightThrough
from .counts import Poisson
from .location_scale import Laplace, Normal

KL = Callable[[Any, Any], Tensor]


_PAIRS: list[tuple[type, type]] = []


def _register(ours: type) -> Callable[[KL], KL]:
    theirs = ours.__mro__[1]
    pairs = [(ours, ours), (ours, theirs), (theirs, ours)]

    def register(kl: KL) -> KL:
        for pair in pairs:
            register_kl(*pair)(kl)
        _PAIRS.extend(pairs)
        return kl

    return register


@_register(Normal)
def _normal(p: Any, q: Any) -> Tensor:
    """1/2 ((p.loc - q.loc)^2 / q.scale^2 + r - 1 - ln r), r = p.scale^2 / q.scale^2."""
    of_p, of_q = (d._scale() if isinstance(d, Normal) else {"std": d.scale} for d in (p, q))
    of_prior: dict[str, Any] = {f"prior_{name}": scale for name, scale in of_q.items()}
    return functional.gaussian_kl(p.loc, prior_mu=q.loc, **of_p, **of_prior, batch_dims=_dims(p, q))


@_register(Laplace)
def _laplace(p: Any, q: Any) -> Tensor:
    """r - 1 - ln r + r (e^-t - 1 + t), r = p.scale / q.scale, t = |p.loc - q.loc| / p.scale: two numbers above 0."""
    scale = wide(p.scale)
    t = (wide(p.loc) - wide(q.loc)).abs() / scale
    return _excess_of_ratio(scale, wide(q.scale)) + scale / wide(q.scale) * _excess_of_exp(-t)


@_register(Poisson)
def _poisson(p: Any, q: Any) -> Tensor:
    """p.rate (s - 1 - ln s), s = q.rate / p.rate; q.rate where p.rate is 0."""
    p_rate, q_rate = wide(p.rate), wide(q.rate)
    never = p_rate == 0
    at_0 = q_rate - p_rate
    return torch.where(never, at_0, p_rate * _excess_of_ratio(q_rate, torch.where(never, 1.0, p_rate)))


@_register(Bernoulli)
def _bernoulli(p: Any, q: Any) -> Tensor:
    """E_p[ln p - ln q], where both logarithms are linear functions of the mean."""
    p_logits, q_logits = wide(p.logits), wide(q.logits)
    kl = _at_mean(functional.bernoulli_log_prob, p_logits.sigmoid(), p_logits, q_logits)
    if "probs" not in q.__dict__:
        return kl
    # Probabilities of exactly 0 or 1, which torch's logits, made of one in [eps, 1 - eps], do not say.
    certain = (q.probs == q.probs.round()) & (q.logits.sigmoid() != q.probs)
    return torch.where(certain & (p.probs != q.probs), math.inf, kl)


@_register(ContinuousBernoulli)
def _continuous_bernoulli(p: Any, q: Any) -> Tensor:
    """As for the Bernoulli; of p and q or their mirror images, so that p falls and its mean keeps relative precision."""
    p_logits, q_logits = wide(p.logits), wide(q.logits)
    falls = p_logits < 0
    falling = torch.where(falls, p_logits, -p_logits)
    return _at_mean(
        functional.continuous_bernoulli_log_prob,
        mean_of_falling(falling),
        falling,
        torch.where(falls, q_logits, -q_logits),
    )


@_register(OneHotCategoricalStraightThrough)
@_register(Categorical)
def _categorical(p: Any, q: Any) -> Tensor:
    """sum_c p_c (ln p_c - ln q_c), which keeps relative precision as p -> q."""
    return functional.categorical_kl(p.logits, q.logits, batch_dims=_dims(p, q))


def _dims(p: Any, q: Any) -> int:
    return max(len(p.batch_shape), len(q.batch_shape))


def _at_mean(log_prob: Callable[..., Tensor], mean: Tensor, p_logits: Tensor, q_logits: Tensor) -> Tensor:
    dims = max(mean.dim(), q_logits.dim())
    return log_prob(mean, p_logits, batch_dims=mean.dim()) - log_prob(mean, q_logits, batch_dims=dims)


def _excess_of_ratio(a: Tensor, b: Tensor) -> Tensor:
    """r - 1 - ln r >= 0, r = a / b, to full relative precision: twice the KL of two Gaussians of these variances."""
    zero = a.new_zeros(())
    return 2 * functional.gaussian_kl(zero, var=a, prior_var=b, batch_dims=max(a.dim(), b.dim()))


def _excess_of_exp(d: Tensor) -> Tensor:
    """e^d - 1 - d >= 0, likewise."""
    return 2 * functional.gaussian_kl(d.new_zeros(()), d, batch_dims=d.dim())


remember_kl(*_PAIRS, (Independent, Independent))
