"""Normal, Laplace, StudentT."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, distributions
from torch.distributions import Chi2, Distribution, constraints
from torch.distributions.utils import broadcast_all, lazy_property
from torch.types import _size

from .. import functional
from ..formulas import LOG_TWO_PI
from .base import Fused, uniform, wide

NormalT = TypeVar("NormalT", bound="Normal")


class Normal(distributions.Normal, Fused):
    """N(loc, scale^2), as :class:`torch.distributions.Normal`; or :meth:`from_logvar`.

    ``rsample`` is :func:`elbo_ext.rsample`, ``log_prob`` :func:`elbo_ext.gaussian_log_prob`, ``kl_divergence`` of two
    :func:`elbo_ext.gaussian_kl`. See :mod:`elbo_ext.distributions` for dtypes, noise and checks.

    Args:
        loc, scale: mean and standard deviation, tensors that broadcast, of any shape, or numbers.
        validate_args: whether values are checked; None is torch's default on the CPU, and no elsewhere.

    Raises:
        ValueError: for values that are not allowed, where they are checked, and shapes that do not broadcast.
        TypeError: for tensors that are not floating-point or not dense.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive, "logvar": constraints.real}  # noqa: RUF012
    _from_logvar = False

    @classmethod
    def from_logvar(
        cls: type[NormalT], loc: Tensor | float, logvar: Tensor | float, validate_args: bool | None = None
    ) -> NormalT:
        """N(loc, e^logvar), computed from logvar = ln sigma^2 itself: nothing is exponentiated twice, no sample, density or KL
        takes the logarithm of an exponential, and the KL keeps its digits close to the prior. ``scale`` is computed when it is
        asked for."""
        new = cls.__new__(cls)
        new._from_logvar = True
        new.loc, new.logvar = broadcast_all(loc, logvar)
        Fused.__init__(new, new.loc.size(), validate_args=validate_args)
        return new

    @lazy_property
    def scale(self) -> Tensor:  # an attribute in torch, which shadows this one
        return (self.logvar / 2).exp()

    @lazy_property
    def logvar(self) -> Tensor:
        """ln sigma^2."""
        return 2 * self.scale.log()

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp() if self._from_logvar else self.scale.square()

    def expand(self: NormalT, batch_shape: _size, _instance: NormalT | None = None) -> NormalT:
        new = self._expanded(Normal, batch_shape, _instance)
        new._from_logvar = self._from_logvar
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """loc + scale * eps, of shape ``[*sample_shape, *batch_shape]``, by the package's noise."""
        shape = self._extended_shape(sample_shape)
        samples = shape[: len(shape) - len(self._batch_shape)]
        if len(samples) == 0:
            return functional.rsample(self.loc, **self._scale())
        if 0 in samples:
            return functional.rsample(self.loc.expand(shape), **self._scale())
        # One call of many samples, whose gradients are summed in the kernel.
        z: Tensor = functional.rsample(self.loc, **self._scale(), num_samples=math.prod(samples)).unflatten(0, samples)
        return z

    sample = Distribution.sample  # rsample without a gradient, where torch's class draws other numbers

    def log_prob(self, value: Tensor) -> Tensor:
        """ln N(value; loc, scale^2)."""
        return self._score(functional.gaussian_log_prob, value, mean=self.loc, **self._scale())

    def entropy(self) -> Tensor:
        """1/2 (1 + ln 2 pi) + ln scale."""
        log_scale = wide(self.logvar) / 2 if self._from_logvar else wide(self.scale).log()
        return log_scale + (1 + LOG_TWO_PI) / 2

    def _scale(self) -> dict[str, Any]:
        return {"logvar": self.logvar} if self._from_logvar else {"std": self.scale}


