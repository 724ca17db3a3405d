"""The posterior of diffusers' autoencoders."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions.utils import lazy_property

from .. import arguments, functional
from ..functional import Generators


class DiagonalGaussian:
    """N(mean, diag e^logvar) from one packed tensor, as diffusers' DiagonalGaussianDistribution.

    ``parameters`` = [mean | logvar] along dim 1, which are read where they lie. logvar is clamped to [-30, 20]; beyond, its
    gradient is 0. ``std`` and ``var`` are computed when they are asked for. Where diffusers is peculiar, so is this class: see
    the methods.

    Args:
        parameters: ``[B, 2 C, ...]``, float32, float64, bfloat16 or float16.
        deterministic: ``std`` and ``var`` are 0 and samples the mean.

    Attributes:
        parameters, deterministic: as given.
        mean, logvar, std, var: ``[B, C, ...]``; logvar is the clamped one, also where ``deterministic``.

    Raises:
        TypeError: if parameters are no dense floating-point tensor.
        ValueError: if they have no dim 1 or an odd size there.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        shape = tuple(arguments.tensor("parameters", parameters).shape)
        if len(shape) < 2 or shape[1] % 2:
            raise ValueError(f"parameters must be mean and logvar side by side in an even dim 1, got shape {shape}")
        self.parameters = parameters
        self.deterministic = deterministic
        # Two views of one call, whose backward pass writes the packed gradient once.
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @lazy_property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else (0.5 * self.logvar).exp()

    @lazy_property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    def sample(self, generator: Generators = None) -> Tensor:
        """mean + std * eps, differentiable, of mean's shape and dtype.

        The noise is that of :func:`elbo_ext.rsample`, not torch.randn's; with a list of generators, one for each example. For a
        generator on another device than the parameters it is drawn there by torch.randn, in float32 at least.
        """
        if self.deterministic:
            return self.mean.clone()
        if isinstance(generator, Sequence) and len(generator) == 1:
            generator = generator[0]
        noise = None
        if isinstance(generator, torch.Generator) and generator.device.type != self.mean.device.type:
            dtype = torch.float64 if self.mean.dtype == torch.float64 else torch.float32
            noise = torch.randn(self.mean.shape, generator=generator, dtype=dtype, device=generator.device)
            generator, noise = None, noise.to(self.mean.device)
        return functional.rsample(self.mean, self.logvar, generator=generator, noise=noise)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL from N(0, I), or from another one, summed over all but dim 0: ``[B]``, in nats (:func:`elbo_ext.gaussian_kl`).

        As in diffusers a ``deterministic`` one has ``[0.]``, of shape ``[1]``; it is on the parameters' device, where theirs is
        on the CPU. From a deterministic ``other`` it is infinite.
        """
        if self.deterministic:
            return self._nothing()
        if other is None:
            return functional.gaussian_kl(self.mean, self.logvar)
        kl = functional.gaussian_kl(self.mean, self.logvar, other.mean, other.logvar)
        return torch.full_like(kl, math.inf) if other.deterministic else kl

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """-ln N(sample; mean, var), the constant included, summed over ``dims``, in nats (:func:`elbo_ext.gaussian_log_prob`).

        Where ``deterministic``, ``[0.]`` as for :meth:`kl`.
        """
        if self.deterministic:
            return self._nothing()
        ndim = max(sample.dim(), self.mean.dim())
        summed = sorted(d % ndim for d in dims)
        first = ndim - len(summed)
        if summed == list(range(first, ndim)):  # in the kernel
            return -functional.gaussian_log_prob(sample, self.mean, self.logvar, batch_dims=first)
        return -functional.gaussian_log_prob(sample, self.mean, self.logvar, batch_dims=ndim).sum(summed)

    def _nothing(self) -> Tensor:
        return torch.zeros(1, device=self.parameters.device)
