"""Log-densities and the KL: sums of one term."""

from collections.abc import Sequence

from torch import Tensor

from .. import likelihoods
from ..dispatch import public, public_with_lists
from ..likelihoods import GAUSSIAN_KL
from ..ops import WITH_KL
from .lists import of_lists
from .operands import OneOrEach, Scale, TensorOrList, posterior_and_prior, sum_of_log_prob, sum_of_term

__all__ = [
    "bernoulli_log_prob",
    "continuous_bernoulli_log_prob",
    "discretized_gaussian_log_prob",
    "discretized_logistic_log_prob",
    "gaussian_kl",
    "gaussian_log_prob",
    "laplace_log_prob",
    "negative_binomial_log_prob",
    "poisson_log_prob",
    "student_t_log_prob",
    "zero_inflated_negative_binomial_log_prob",
]


@public_with_lists(of_lists(WITH_KL, draws=False))
def gaussian_kl(
    mu: TensorOrList,
    logvar: OneOrEach = None,
    prior_mu: OneOrEach = None,
    prior_logvar: OneOrEach = None,
    *,
    log_std: OneOrEach = None,
    std: OneOrEach = None,
    var: OneOrEach = None,
    rho: OneOrEach = None,
    min_std: float | None = None,
    min_var: float | None = None,
    prior_log_std: OneOrEach = None,
    prior_std: OneOrEach = None,
    prior_var: OneOrEach = None,
    prior_rho: OneOrEach = None,
    prior_min_std: float | None = None,
    prior_min_var: float | None = None,
    weight: Tensor | Sequence[Tensor] | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """KL( N(mu, diag sigma^2) || N(prior_mu, diag prior_sigma^2) ), the prior N(0, I) by default.

    KL = sum 1/2 ((mu - prior_mu)^2 / prior_sigma^2 + r - 1 - ln r), r = sigma^2 / prior_sigma^2 (Kingma & Welling 2014,
    appendix B). Never negative, and right to full relative precision as r -> 1, where the textbook form loses all digits.

    Args:
        mu, logvar: of the posterior; or ``log_std=``, ``std=``, ``var=``, ``rho=`` in place of ``logvar``, and ``min_std=``
            or ``min_var=`` with it.
        prior_mu, prior_logvar: of the prior; or ``prior_log_std=``, ``prior_std=``, ``prior_var=``, ``prior_rho=``, with
            ``prior_min_std=`` or ``prior_min_var=``.
        weight, batch_dims, reduction: see :mod:`elbo_ext.functional`.

    mu may be a list of tensors, such as the weights of a network; see :func:`rsample_kl`. The KL is then the sum over the list.

    Returns:
        The KL in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see :mod:`elbo_ext.functional`.
    """
    named, forms = posterior_and_prior(
        mu,
        (logvar, log_std, std, var, rho, min_std, min_var),
        prior_mu,
        (prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var),
    )
    return sum_of_term(GAUSSIAN_KL, named, forms, weight, batch_dims, reduction)


@public
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
            ``min_std=`` or ``min_var=``, a number, with it.
        weight, batch_dims, reduction: see :mod:`elbo_ext.functional`.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see :mod:`elbo_ext.functional`.
    """
    given = {"x": x, "mean": mean, "logvar": logvar, "log_std": log_std, "std": std, "var": var}
    given |= {"rho": rho, "min_std": min_std, "min_var": min_var}
    return sum_of_log_prob(likelihoods.Gaussian, given, weight, batch_dims, reduction)


@public
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
        weight, batch_dims, reduction: see :mod:`elbo_ext.functional`.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see :mod:`elbo_ext.functional`.
    """
    return sum_of_log_prob(likelihoods.Bernoulli, {"x": x, "logits": logits}, weight, batch_dims, reduction)


@public
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
        weight, batch_dims, reduction: see :mod:`elbo_ext.functional`.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see :mod:`elbo_ext.functional`.
    """
    given = {"x": x, "mean": mean, "log_scale": log_scale, "scale": scale}
    return sum_of_log_prob(likelihoods.Laplace, given, weight, batch_dims, reduction)


@public
def poisson_log_prob(
    x: Tensor,
    log_rate: Scale = None,
    *,
    rate: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln Poisson(x; r) = x ln r - r - ln x!, counts x with rate r, their mean and variance.

    Keeps its digits for large counts close to the rate, where the three parts cancel (Loader 2000, "Fast and accurate
    computation of binomial probabilities"). r = 0 with x = 0 gives 0.

    Args:
        x: counts, of an integer dtype as well, which is read as it is. Below 0 the value is -inf with gradient 0; where x is
            no integer, x! is the gamma function of x + 1.
        log_rate: ln r, a tensor or a number; or ``rate=``, r itself, in its place.
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`.
    """
    given = {"x": x, "log_rate": log_rate, "rate": rate}
    return sum_of_log_prob(likelihoods.Poisson, given, weight, batch_dims, reduction)


@public
def negative_binomial_log_prob(
    x: Tensor,
    mean: Scale = None,
    theta: Scale = None,
    *,
    log_mean: Scale = None,
    logits: Scale = None,
    log_theta: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln NB(x; m, theta), counts x of mean m and variance m + m^2 / theta.

    ln NB = ln Gamma(x + theta) - ln Gamma(theta) - ln x! + theta ln(theta / (theta + m)) + x ln(m / (theta + m)): Poisson
    counts whose rate is gamma distributed with shape theta. In single-cell biology theta is the inverse dispersion (Lopez
    et al. 2018, "Deep generative modeling for single-cell transcriptomics"). For theta -> inf it is the Poisson, to full
    precision: nothing in it is a difference of large numbers.

    Args:
        x: counts, as for :func:`poisson_log_prob`.
        mean: m, a tensor or a number; or ``log_mean=``, ln m; or ``logits=``, ln(m / theta), which torch.distributions
            and Pyro take with ``total_count``, their name for theta.
        theta: a tensor, of one number for a gene say, or a number; or ``log_theta=``, ln theta.
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`.
    """
    given = {"x": x, "mean": mean, "log_mean": log_mean, "logits": logits, "theta": theta, "log_theta": log_theta}
    return sum_of_log_prob(likelihoods.NegativeBinomial, given, weight, batch_dims, reduction)


@public
def zero_inflated_negative_binomial_log_prob(
    x: Tensor,
    mean: Scale = None,
    theta: Scale = None,
    gate_logits: Scale = None,
    *,
    log_mean: Scale = None,
    logits: Scale = None,
    log_theta: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln of a negative binomial with extra zeros from a gate, of probability g = sigmoid(gate_logits).

    ln(g + (1 - g) NB(0)) for x = 0, else ln(1 - g) + ln NB(x): scVI's default likelihood (Lopez et al. 2018, "Deep
    generative modeling for single-cell transcriptomics"), whose dropout logits the gate's are.

    Args:
        x, mean, theta: as for :func:`negative_binomial_log_prob`; or ``log_mean=``, ``logits=``, ``log_theta=``.
        gate_logits: ln(g / (1 - g)), a tensor or a number.
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`.
    """
    given = {"x": x, "mean": mean, "log_mean": log_mean, "logits": logits, "theta": theta, "log_theta": log_theta}
    given["gate_logits"] = gate_logits
    return sum_of_log_prob(likelihoods.ZeroInflatedNegativeBinomial, given, weight, batch_dims, reduction)


@public
def student_t_log_prob(
    x: Tensor,
    df: Scale = None,
    mean: Tensor | float = 0.0,
    log_scale: Scale = None,
    *,
    log_df: Scale = None,
    scale: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln t(x; df, mean, s), the constant included; s = 1 if no scale is given: a Gaussian with heavy tails.

    ln p = ln Gamma((n + 1) / 2) - ln Gamma(n / 2) - 1/2 ln(n pi) - ln s - (n + 1) / 2 ln(1 + z^2 / n), n = df and
    z = (x - mean) / s ("Student" 1908). For n -> inf it is the Gaussian, to full precision.

    Args:
        x: data.
        df: degrees of freedom n, a tensor or a number; or ``log_df=``, ln n.
        mean: mean, a tensor or a number.
        log_scale: ln s; or ``scale=``, s itself, in its place.
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`.
    """
    given = {"x": x, "df": df, "log_df": log_df, "mean": mean, "log_scale": log_scale, "scale": scale}
    return sum_of_log_prob(likelihoods.StudentT, given, weight, batch_dims, reduction)


@public
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
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`.
    """
    return sum_of_log_prob(likelihoods.ContinuousBernoulli, {"x": x, "logits": logits}, weight, batch_dims, reduction)


@public
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
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`; also for low without high, high not above low,
            less than 2 bins, a width not above 0, and a width together with low and high.
    """
    given = {"x": x, "mean": mean, "log_scale": log_scale, "scale": scale}
    given |= {"low": low, "high": high, "bins": bins, "width": width}
    return sum_of_log_prob(likelihoods.DiscretizedLogistic, given, weight, batch_dims, reduction)


@public
def discretized_gaussian_log_prob(
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
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=``, ``rho=`` (sigma = softplus(rho)) in its place, and
            ``min_std=`` or ``min_var=``, a number, with it.
        low, high, bins: x lies on the grid of ``bins`` values from low to high (256 from -1 to 1 by default), each the middle
            of its bin; at least 2. Where x is at most half a bin above low, it is of the lowest bin, likewise at high.
        width: of a bin, where low and high are None: 1 by default, for whole numbers; all bins are alike then.
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`; also for low without high, high not above low,
            less than 2 bins, a width not above 0, and a width together with low and high.
    """
    given = {"x": x, "mean": mean, "logvar": logvar, "log_std": log_std, "std": std, "var": var}
    given |= {"rho": rho, "min_std": min_std, "min_var": min_var}
    given |= {"low": low, "high": high, "bins": bins, "width": width}
    return sum_of_log_prob(likelihoods.DiscretizedGaussian, given, weight, batch_dims, reduction)
