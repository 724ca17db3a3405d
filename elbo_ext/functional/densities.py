"""Log-densities and the KL: sums of one term."""

from torch import Tensor

from .. import likelihoods
from ..likelihoods import GAUSSIAN_KL
from .operands import Scale, posterior_and_prior, sum_of_log_prob, sum_of_term

__all__ = [
    "bernoulli_log_prob",
    "continuous_bernoulli_log_prob",
    "discretized_gaussian_log_prob",
    "discretized_logistic_log_prob",
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
    prior_log_std: Scale = None,
    prior_std: Scale = None,
    prior_var: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """KL( N(mu, diag sigma^2) || N(prior_mu, diag prior_sigma^2) ), the prior N(0, I) by default.

    KL = sum 1/2 ((mu - prior_mu)^2 / prior_sigma^2 + r - 1 - ln r), r = sigma^2 / prior_sigma^2 (Kingma & Welling 2014,
    appendix B). Never negative, and right to full relative precision as r -> 1, where the textbook form loses all digits.

    Args:
        mu, logvar: of the posterior; or ``log_std=``, ``std=``, ``var=`` in place of ``logvar``.
        prior_mu, prior_logvar: of the prior; or ``prior_log_std=``, ``prior_std=``, ``prior_var=``.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The KL in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    named, forms = posterior_and_prior(
        mu, (logvar, log_std, std, var), prior_mu, (prior_logvar, prior_log_std, prior_std, prior_var)
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
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=`` in its place.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    given = {"x": x, "mean": mean, "logvar": logvar, "log_std": log_std, "std": std, "var": var}
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


def continuous_bernoulli_log_prob(
    x: Tensor,
    logits: Tensor | float,
    *,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln CB(x; a) = a x - ln((e^a - 1) / a), a = logits: a density on [0, 1], exponential in x.

    What a Bernoulli with grey pixels lacks, the constant that makes it a density (Loaiza-Ganem & Cunningham 2019). Its
    ``probs`` or lambda is sigmoid(a). Right for logits of any size; 0 for a = 0, where the usual formula divides 0 by 0.
    The values of x are not checked.

    Args:
        x: data in [0, 1].
        logits: the parameter a, a tensor or a number.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    return sum_of_log_prob(likelihoods.ContinuousBernoulli, {"x": x, "logits": logits}, weight, batch_dims, reduction)


def discretized_logistic_log_prob(
    x: Tensor,
    mean: Tensor | float,
    log_scale: Scale = None,
    *,
    scale: Scale = None,
    low: float | None = -1.0,
    high: float | None = 1.0,
    bins: int = 256,
    width: float | None = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln P(x), P the mass of a logistic distribution in the bin of x; scale b = 1 if no scale is given.

    ln P = sum ln(S((x + h - mean) / b) - S((x - h - mean) / b)), S the logistic function, h half a bin; the lowest bin
    begins at -infinity, the highest one ends at +infinity (Salimans et al. 2017, "PixelCNN++"; without outermost bins the
    rate of learned compression, whose bits are nats / ln 2). This is the mass however small, never the density in its place.

    Args:
        x: data, the values of the bins.
        mean: mean before discretization, a tensor or a number.
        log_scale: ln b; or ``scale=``, b itself, in its place. The standard deviation is b pi / sqrt(3).
        low, high, bins: x lies on the grid of ``bins`` values from low to high (256 from -1 to 1 by default), each the middle
            of its bin; at least 2. Where x is at most half a bin above low, it is of the lowest bin, likewise at high.
        width: of a bin, where low and high are None: 1 by default, for whole numbers; all bins are alike then.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions; also for low without high, high not above low,
            less than 2 bins, a width not above 0, and a width beside low and high.
    """
    given = {"x": x, "mean": mean, "log_scale": log_scale, "scale": scale}
    given |= {"low": low, "high": high, "bins": bins, "width": width}
    return sum_of_log_prob(likelihoods.DiscretizedLogistic, given, weight, batch_dims, reduction)


def discretized_gaussian_log_prob(
    x: Tensor,
    mean: Tensor | float,
    logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    low: float | None = -1.0,
    high: float | None = 1.0,
    bins: int = 256,
    width: float | None = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln P(x), P the mass of N(mean, sigma^2) in the bin of x; sigma = 1 if no scale is given.

    ln P = sum ln(Phi((x + h - mean) / sigma) - Phi((x - h - mean) / sigma)), Phi the normal distribution function, h half a
    bin; the lowest bin begins at -infinity, the highest one ends at +infinity (Ho et al. 2020, DDPM; without outermost bins
    the rate of learned compression, Ballé et al. 2018, whose bits are nats / ln 2). Exact for any mass: nothing is clamped.

    Args:
        x: data, the values of the bins.
        mean: mean before discretization, a tensor or a number.
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=`` in its place.
        low, high, bins: x lies on the grid of ``bins`` values from low to high (256 from -1 to 1 by default), each the middle
            of its bin; at least 2. Where x is at most half a bin above low, it is of the lowest bin, likewise at high.
        width: of a bin, where low and high are None: 1 by default, for whole numbers; all bins are alike then.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions; also for low without high, high not above low,
            less than 2 bins, a width not above 0, and a width beside low and high.
    """
    given = {"x": x, "mean": mean, "logvar": logvar, "log_std": log_std, "std": std, "var": var}
    given |= {"low": low, "high": high, "bins": bins, "width": width}
    return sum_of_log_prob(likelihoods.DiscretizedGaussian, given, weight, batch_dims, reduction)
