"""Bernoulli and ContinuousBernoulli."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributions
from torch.distributions import Distribution
from torch.types import _size

from .. import functional
from ..formulas import _BERNOULLI_NUMBERS
from .base import Fused, uniform, wide


class Bernoulli(distributions.Bernoulli, Fused):
    """0 or 1, as :class:`torch.distributions.Bernoulli`.

    ``log_prob`` is :func:`elbo_ext.bernoulli_log_prob`; without checks it takes any value in [0, 1], such as pixels. Samples
    are torch's. See :mod:`elbo_ext.distributions` for dtypes and checks.

    Args:
        probs: probability of 1, a tensor of any shape or a number; torch moves it into [eps, 1 - eps] where it takes logits. Or
        logits: log-odds.
        validate_args, and errors: as in :class:`Normal`; ValueError unless one of the two is given.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """value * logits - ln(1 + e^logits)."""
        return self._score(functional.bernoulli_log_prob, value, logits=self.logits)

    def entropy(self) -> Tensor:
        """ln(1 + e^logits) - logits sigmoid(logits)."""
        logits = wide(self.logits)
        return -functional.bernoulli_log_prob(logits.sigmoid(), logits, batch_dims=logits.dim())


class ContinuousBernoulli(distributions.ContinuousBernoulli, Fused):
    """A density on [0, 1], proportional to e^(logits x), as :class:`torch.distributions.ContinuousBernoulli`.

    Loaiza-Ganem & Cunningham 2019. ``log_prob`` is :func:`elbo_ext.continuous_bernoulli_log_prob`. It, the moments, the
    distribution function, samples and their gradients are computed from the logits, and right for all of them. torch's go
    through probs: between 0.499 and 0.501 samples are uniform, with gradient 0; around that the formulas cancel; and in float32
    logits beyond 16 are taken for 16. ``lims``, which says where torch does so, has no effect. See
    :mod:`elbo_ext.distributions` for dtypes and checks.

    Args:
        probs: sigmoid(logits), a tensor of any shape or a number; moved into [eps, 1 - eps] by torch. Or
        logits: the natural parameter.
        validate_args, and errors: as in :class:`Normal`; ValueError unless one of the two is given.
    """

    sample = Distribution.sample  # rsample without a gradient

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """icdf of uniform numbers, of shape ``[*sample_shape, *batch_shape]``."""
        u = uniform(self._extended_shape(sample_shape), self._param)
        return self.icdf(u).to(self._param.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """value * logits - ln((e^logits - 1) / logits)."""
        return self._score(functional.continuous_bernoulli_log_prob, value, logits=self.logits)

    def cdf(self, value: Tensor) -> Tensor:
        """(e^(logits value) - 1) / (e^logits - 1), 0 and 1 outside of [0, 1]."""
        if self._validate_args:
            self._validate_sample(value)
        logits = wide(self.logits)
        near, small, far = _falling(logits)
        x = value.clamp(0, 1)
        y = torch.where(logits < 0, x, 1 - x)
        below = torch.where(
            near, y * _expm1_ratio(y * small) / _expm1_ratio(small), torch.expm1(y * far) / torch.expm1(far)
        )
        return torch.where(logits < 0, below, 1 - below)

    def icdf(self, value: Tensor) -> Tensor:
        """ln(1 + value (e^logits - 1)) / logits."""
        logits = wide(self.logits)
        near, small, far = _falling(logits)
        u, rest = torch.where(logits < 0, value, 1 - value), torch.where(logits < 0, 1 - value, value)
        # ln(1 + w) / logits by w = u (e^logits - 1) and w / logits, which stays where logits vanish
        w_ratio = u * _expm1_ratio(small)
        w = w_ratio * small
        by_series = w_ratio * 2 / (2 + w) * _atanh_ratio(w / (2 + w))
        # 1 + w = rest + u e^logits, where w is close to -1; e^logits itself, which may underflow, where nothing rests
        low, end = u < 0.5, rest == 0
        high = torch.where(end, far, torch.where(end, 1.0, rest + u * far.exp()).log())
        log = torch.where(low, torch.log1p(torch.where(low, u, 0.0) * torch.expm1(far)), high)
        x = torch.where(near, by_series, log / far)
        return torch.where(logits < 0, x, 1 - x)

    @property
    def mean(self) -> Tensor:
        return mean_of_falling(wide(self.logits), reflect=True)

    @property
    def variance(self) -> Tensor:
        logits = wide(self.logits)
        near = logits.abs() < 2
        small, large = torch.where(near, logits, 0.0), torch.where(near, 2.0, logits).abs()
        # second derivative of the logarithm of the normalizer
        series = _polynomial(small.square(), [(2 * n + 1) * b for n, b in enumerate(_BERNOULLI_NUMBERS)])
        exact = large.square().reciprocal() - (-large).exp() / torch.expm1(-large).square()
        return torch.where(near, series, exact)

    def entropy(self) -> Tensor:
        """Minus ln p at the mean, of which ln p is a linear function."""
        falling = -wide(self.logits).abs()  # the mirror image has the same entropy
        return -functional.continuous_bernoulli_log_prob(mean_of_falling(falling), falling, batch_dims=falling.dim())


def mean_of_falling(logits: Tensor, reflect: bool = False) -> Tensor:
    """1 / (1 - e^-logits) - 1 / logits, the mean of a continuous Bernoulli, for logits <= 0, where it keeps relative precision;
    for others their mirror image, or with ``reflect`` their own mean."""
    near = logits.abs() < 2
    small, large = torch.where(near, logits, 0.0), torch.where(near, 2.0, logits).abs()
    exact = large.reciprocal() + (-large).exp() / torch.expm1(-large)
    if reflect:
        exact = torch.where(logits < 0, exact, 1 - exact)
    return torch.where(near, 0.5 + small * _polynomial(small.square(), _BERNOULLI_NUMBERS), exact)


def _falling(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-|logits| in two parts, close to 0 and not, each a harmless number where it is the other; and where they are close.

    At 0 the derivative of -|logits| is that of one side, with which the mirror image that belongs to it is taken.
    """
    falling = torch.where(logits < 0, logits, -logits)
    near = falling > -0.1
    return near, torch.where(near, falling, 0.0), torch.where(near, -1.0, falling)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


def _expm1_ratio(x: Tensor) -> Tensor:
    """(e^x - 1) / x for |x| < 0.1, by its series, whose derivatives do not cancel."""
    return _polynomial(x, [1 / math.factorial(k + 1) for k in range(12 if x.dtype == torch.float64 else 6)])


def _atanh_ratio(x: Tensor) -> Tensor:
    """artanh(x) / x for |x| < 0.06, likewise."""
    return _polynomial(x.square(), [1 / (2 * k + 1) for k in range(7 if x.dtype == torch.float64 else 4)])
