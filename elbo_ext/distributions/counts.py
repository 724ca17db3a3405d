"""Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial."""

import torch
from torch import Tensor, distributions
from torch.distributions import Gamma, constraints
from torch.distributions.utils import broadcast_all, lazy_property, logits_to_probs, probs_to_logits
from torch.types import _size

from .. import functional
from .base import Fused, wide


class Poisson(distributions.Poisson, Fused):
    """Counts of mean and variance ``rate``, as :class:`torch.distributions.Poisson`.

    ``log_prob`` is :func:`elbo_ext.poisson_log_prob`, which keeps its digits for large counts. Samples are torch's. See
    :mod:`elbo_ext.distributions` for dtypes and checks.

    Args:
        rate: a tensor of any shape or a number.
        validate_args, and errors: as in :class:`Normal`.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """value ln rate - rate - ln value!"""
        return self._score(functional.poisson_log_prob, value, rate=self.rate)


class NegativeBinomial(distributions.NegativeBinomial, Fused):
    """Counts, as :class:`torch.distributions.NegativeBinomial`, or by mean and inverse dispersion as scVI has them.

    ``log_prob`` is :func:`elbo_ext.negative_binomial_log_prob`, to full precision also close to the Poisson, the limit of large
    ``total_count``, where torch's is a difference of gamma functions. Samples are drawn as torch draws them: Poisson, with a
    rate that is gamma distributed. See :mod:`elbo_ext.distributions` for dtypes and checks.

    Args:
        total_count: theta, above 0, a tensor of any shape or a number, with
        probs: of success in each trial, in [0, 1); torch moves it into [eps, 1 - eps] where it takes logits. Or
        logits: log-odds, ln(mu / theta).
        mu, theta: mean and inverse dispersion in place of these: variance mu + mu^2 / theta. Nothing is added to them, where
            scVI adds 1e-8 in its logarithms.
        validate_args, and errors: as in :class:`Normal`; ValueError where it is not one of these ways. torch takes a
            ``total_count`` of 0, which always counts 0; here it is an error.
    """

    arg_constraints = {  # noqa: RUF012
        "total_count": constraints.positive,
        "probs": constraints.half_open_interval(0.0, 1.0),
        "logits": constraints.real,
        "mu": constraints.nonnegative,
        "theta": constraints.positive,
    }

    def __init__(
        self,
        total_count: Tensor | float | None = None,
        probs: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        validate_args: bool | None = None,
        *,
        mu: Tensor | float | None = None,
        theta: Tensor | float | None = None,
    ) -> None:
        arguments = {"total_count": total_count, "probs": probs, "logits": logits, "mu": mu, "theta": theta}
        given = [name for name, value in arguments.items() if value is not None]
        if given not in (["total_count", "probs"], ["total_count", "logits"], ["mu", "theta"]):
            raise ValueError(
                "total_count must be given beside one of probs and logits, or mu beside theta, "
                f"got {' and '.join(given) or 'none of them'}"
            )
        self._by_mean = mu is not None
        if self._by_mean:
            self.mu, self.theta = broadcast_all(mu, theta)  # type: ignore[arg-type]  # both are given
            self._param = self.mu
            Fused.__init__(self, self.mu.size(), validate_args=validate_args)
        else:
            super().__init__(total_count, probs, logits, validate_args)  # type: ignore[arg-type]

    def expand(self, batch_shape: _size, _instance: "NegativeBinomial | None" = None) -> "NegativeBinomial":
        new = self._expanded(NegativeBinomial, batch_shape, _instance)
        new._by_mean = self._by_mean
        new._param = self._param.expand(batch_shape)
        return new

    # Each computed from those that were given, which shadow them.
    @lazy_property
    def mu(self) -> Tensor:
        """The mean."""
        return self.total_count * self.logits.exp()

    @lazy_property
    def theta(self) -> Tensor:
        """The inverse dispersion, which torch calls total_count."""
        return self.total_count

    @lazy_property
    def total_count(self) -> Tensor:
        return self.theta

    @lazy_property
    def logits(self) -> Tensor:
        if self._by_mean:
            return self.mu.log() - self.theta.log()
        return probs_to_logits(self.probs, is_binary=True)

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def variance(self) -> Tensor:
        return self.mu + self.mu.square() / self.theta

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Counts of shape ``[*sample_shape, *batch_shape]``, of the parameters' dtype."""
        return _gamma_poisson(self.mu, self.theta, sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln(Gamma(value + theta) / (Gamma(theta) value!)) + theta ln(theta / (theta + mu)) + value ln(mu / (theta + mu))."""
        mean = {"mean": self.mu} if self._by_mean else {"logits": self.logits}
        return self._score(functional.negative_binomial_log_prob, value, **mean, theta=self.theta)


class ZeroInflatedNegativeBinomial(Fused):
    """A negative binomial with extra zeros from a gate, as scVI has it; torch has no such class.

    Lopez et al. 2018. ``log_prob`` is :func:`elbo_ext.zero_inflated_negative_binomial_log_prob`. See
    :mod:`elbo_ext.distributions` for dtypes and checks.

    Args:
        mu, theta: mean and inverse dispersion before the gate, tensors that broadcast, of any shape, or numbers. Nothing is
            added to them, where scVI adds 1e-8 in its logarithms.
        zi_logits: log-odds of a zero by the gate.
        validate_args, and errors: as in :class:`Normal`.
    """

    arg_constraints = {  # noqa: RUF012
        "mu": constraints.nonnegative,
        "theta": constraints.positive,
        "zi_logits": constraints.real,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self,
        mu: Tensor | float,
        theta: Tensor | float,
        zi_logits: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self.mu, self.theta, self.zi_logits = broadcast_all(mu, theta, zi_logits)
        super().__init__(self.mu.size(), validate_args=validate_args)

    def expand(
        self, batch_shape: _size, _instance: "ZeroInflatedNegativeBinomial | None" = None
    ) -> "ZeroInflatedNegativeBinomial":
        return self._expanded(ZeroInflatedNegativeBinomial, batch_shape, _instance)

    @lazy_property
    def zi_probs(self) -> Tensor:
        """The probability of a zero by the gate."""
        return logits_to_probs(self.zi_logits, is_binary=True)

    @property
    def mean(self) -> Tensor:
        return self.mu * torch.sigmoid(-self.zi_logits)

    @property
    def variance(self) -> Tensor:
        """(1 - g) (mu + mu^2 / theta) + g (1 - g) mu^2, g = zi_probs."""
        return self.mean * (1 + self.mu * (self.zi_probs + self.theta.reciprocal()))

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Counts of shape ``[*sample_shape, *batch_shape]``, of the parameters' dtype, by torch's generator."""
        with torch.no_grad():
            counts = _gamma_poisson(self.mu, self.theta, sample_shape)
            return torch.where(torch.bernoulli(self.zi_probs.expand(counts.shape)) != 0, 0.0, counts)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln(g + (1 - g) NB(0)) for value = 0, else ln(1 - g) + ln NB(value), g = zi_probs."""
        return self._score(
            functional.zero_inflated_negative_binomial_log_prob,
            value,
            mean=self.mu,
            theta=self.theta,
            gate_logits=self.zi_logits,
        )


@torch.no_grad()
def _gamma_poisson(mean: Tensor, theta: Tensor, sample_shape: _size) -> Tensor:
    """Poisson counts whose rate is gamma distributed with this mean and shape theta."""
    wide_theta = wide(theta)
    rate = Gamma(wide_theta, wide_theta / wide(mean), validate_args=False).sample(sample_shape)
    return torch.poisson(rate).to(torch.promote_types(mean.dtype, theta.dtype))
