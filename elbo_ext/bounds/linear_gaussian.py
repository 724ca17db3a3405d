"""A model whose evidence, posterior and bound have closed forms. Part of :mod:`elbo_ext.bounds`."""

from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..formulas import standard_deviation
from ..functional import Scale, gaussian_kl, gaussian_log_prob
from ..likelihoods import GAUSSIAN_KL
from ..ops import value_dtype

__all__ = ["LinearGaussian"]


class LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(W z + b, diag sigma^2): probabilistic PCA; factor analysis if sigma is one per
    feature.

    Tipping & Bishop 1999 ("Probabilistic Principal Component Analysis"); Lucas et al. 2019 ("Don't Blame the ELBO!"),
    who use it as the linear VAE. With M = I + W^T diag(sigma^-2) W the posterior is

        p(z|x) = N(M^-1 W^T diag(sigma^-2) (x - b), M^-1)

    Everything is exact, and differentiable by W, b, sigma and by the parameters of q, so that an estimator, an
    optimizer or an encoder can be held against the truth. A q is Gaussian: ``mu`` with ``logvar`` (or ``log_std=``,
    ``std=``, ``var=``, ``rho=``, with ``min_std=`` or ``min_var=``) if diagonal, ``mu`` with ``covariance=`` if full.

    Args:
        weight: W ``[D, L]``, as of a ``torch.nn.Linear`` from latent to data.
        bias: b ``[D]``, or a number.
        logvar: ln sigma^2, a number, ``[]`` or ``[D]``; or ``log_std=``, ``std=``, ``var=``, ``rho=`` in its place, with
            ``min_std=`` or ``min_var=``; above zero.

    Methods take x ``[*batch, D]``, z and mu ``[*batch, L]``, covariance ``[*batch, L, L]`` with batches that broadcast
    against each other, and return ``[*batch]`` in nats. All is computed in one dtype: float64 if any of the model's
    tensors is, else float32.

    Raises:
        ValueError, TypeError: for shapes that do not fit, a scale that is not above zero, a covariance that is not
            symmetric positive definite, no or several scales.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | float = 0.0,
        logvar: Scale = None,
        *,
        log_std: Scale = None,
        std: Scale = None,
        var: Scale = None,
        rho: Scale = None,
        min_std: float | None = None,
        min_var: float | None = None,
    ) -> None:
        arguments.tensor("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight must have shape [D, L], got {tuple(weight.shape)}")
        name, scale, form, floor = arguments.scale(arguments.SCALES, (logvar, log_std, std, var, rho, min_std, min_var))
        bias = arguments.tensor_or_number("bias", bias)
        self.dtype, self.device = (
            value_dtype(*(t for t in (weight, bias, scale) if isinstance(t, Tensor))),
            weight.device,
        )
        for label, value in (("bias", bias), (name, scale)):
            self._on_device(label, value)
            arguments.broadcasts_to_batch(label + " of shape {}", value, weight.shape[:1], "number of features,")
        # As they came: parameters that an optimizer changes in place change the model.
        self._weight, self._bias, self._scale = weight, bias, scale
        self._form, self._floor = _FORMS[form], floor
        if not bool((self.std > 0).all()):
            raise ValueError(f"{name} must stand for a sigma above zero in every feature, got {self._scale}")

    @property
    def weight(self) -> Tensor:
        """W ``[D, L]``."""
        return self._weight.to(self.dtype)

    @property
    def bias(self) -> Tensor:
        """b ``[D]``."""
        return self._tensor(self._bias).expand(self._weight.shape[0])

    @property
    def std(self) -> Tensor:
        """sigma ``[D]``."""
        return standard_deviation(self._tensor(self._scale), self._form, self._floor).expand(self._weight.shape[0])

    # ---- the model ----

    def decode(self, z: Tensor) -> Tensor:
        """W z + b, the mean of p(x|z): ``[*batch, D]``."""
        return self._vectors("z", z, 1) @ self.weight.mT + self.bias

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """ln p(x|z) = ln N(x; W z + b, diag sigma^2), as the estimators of the bound take it."""
        x, recon = self._vectors("x", x, 0), self.decode(z)
        return gaussian_log_prob(x, recon, std=self.std, batch_dims=max(x.dim(), recon.dim()) - 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """ln p(x, z) = ln p(x|z) + ln p(z)."""
        return self.log_likelihood(x, z) + gaussian_log_prob(z.to(self.dtype), 0.0, batch_dims=z.dim() - 1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """ln p(x) = ln N(x; b, W W^T + diag sigma^2), the number that every bound is below."""
        # ln p(x) = ln p(x, z) - ln p(z|x) for every z. At the posterior's mean nothing cancels, however small sigma is:
        # the quadratic form is a sum of squares.
        mean, _ = self.posterior(x)
        half_log_det = self._precision_root().diagonal().log().sum()
        log_posterior = half_log_det + gaussian_log_prob(torch.zeros_like(mean), 0.0, batch_dims=mean.dim() - 1)
        return self.log_joint(x, mean) - log_posterior

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[*batch, L]`` and covariance ``[L, L]`` of p(z|x); the covariance is the same for every x."""
        root = self._precision_root()
        scaled = (self._vectors("x", x, 0) - self.bias) / self.std @ self._scaled_weight()
        mean = torch.cholesky_solve(scaled.unsqueeze(-1), root).squeeze(-1)
        return mean, torch.cholesky_inverse(root)

    def best_diagonal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu ``[*batch, L]`` and logvar ``[L]`` of the diagonal Gaussian q with the highest ELBO.

        It has the posterior's mean, and the variances 1 / M_jj of z_j given the other z, which are smaller than those
        of the posterior unless it is diagonal itself (Bishop 2006, "Pattern Recognition and Machine Learning", 10.1.2).
        """
        mean, _ = self.posterior(x)
        return mean, -torch.log1p(self._scaled_weight().square().sum(0))

    # ---- the bound ----

    def elbo(
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Scale = None,
        *,
        log_std: Scale = None,
        std: Scale = None,
        var: Scale = None,
        rho: Scale = None,
        min_std: float | None = None,
        min_var: float | None = None,
        covariance: Tensor | None = None,
    ) -> Tensor:
        """E_q[ln p(x|z)] - KL(q || p(z)), the expectation in closed form.

        E_q[ln p(x|z)] = ln p(x|mu) - 1/2 trace(W^T diag(sigma^-2) W S), S the covariance of q.
        """
        mu, q = self._posterior(mu, (logvar, log_std, std, var, rho, min_std, min_var), covariance)
        scaled = self._scaled_weight()
        if covariance is None:
            spread = (scaled.square().sum(0) * standard_deviation(*q).square()).sum(-1)
            kl = gaussian_kl(mu, **_keywords(*q), batch_dims=max(mu.dim(), q[0].dim()) - 1)
        else:
            spread = ((scaled.mT @ scaled) * q).sum((-2, -1))
            kl = _kl_to_standard(mu, q)
        return self.log_likelihood(x, mu) - spread / 2 - kl

    def gap(
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Scale = None,
        *,
        log_std: Scale = None,
        std: Scale = None,
        var: Scale = None,
        rho: Scale = None,
        min_std: float | None = None,
        min_var: float | None = None,
        covariance: Tensor | None = None,
    ) -> Tensor:
        """KL(q || p(z|x)) = ln p(x) - ELBO, from its own formula and not as that difference: >= 0, exact near 0 in float64."""
        mu, q = self._posterior(mu, (logvar, log_std, std, var, rho, min_std, min_var), covariance)
        if covariance is None:
            q = torch.diag_embed(standard_deviation(*q).square().expand(*q[0].shape[:-1], mu.shape[-1]))
        # A KL does not change when both its distributions are mapped alike: the posterior becomes N(0, I).
        root = self._precision_root()
        mean, _ = self.posterior(x)
        return _kl_to_standard((mu - mean) @ root, root.mT @ q @ root)

    # ---- in parts ----

    def _scaled_weight(self) -> Tensor:
        return self.weight / self.std.unsqueeze(-1)

    def _precision_root(self) -> Tensor:
        """The Cholesky factor R of M = R R^T, the posterior's precision."""
        scaled = self._scaled_weight()
        identity = torch.eye(scaled.shape[1], dtype=self.dtype, device=self.device)
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(scaled.mT @ scaled + identity)
        if bool(failed):
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"the posterior's precision I + W^T diag(sigma^-2) W is not positive definite in {name}: "
                "weight and scale must be finite, and far from singular or in float64"
            )
        return root

    def _vectors(self, name: str, value: Any, side: int) -> Tensor:
        """Data (side 0) or latent vectors (side 1)."""
        vectors = arguments.tensor(name, value)
        size = self.weight.shape[side]
        if vectors.dim() < 1 or vectors.shape[-1] != size:
            raise ValueError(f"{name} must have shape [..., {size}], got {tuple(vectors.shape)}")
        self._on_device(name, vectors)
        return vectors.to(self.dtype)

    def _tensor(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=self.dtype, device=self.device)

    def _on_device(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.device != self.device:
            raise ValueError(f"{name} must be on the model's device, {self.device}, got {value.device}")

    def _posterior(self, mu: Tensor, scales: tuple[Scale, ...], covariance: Tensor | None) -> Any:
        """mu, and the covariance or the diagonal's (scale, form, floor)."""
        mu = self._vectors("mu", mu, 1)
        if covariance is None:
            name, scale, form, floor = arguments.scale(arguments.SCALES, scales)
            self._on_device(name, scale)
            arguments.broadcast({"mu": mu, name: scale})
            scale = self._tensor(scale)
            q = scale if scale.dim() else scale.unsqueeze(-1), _FORMS[form], floor
            if not bool((standard_deviation(*q) > 0).all()):
                raise ValueError(f"{name} must stand for a sigma above zero in every dimension of z, got {scale}")
            return mu, q
        for name, given in zip(arguments.SCALES, scales, strict=True):
            if given is not None:
                raise ValueError(f"{name} has no use beside covariance")
        covariance = self._vectors("covariance", covariance, 1)
        size = mu.shape[-1]
        if covariance.dim() < 2 or covariance.shape[-2] != size:
            raise ValueError(f"covariance must have shape [..., {size}, {size}], got {tuple(covariance.shape)}")
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        size_of_each = (
            variance.unsqueeze(-1) * variance.unsqueeze(-2)
        ).sqrt()  # NaN, and so refused, if one is negative
        symmetric = bool(((covariance - covariance.mT).abs() <= 1e-5 * size_of_each).all())
        if not symmetric or bool(torch.linalg.cholesky_ex(covariance.detach()).info.any()):
            raise ValueError("covariance must be symmetric positive definite, got one that is not")
        return mu, covariance


_FORMS = GAUSSIAN_KL.numbered_forms[1]


def _keywords(scale: Tensor, form: str, floor: float) -> dict[str, Any]:
    name, _, of = form.partition("+")
    return {name: scale, of: floor} if of else {name: scale}


def _kl_to_standard(mean: Tensor, covariance: Tensor) -> Tensor:
    """KL(N(mean, covariance) || N(0, I)): that of the diagonal alone, plus the total correlation."""
    root = torch.linalg.cholesky(covariance)
    variance = root.square().sum(-1)  # the diagonal of R R^T
    correlation = root.tril(-1).square().sum(-1) / variance
    kl = gaussian_kl(mean, var=variance, batch_dims=max(mean.dim(), variance.dim()) - 1)
    return kl - torch.log1p(-correlation).sum(-1) / 2