class Laplace(distributions.Laplace, Fused):
    """Laplace(loc, scale), as :class:`torch.distributions.Laplace`.

    ``log_prob`` is :func:`elbo_ext.laplace_log_prob`, whose gradient at ``value == loc`` is 0. ``rsample`` draws what torch's
    does. See :mod:`elbo_ext.distributions` for dtypes, noise and checks.

    Args:
        loc, scale: mean and b, tensors that broadcast, of any shape, or numbers.
        validate_args, and errors: as in :class:`Normal`.
    """

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """loc - scale * sign(u) ln(1 - |u|), u uniform in (-1, 1), of shape ``[*sample_shape, *batch_shape]``."""
        below_1 = torch.finfo(wide(self.loc).dtype).eps - 1  # as in torch: never -1, whose logarithm is infinite
        u = uniform(self._extended_shape(sample_shape), self.loc) * (1 - below_1) + below_1
        unit = u.sign() * torch.log1p(-u.abs())
        return (self.loc - self.scale * unit).to(torch.promote_types(self.loc.dtype, self.scale.dtype))

    def log_prob(self, value: Tensor) -> Tensor:
        """-(|value - loc| / scale + ln scale + ln 2)."""
        return self._score(functional.laplace_log_prob, value, mean=self.loc, scale=self.scale)

    def entropy(self) -> Tensor:
        """1 + ln(2 scale)."""
        return wide(self.scale).log() + (1 + math.log(2))


class StudentT(distributions.StudentT, Fused):
    """Student's t, as :class:`torch.distributions.StudentT`.

    ``log_prob`` is :func:`elbo_ext.student_t_log_prob`. It and ``entropy`` are right for many degrees of freedom, where they
    meet the Gaussian's; torch's are differences of gamma functions, in float32 wrong by 0.5 for df = 1e6. ``rsample`` is a
    Gaussian by the package's noise, whose scale is drawn by torch's gamma distribution. See :mod:`elbo_ext.distributions` for
    dtypes, noise and checks.

    Args:
        df, loc, scale: degrees of freedom, mean and scale, tensors that broadcast, of any shape, or numbers.
        validate_args, and errors: as in :class:`Normal`.
    """

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        # torch's constructor makes the chi-squared distribution as well, which checks df whatever validate_args says.
        self.df, self.loc, self.scale = broadcast_all(df, loc, scale)
        Fused.__init__(self, self.df.size(), validate_args=validate_args)

    @property
    def _chi2(self) -> Chi2:  # type: ignore[override]
        return Chi2(wide(self.df), validate_args=False)

    def expand(self, batch_shape: _size, _instance: "StudentT | None" = None) -> "StudentT":
        return self._expanded(StudentT, batch_shape, _instance)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """N(loc, scale^2 df / chi^2), chi^2 of df degrees of freedom, of shape ``[*sample_shape, *batch_shape]``."""
        shape = self._extended_shape(sample_shape)
        stretched = self.scale * (self._chi2.rsample(sample_shape) / self.df).rsqrt()
        z = functional.rsample(self.loc.expand(shape), std=stretched)
        dtype = torch.promote_types(torch.promote_types(self.df.dtype, self.loc.dtype), self.scale.dtype)
        return z.to(dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln t(value; df, loc, scale)."""
        return self._score(functional.student_t_log_prob, value, df=self.df, mean=self.loc, scale=self.scale)

    def entropy(self) -> Tensor:
        """(df + 1) / 2 E[ln(1 + t^2 / df)] - ln t(loc; df, loc, scale)."""
        df = wide(self.df)
        at_mean = functional.student_t_log_prob(df.new_zeros(()), df, 0.0, scale=self.scale, batch_dims=df.dim())
        return (df + 1) / 2 * _digamma_step(df) - at_mean


def _digamma_step(n: Tensor) -> Tensor:
    """psi((n + 1) / 2) - psi(n / 2); for large n, where the difference cancels, its asymptotic series."""
    large = n > 200
    x = torch.where(large, n, 200.0) / 2
    series = (1 / (2 * x)) * (1 + (1 / (4 * x)) * (1 - (1 / (8 * x.square())) * (1 - 1 / (2 * x.square()))))
    half = (torch.where(large, 1.0, n) / 2).double()
    return torch.where(large, series, (torch.digamma(half + 0.5) - torch.digamma(half)).to(n.dtype))
