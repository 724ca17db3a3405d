"""The public functions in plain Python, PyTorch and NumPy: what the fused kernels are checked against.

Written to be read as mathematics and to be right to the last digits, not to be fast. Arguments are not
validated here. All log-densities and divergences are natural logarithms (nats).

Sources:
    Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.
    Rezende, Mohamed & Wierstra, "Stochastic Backpropagation and Approximate Inference in Deep Generative
    Models", ICML 2014.
    Higgins et al., "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework",
    ICLR 2017.
    Salmon, Moraes, Dror & Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    Box & Muller, "A Note on the Generation of Random Normal Deviates", Ann. Math. Statist. 29, 1958.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "ELBO",
    "TERMS",
    "bernoulli_log_prob",
    "elbo_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "normal_noise",
    "philox4x32_10",
    "rsample",
    "rsample_kl",
    "rsample_with_log_prob",
]

LOG_TWO_PI = math.log(2 * math.pi)


class ELBO(NamedTuple):
    """What :func:`elbo_loss` returns. All three share one shape: the batch shape, or a scalar once reduced.

    Attributes:
        loss: ``-(log_likelihood - beta * kl)``, the quantity to minimize, in nats.
        log_likelihood: log p(x|z), in nats.
        kl: KL(q(z|x) || p(z)), in nats, without the factor beta.
    """

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor


# ---------------------------------------------------------------------------------------------------------
# Noise: a pure function of (seed, element index)
# ---------------------------------------------------------------------------------------------------------

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)  # golden ratio and sqrt(3) - 1, times 2^32


def philox4x32_10(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox-4x32, a keyed bijection of 128 bit counters (Salmon et al. 2011).

    With (hi, lo) the two halves of a 64 bit product, one round maps::

        (c0, c1, c2, c3)  ->  (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))

    and between rounds the key advances by the Weyl constants, (k0, k1) += (W0, W1) mod 2^32.

    Args:
        counter: uint32 array ``[..., 4]``.
        key: uint32 array ``[..., 2]``; its leading dimensions broadcast with the counter's.

    Returns:
        uint32 array ``[..., 4]``.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter).astype(np.uint64), -1, 0)
    key = np.asarray(key).astype(np.uint64)
    for _ in range(10):
        k0, k1 = np.moveaxis(key, -1, 0)
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> _SHIFT32) ^ c3 ^ k1, p0 & _MASK32
        key = (key + _WEYL) & _MASK32
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def _words32(value: np.ndarray) -> np.ndarray:
    """(low, high) 32 bit words of a uint64 array ``[...]``, as uint32 ``[..., 2]``."""
    return np.stack([value & _MASK32, value >> _SHIFT32], axis=-1).astype(np.uint32)


def normal_noise(seed: int, n: int, offset: int = 0) -> np.ndarray:
    """Standard normal noise as a pure function of the seed and the element index (Box & Muller 1958).

    Four elements share one Philox block (w0, w1, w2, w3), and two of them one pair of words
    (a, b), which is (w0, w1) for elements 0 and 1 of the block and (w2, w3) for elements 2 and 3::

        counter = (lo32(i // 4), hi32(i // 4), 0, 0),    key = (lo32(seed), hi32(seed))
        u       = (floor(a / 2) + 1/2) 2^-31             in (0, 1), never 0 or 1
        theta   = 2 pi b 2^-32
        eps_i   = sqrt(-2 ln u) cos(theta)  for even i,  sqrt(-2 ln u) sin(theta)  for odd i

    u has at most 32 significant bits, so float64 holds u and u - 1 exactly, and ln u = log1p(u - 1) keeps its
    relative precision as u -> 1. The largest value possible is sqrt(64 ln 2) = 6.66.

    Args:
        seed: any 64 bit integer; negative ones stand for their two's complement.
        n: number of values.
        offset: index i of the first value.

    Returns:
        float64 array ``[n]`` with eps_offset, ..., eps_(offset + n - 1).
    """
    first, last = offset // 4, -((offset + n) // -4)
    block = np.uint64(first) + np.arange(last - first, dtype=np.uint64)
    counter = np.concatenate([_words32(block), np.zeros((last - first, 2), np.uint32)], axis=-1)
    words = philox4x32_10(counter, _words32(np.asarray(seed % 2**64, dtype=np.uint64)))
    a, b = words[:, 0::2], words[:, 1::2]  # [blocks, 2]: one column per pair
    u_minus_1 = ((a >> 1) + (0.5 - 2.0**31)) * 2.0**-31
    theta = 2.0 * np.pi * (b * 2.0**-32)
    radius = np.sqrt(-2.0 * np.log1p(u_minus_1))
    eps = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1)
    return eps.reshape(-1)[offset % 4 : offset % 4 + n]


# ---------------------------------------------------------------------------------------------------------
# Terms: one formula per element, differentiable any number of times in every tensor argument
# ---------------------------------------------------------------------------------------------------------

def _logvar(scale: Tensor, form: str) -> Tensor:
    """ln sigma^2 from a scale tensor of any shape that holds what ``form`` says."""
    if form == "logvar":
        return scale
    if form == "log_std":
        return 2 * scale
    return 2 * scale.log() if form == "std" else scale.log()


def standard_deviation(scale: Tensor, form: str) -> Tensor:
    """sigma from a scale tensor of any shape that holds what ``form`` says."""
    if form == "logvar":
        return (scale / 2).exp()
    if form == "log_std":
        return scale.exp()
    return scale if form == "std" else scale.sqrt()


def _standardize(difference: Tensor, logvar: Tensor) -> Tensor:
    """difference / sigma, shapes broadcasting.

    Dividing twice by sqrt(sigma) keeps every intermediate result in range whenever the quotient is. Where the
    difference is zero, 1 / sqrt(sigma) stops at the largest finite number, so that 0 / sigma is 0, never NaN.
    """
    finfo = torch.finfo(logvar.dtype)
    exponent = -logvar / 4
    largest = math.log(finfo.max) * (1 - finfo.eps)
    finite = torch.where(exponent < largest, exponent, largest)
    root = torch.where(difference == 0, finite, exponent).exp()
    return (difference * root) * root


def _gaussian(x: Tensor, mean: Tensor, scale: Tensor, form: str) -> Tensor:
    """ln N(x; mean, sigma^2) = -1/2 ((x - mean)^2 / sigma^2 + ln sigma^2 + ln 2 pi), in nats.

    Kingma & Welling 2014, appendix C.2. Broadcastable tensors in, their broadcast shape out.
    """
    logvar = _logvar(scale, form)
    z = _standardize(x - mean, logvar)
    return -0.5 * (z * z + logvar + LOG_TWO_PI)


def sample_and_log_prob(mu: Tensor, scale: Tensor, form: str, eps: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
    """z = mu + sigma * eps and, element by element, ln N(z; mu, sigma^2) = -1/2 (eps^2 + ln sigma^2 + ln 2 pi).

    ln q depends on the parameters of q in two ways: directly, and by way of z. ``gradient`` says which of them is
    differentiated; the values are the same.

    - "pathwise": both, which leaves -1/2 d ln sigma^2: eps does not depend on them.
    - "sticking_the_landing": by way of z alone (Roeder, Wu & Duvenaud 2017, "Sticking the Landing").
    - "score": directly alone, z being a constant, also to whatever else is made of it (Williams 1992).
    """
    z = mu + standard_deviation(scale, form) * eps
    logvar = _logvar(scale, form)
    if gradient == "sticking_the_landing":
        logvar = logvar.detach()
        eps = eps.detach() + _standardize(z - z.detach(), logvar)
    elif gradient == "score":
        z, eps = z.detach(), eps.detach()
        eps = eps * ((logvar.detach() - logvar) / 2).exp() - _standardize(mu - mu.detach(), logvar)
    return z, -(eps.square() + logvar + LOG_TWO_PI) / 2


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """x ln p + (1 - x) ln(1 - p) = x logits - softplus(logits), p = sigmoid(logits), in nats.

    Kingma & Welling 2014, appendix C.1, x anywhere in [0, 1]. Written with ln p = logsigmoid(logits) and
    ln(1 - p) = logsigmoid(-logits): no summand is positive, so nothing cancels when p is close to x = 0 or 1.
    Broadcastable tensors in, their broadcast shape out.
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return x * log_sigmoid(logits) + (1 - x) * log_sigmoid(-logits)


def _log_var_ratio(scale: Tensor, prior_scale: Tensor, form: str, prior_form: str) -> Tensor:
    """d = ln(sigma^2 / sigma_p^2), to full relative precision for sigma -> sigma_p where the forms agree."""
    if form != prior_form or form == "logvar":
        return _logvar(scale, form) - _logvar(prior_scale, prior_form)
    if form == "log_std":
        return 2 * (scale - prior_scale)
    # The difference of logarithms would cancel for close scales, ln(1 + (s - s_p) / s_p) for s << s_p. Where
    # the latter is not used its arguments are 1, to keep its derivative finite too.
    close = (scale - prior_scale).abs() < prior_scale / 2
    s, p = torch.where(close, scale, 1.0), torch.where(close, prior_scale, 1.0)
    log_ratio = torch.where(close, torch.log1p((s - p) / p), scale.log() - prior_scale.log())
    return 2 * log_ratio if form == "std" else log_ratio


def _exp_remainder(d: Tensor) -> Tensor:
    """phi(d) = e^d - 1 - d >= 0, elementwise, to full relative precision; phi'(d) = e^d - 1 likewise.

    For |d| < 1 the Taylor series d^2 (1/2! + d/3! + d^2/4! + ...) up to d^20/20!; the rest is below 1e-18.
    """
    near = d.abs() < 1
    small = torch.where(near, d, 0.0)  # the derivatives of the series would overflow for large d
    series = torch.full_like(small, 1 / math.factorial(20))
    for k in range(19, 1, -1):
        series = series * small + 1 / math.factorial(k)
    return torch.where(near, small * (small * series), d.exp() - (1 + d))


def _gaussian_kl(
    mu: Tensor, scale: Tensor, prior_mu: Tensor, prior_scale: Tensor, form: str, prior_form: str
) -> Tensor:
    """KL(N(mu, sigma^2) || N(mu_p, sigma_p^2)) = 1/2 ((mu - mu_p)^2 / sigma_p^2 + e^d - 1 - d), in nats.

    d = ln(sigma^2 / sigma_p^2). For mu_p = 0, sigma_p = 1 this is minus Kingma & Welling 2014, appendix B.
    Never negative. Broadcastable tensors in, their broadcast shape out.
    """
    z = _standardize(mu - prior_mu, _logvar(prior_scale, prior_form))
    return 0.5 * (z * z + _exp_remainder(_log_var_ratio(scale, prior_scale, form, prior_form)))


TERMS: dict[str, Callable[..., Tensor]] = {
    "gaussian": _gaussian,
    "bernoulli": _bernoulli,
    "gaussian_kl": _gaussian_kl,
}


# ---------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------


def _pick_scale(logvar: Any, log_std: Any, std: Any, var: Any) -> tuple[Tensor | float, str]:
    """(scale, form) for the one that is given, a keyword before ``logvar``; unit scale if none is."""
    for scale, form in ((log_std, "log_std"), (std, "std"), (var, "var"), (logvar, "logvar")):
        if scale is not None:
            return scale, form
    return 0.0, "logvar"


def _tensors(*values: Tensor | float | None) -> list[Any]:
    """All values as tensors of one dtype, float64 if any of the tensors is, else float32; None stays None."""
    given = [v for v in values if isinstance(v, Tensor)]
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in given) else torch.float32
    device = given[0].device
    return [v if v is None else torch.as_tensor(v, dtype=dtype, device=device) for v in values]


def _reduce(examples: Tensor, reduction: str) -> Tensor:
    """Over the examples: "none", "sum", or "mean" = sum / number of examples."""
    return {"none": lambda: examples, "sum": examples.sum, "mean": examples.mean}[reduction]()


def weighted(formula: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor | None) -> Tensor:
    """weight * formula(*inputs), shapes broadcasting; a weight of zero leaves out even a term that is not finite.

    The inputs of a term that is left out are replaced as well, by 1, which every formula bears: 0 * NaN would come back
    in the derivatives.
    """
    term = formula(*inputs)
    if weight is None:
        return term
    out = (weight == 0) & ~term.isfinite()
    return torch.where(out, 0.0, formula(*(torch.where(out, 1.0, t) for t in inputs)) * weight)


def _sum_term(
    formula: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor | None, batch_dims: int, reduction: str
) -> Tensor:
    """Weights the elements, sums all but the first ``batch_dims`` dimensions, then reduces the examples."""
    term = weighted(formula, inputs, weight)
    batch, elements = term.shape[:batch_dims], term.shape[batch_dims:]
    return _reduce(term.reshape(*batch, math.prod(elements)).sum(-1), reduction)


def rsample(
    mu: Tensor,
    logvar: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """z = mu + sigma * eps, eps ~ N(0, I): the reparameterized sample.

    Kingma & Welling 2014, section 2.4; Rezende et al. 2014. The gradients are dz/dmu = 1 and
    dz/dsigma = eps.

    Args:
        mu: tensor of any shape.
        logvar: ln sigma^2, broadcastable with mu; or one of ``log_std``, ``std``, ``var`` in its place.
        num_samples: K adds a leading axis of length K to z; None adds no axis.
        generator: where the seed of eps is drawn from; None is torch's default generator.
        noise: eps itself, of z's shape, instead of :func:`normal_noise` in row-major order of z.

    Returns:
        z of shape ``[*S]`` or ``[K, *S]``, S the broadcast shape of mu and the scale.
    """
    scale, form = _pick_scale(logvar, log_std, std, var)
    dtype = torch.promote_types(mu.dtype, scale.dtype) if isinstance(scale, Tensor) else mu.dtype
    mean, scale, noise = _tensors(mu, scale, noise)
    shape = torch.broadcast_shapes(mean.shape, scale.shape)
    if num_samples is not None:
        shape = (num_samples, *shape)
    if noise is None:
        from .ops import draw_seed

        seed = int(draw_seed(mu.device, generator))
        noise = torch.from_numpy(normal_noise(seed, math.prod(shape))).reshape(shape).to(mean)
    return (mean + standard_deviation(scale, form) * noise).to(dtype)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    prior_log_std: Tensor | float | None = None,
    prior_std: Tensor | float | None = None,
    prior_var: Tensor | float | None = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """KL(q || p) of diagonal Gaussians, summed over the latent dimensions, in nats.

    KL = sum_j 1/2 ((mu_j - mu_pj)^2 / sigma_pj^2 + sigma_j^2 / sigma_pj^2 - 1 - ln(sigma_j^2 / sigma_pj^2))
    (Kingma & Welling 2014, appendix B, for the default prior N(0, I)).

    Args:
        mu, logvar, prior_mu, prior_logvar: broadcastable, their broadcast shape ``[*batch, *latent]``.
        weight: factor of each element's KL, broadcastable to that shape.
        batch_dims: number of batch dimensions; the others are summed.
        reduction: over the batch: "none", "sum" or "mean" (sum / number of examples).

    Returns:
        ``[*batch]``, or a scalar once reduced; float64 if any tensor is, else float32.
    """
    scale, form = _pick_scale(logvar, log_std, std, var)
    prior_scale, prior_form = _pick_scale(prior_logvar, prior_log_std, prior_std, prior_var)
    prior_mu = 0.0 if prior_mu is None else prior_mu
    *inputs, weight = _tensors(mu, scale, prior_mu, prior_scale, weight)
    return _sum_term(
        lambda *t: _gaussian_kl(*t, form, prior_form), inputs, weight, batch_dims, reduction
    )


def rsample_kl(
    mu: Tensor,
    logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    prior_log_std: Tensor | float | None = None,
    prior_std: Tensor | float | None = None,
    prior_var: Tensor | float | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """:func:`rsample` and :func:`gaussian_kl` of the same distribution: (z, kl).

    z has the joint shape of posterior and prior. The KL is analytic, so it has no sample axis whatever
    ``num_samples`` is.
    """
    own = {"log_std": log_std, "std": std, "var": var}
    prior = {"prior_log_std": prior_log_std, "prior_std": prior_std, "prior_var": prior_var}
    joint = torch.broadcast_tensors(
        mu, *(v for v in (logvar, *own.values(), prior_mu, prior_logvar, *prior.values()) if isinstance(v, Tensor))
    )
    z = rsample(joint[0], logvar, **own, num_samples=num_samples, generator=generator, noise=noise)
    rows = {"batch_dims": batch_dims, "reduction": reduction}
    kl = gaussian_kl(mu, logvar, prior_mu, prior_logvar, **own, **prior, **rows)
    return z, kl


def rsample_with_log_prob(
    mu: Tensor,
    logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    prior_log_std: Tensor | float | None = None,
    prior_std: Tensor | float | None = None,
    prior_var: Tensor | float | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    batch_dims: int = 1,
    gradient: str = "pathwise",
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample z of q, ln q(z) and the prior's ln p(z), each summed over the elements of an example.

    ln q comes from the noise (:func:`sample_and_log_prob`), so that it is exact however small sigma is. With K samples
    all three have a leading axis K.
    """
    own = {"log_std": log_std, "std": std, "var": var}
    priors = (prior_mu, prior_logvar, prior_log_std, prior_std, prior_var)
    joint = torch.broadcast_tensors(mu, *(v for v in (logvar, *own.values(), *priors) if isinstance(v, Tensor)))[0].shape
    scale, form = _pick_scale(logvar, **own)
    prior_scale, prior_form = _pick_scale(prior_logvar, prior_log_std, prior_std, prior_var)
    dtype = torch.promote_types(mu.dtype, scale.dtype) if isinstance(scale, Tensor) else mu.dtype
    mean, scale, prior_mean, prior_scale, eps = _tensors(mu, scale, 0.0 if prior_mu is None else prior_mu, prior_scale, noise)
    shape = joint if num_samples is None else (num_samples, *joint)
    if eps is None:  # the noise is what turns a standard normal into itself
        zeros = torch.zeros(joint, dtype=mean.dtype, device=mean.device)
        eps = rsample(zeros, 0.0, num_samples=num_samples, generator=generator)
    z, log_q = sample_and_log_prob(mean, scale, form, eps, gradient)
    log_p = _gaussian(z, prior_mean, prior_scale, prior_form)
    batch = shape[: batch_dims + (num_samples is not None)]
    elements = math.prod(shape[len(batch) :])
    log_q, log_p = (t.expand(shape).reshape(*batch, elements).sum(-1) for t in (log_q, log_p))
    return z.expand(shape).to(dtype), log_q, log_p


def gaussian_log_prob(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float = 0.0,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln N(x; mean, diag(sigma^2)), summed over the event dimensions, in nats.

    ln N = -1/2 sum_j ((x_j - mean_j)^2 / sigma_j^2 + ln sigma_j^2 + ln 2 pi)
    (Kingma & Welling 2014, appendix C.2).

    Args:
        x, mean, logvar: broadcastable, their broadcast shape ``[*batch, *event]``.
        weight: factor of each element's log-density, broadcastable to that shape.
        batch_dims: number of batch dimensions; the others are summed.
        reduction: over the batch: "none", "sum" or "mean" (sum / number of examples).

    Returns:
        ``[*batch]``, or a scalar once reduced; float64 if any tensor is, else float32.
    """
    scale, form = _pick_scale(logvar, log_std, std, var)
    *inputs, weight = _tensors(x, mean, scale, weight)
    return _sum_term(lambda *t: _gaussian(*t, form), inputs, weight, batch_dims, reduction)


def bernoulli_log_prob(
    x: Tensor,
    logits: Tensor,
    *,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln p(x) = sum_j (x_j ln p_j + (1 - x_j) ln(1 - p_j)), p = sigmoid(logits), in nats.

    Kingma & Welling 2014, appendix C.1; minus the binary cross-entropy for x inside (0, 1).

    Args:
        x, logits: broadcastable, their broadcast shape ``[*batch, *event]``; x in [0, 1].
        weight: factor of each element's log-probability, broadcastable to that shape.
        batch_dims: number of batch dimensions; the others are summed.
        reduction: over the batch: "none", "sum" or "mean" (sum / number of examples).

    Returns:
        ``[*batch]``, or a scalar once reduced; float64 if any tensor is, else float32.
    """
    *inputs, weight = _tensors(x, logits, weight)
    return _sum_term(_bernoulli, inputs, weight, batch_dims, reduction)


def elbo_loss(
    recon: Tensor,
    x: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | float | None = None,
    *,
    kl: Tensor | None = None,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    prior_log_std: Tensor | float | None = None,
    prior_std: Tensor | float | None = None,
    prior_var: Tensor | float | None = None,
    likelihood: str = "gaussian",
    recon_logvar: Tensor | float = 0.0,
    recon_log_std: Tensor | float | None = None,
    recon_std: Tensor | float | None = None,
    recon_var: Tensor | float | None = None,
    beta: Tensor | float = 1.0,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "mean",
) -> ELBO:
    """Minus the evidence lower bound, loss = -(ln p(x|z) - beta KL(q(z|x) || p(z))), in nats.

    Kingma & Welling 2014, equations 3 and 7; beta = 1 gives the bound on ln p(x), other values the beta-VAE
    objective (Higgins et al. 2017).

    Args:
        recon: the decoder's output, mean or logits, ``[*batch, *event]``; with K samples of z a leading
            axis K beyond those of x, which counts as a batch dimension.
        x: the data, broadcastable with recon.
        mu, logvar: of q(z|x), ``[*batch, *latent]`` without the sample axis; or
        kl: the KL per example, broadcastable to the batch shape.
        likelihood: "gaussian" (scale: ``recon_logvar`` or another form) or "bernoulli" (recon holds logits).
        weight: factor of each element's log-likelihood, broadcastable to ``[*batch, *event]``.
        batch_dims: number of recon's batch dimensions; the others are summed.
        reduction: over the batch: "none", "sum" or "mean" (sum / number of examples).
    """
    rows = {"weight": weight, "batch_dims": batch_dims}
    if likelihood == "gaussian":
        recon_scale = {"log_std": recon_log_std, "std": recon_std, "var": recon_var}
        log_likelihood = gaussian_log_prob(x, recon, recon_logvar, **recon_scale, **rows)
    else:
        log_likelihood = bernoulli_log_prob(x, recon, **rows)
    if kl is None:
        own = {"log_std": log_std, "std": std, "var": var}
        prior = {"prior_log_std": prior_log_std, "prior_std": prior_std, "prior_var": prior_var}
        operands = (x, recon, recon_logvar, recon_log_std, recon_std, recon_var, weight)
        sample_axes = max(t.dim() for t in operands if isinstance(t, Tensor)) - x.dim()
        kl = gaussian_kl(mu, logvar, prior_mu, prior_logvar, **own, **prior, batch_dims=batch_dims - sample_axes)
    log_likelihood, kl, beta = _tensors(log_likelihood, kl, beta)
    kl = kl.expand_as(log_likelihood)
    loss = -(log_likelihood - beta * kl)
    return ELBO(*(_reduce(value, reduction) for value in (loss, log_likelihood, kl)))
