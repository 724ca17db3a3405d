"""Log-densities and the KL: sums of one term."""

from torch import Tensor

from .. import likelihoods
from ..likelihoods import GAUSSIAN_KL
from .operands import Scale, posterior_and_prior, sum_of_log_prob, sum_of_term

__all__ = [
    "bernoulli_log_prob",
    "gaussian_kl",
    "gaussian_log_prob",
    "laplace_log_prob",
]


def gaussian_kl(
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
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """KL( N(mu, diag sigma^2) || N(prior_mu, diag prior_sigma^2) ), the prior N(0, I) by default.

    KL = sum 1/2 ((mu - prior_mu)^2 / prior_sigma^2 + r - 1 - ln r), r = sigma^2 / prior_sigma^2 (Kingma & Welling 2014,
    appendix B). Never negative, and right to full relative precision as r -> 1, where the textbook form loses all digits.

    Args:
        mu, logvar: of the posterior; or ``log_std=``, ``std=``, ``var=``, ``rho=`` in place of ``logvar``, and ``min_std=``
            or ``min_var=`` beside it.
        prior_mu, prior_logvar: of the prior; or ``prior_log_std=``, ``prior_std=``, ``prior_var=``, ``prior_rho=``, with
            ``prior_min_std=`` or ``prior_min_var=``.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The KL in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    named, forms = posterior_and_prior(
        mu,
        (logvar, log_std, std, var, rho, min_std, min_var),
        prior_mu,
        (prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var),
    )
    return sum_of_term(GAUSSIAN_KL, named, forms, weight, batch_dims, reduction)


def gaussian_log_prob(
    x: Tensor,
    mean: Tensor | float,
    logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    rho: Scale = None,
    min_std: float | None = None,
    min_var: float | None = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln N(x; mean, diag sigma^2), the constant included; sigma = 1 if no scale is given.

    ln N = sum -1/2 ((x - mean)^2 / sigma^2 + ln sigma^2 + ln 2 pi) (Kingma & Welling 2014, appendix C.2). Finite for
    x = mean with any finite ln sigma^2.

    Args:
        x: data.
        mean: mean, a tensor or a number.
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=``, ``rho=`` (sigma = softplus(rho)) in its place, and
            ``min_std=`` or ``min_var=``, a number, beside it.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    given = {"x": x, "mean": mean, "logvar": logvar, "log_std": log_std, "std": std, "var": var} | {
        "rho": rho,
        "min_std": min_std,
        "min_var": min_var,
    }
    return sum_of_log_prob(likelihoods.Gaussian, given, weight, batch_dims, reduction)


def bernoulli_log_prob(
    x: Tensor,
    logits: Tensor | float,
    *,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln Bernoulli(x; sigmoid(logits)) = x * logits - softplus(logits), for any x in [0, 1].

    Kingma & Welling 2014, appendix C.1; minus the binary cross-entropy. Right for logits of any size. The values of x
    are not checked.

    Args:
        x: data in [0, 1].
        logits: log-odds, a tensor or a number.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    return sum_of_log_prob(likelihoods.Bernoulli, {"x": x, "logits": logits}, weight, batch_dims, reduction)


def laplace_log_prob(
    x: Tensor,
    mean: Tensor | float,
    log_scale: Scale = None,
    *,
    scale: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln Laplace(x; mean, b), the constant included; b = 1 if no scale is given.

    ln p = sum -(|x - mean| / b + ln b + ln 2): absolute errors in place of a Gaussian's squares, so that single large
    errors count less (Laplace 1774; the L1 loss of image models with its scale). Where x = mean the gradient is 0.

    Args:
        x: data.
        mean: mean, a tensor or a number.
        log_scale: ln b; or ``scale=``, b itself, in its place.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    given = {"x": x, "mean": mean, "log_scale": log_scale, "scale": scale}
    return sum_of_log_prob(likelihoods.Laplace, given, weight, batch_dims, reduction)
