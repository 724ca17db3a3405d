"""The formulas in torch operations, differentiable any number of times in every tensor argument.

Each takes the inputs of a term in order, tensors that broadcast, then the form of each input that has several, and then
the floor of each that may have one; it gives their broadcast shape, in nats. The registry (likelihoods.py) names them.
Derivatives of derivatives are taken of them, and :mod:`elbo_ext.reference` sums them; first derivatives come from the
kernels, which have the same formulas in csrc/terms.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOG_TWO_PI = math.log(2 * math.pi)


# ---- the scale of a Gaussian: a tensor of any shape that holds what its form says. "rho+min_std" is rho with a floor ----


def _logvar(scale: Tensor, form: str, floor: float = 0.0) -> Tensor:
    """ln sigma^2."""
    if form == "logvar":
        return scale
    if form == "log_std":
        return 2 * scale
    if form in ("std", "var"):
        return 2 * scale.log() if form == "std" else scale.log()
    name, _, of = form.partition("+")
    # Where sigma leaves the range of the dtype: upwards there is no floor to speak of, downwards none at all.
    info = torch.finfo(scale.dtype)
    beyond = torch.zeros_like(scale, dtype=torch.bool)
    if name in ("logvar", "log_std"):
        beyond = _logvar(scale, name) > math.log(info.max) - 1
    elif name == "rho" and not of:
        beyond = scale < math.log(info.tiny) - math.log(info.eps)
    inside = torch.where(beyond, _UNIT[name], scale)
    size = _above_floor(inside, name, of) + floor
    near = (size - 1).abs() < 0.5
    # ln(1 + what sigma or sigma^2 has beyond 1), which keeps its digits there; elsewhere of numbers with a finite derivative
    unit = torch.where(near, inside, _UNIT[name])
    excess = _minus_1(unit, name, of) + floor
    log_size = torch.where(near, torch.where(near, excess, 0.0).log1p(), torch.where(near, 1.0, size).log())
    logvar = log_size if of == "min_var" else 2 * log_size
    return torch.where(beyond, 2 * scale if name == "rho" else _logvar(scale, name), logvar)


def standard_deviation(scale: Tensor, form: str, floor: float = 0.0) -> Tensor:
    """sigma."""
    name, _, of = form.partition("+")
    if of == "min_std":
        return standard_deviation(scale, name) + floor
    if of == "min_var":
        if name == "var":
            return (scale + floor).sqrt()
        return torch.hypot(standard_deviation(scale, name), scale.new_full((), math.sqrt(floor)))
    if name == "logvar":
        return (scale / 2).exp()
    if name == "log_std":
        return scale.exp()
    if name == "rho":
        return -torch.nn.functional.logsigmoid(-scale)  # ln(1 + e^rho); torch's softplus is rho itself above 20
    return scale if name == "std" else scale.sqrt()


_ROOT = 0.5413248546129181, -1.8138570925507325e-17  # ln(e - 1), the rho of sigma = 1, in two parts
_UNIT = {"logvar": 0.0, "log_std": 0.0, "std": 1.0, "var": 1.0, "rho": _ROOT[0]}  # sigma = 1


def _above_floor(scale: Tensor, form: str, of: str) -> Tensor:
    """sigma, or its square if that is what the floor is added to."""
    if of == "min_var" and form == "var":
        return scale
    sigma = standard_deviation(scale, form)
    return sigma.square() if of == "min_var" else sigma


def _minus_1(scale: Tensor, form: str, of: str) -> Tensor:
    """sigma - 1, or sigma^2 - 1 if that is what the floor is added to, to full relative precision."""
    if of == "min_var":
        if form == "var":
            return scale - 1
        excess = _minus_1(scale, form, "")
        return excess * (2 + excess)
    if form in ("std", "var"):
        return scale - 1 if form == "std" else (scale - 1) / (scale.sqrt() + 1)
    if form == "rho":
        root = torch.tensor(_ROOT[0], dtype=scale.dtype).item()
        rest = (_ROOT[0] - root) + _ROOT[1]
        return torch.log1p(-math.expm1(-1) * torch.expm1((scale - root) - rest))
    return torch.expm1(scale / 2 if form == "logvar" else scale)


def _difference(a: Tensor, b: Tensor, form: str) -> Tensor:
    """sigma_a - sigma_b, to full relative precision."""
    if form == "std":
        return a - b
    if form == "var":
        return (a - b) / (a.sqrt() + b.sqrt())
    if form == "rho":  # the quotient of 1 + e^a and 1 + e^b is 1 + this
        return torch.log1p(b.sigmoid() * torch.expm1(a - b))
    return standard_deviation(b, form) * torch.expm1((a - b) / 2 if form == "logvar" else a - b)


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


def gaussian(x: Tensor, mean: Tensor, scale: Tensor, form: str, floor: float = 0.0) -> Tensor:
    """ln N(x; mean, sigma^2) = -1/2 ((x - mean)^2 / sigma^2 + ln sigma^2 + ln 2 pi), in nats.

    Kingma & Welling 2014, appendix C.2. Broadcastable tensors in, their broadcast shape out.
    """
    logvar = _logvar(scale, form, floor)
    z = _standardize(x - mean, logvar)
    return -0.5 * (z * z + logvar + LOG_TWO_PI)


def sample_and_log_prob(
    mu: Tensor, scale: Tensor, form: str, eps: Tensor, gradient: str, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """z = mu + sigma * eps and, element by element, ln N(z; mu, sigma^2) = -1/2 (eps^2 + ln sigma^2 + ln 2 pi).

    ln q depends on the parameters of q in two ways: directly, and by way of z. ``gradient`` says which of them is
    differentiated; the values are the same.

    - "pathwise": both, which leaves -1/2 d ln sigma^2: eps does not depend on them.
    - "sticking_the_landing": by way of z alone (Roeder, Wu & Duvenaud 2017, "Sticking the Landing").
    - "score": directly alone, z being a constant, also to whatever else is made of it (Williams 1992).
    """
    z = mu + standard_deviation(scale, form, floor) * eps
    logvar = _logvar(scale, form, floor)
    if gradient == "sticking_the_landing":
        logvar = logvar.detach()
        eps = eps.detach() + _standardize(z - z.detach(), logvar)
    elif gradient == "score":
        z, eps = z.detach(), eps.detach()
        eps = eps * ((logvar.detach() - logvar) / 2).exp() - _standardize(mu - mu.detach(), logvar)
    return z, -(eps.square() + logvar + LOG_TWO_PI) / 2


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """x ln p + (1 - x) ln(1 - p) = x logits - softplus(logits), p = sigmoid(logits), in nats.

    Kingma & Welling 2014, appendix C.1, x anywhere in [0, 1]. Written with ln p = logsigmoid(logits) and
    ln(1 - p) = logsigmoid(-logits): no summand is positive, so nothing cancels when p is close to x = 0 or 1.
    Broadcastable tensors in, their broadcast shape out.
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return x * log_sigmoid(logits) + (1 - x) * log_sigmoid(-logits)


def laplace(x: Tensor, mean: Tensor, scale: Tensor, form: str) -> Tensor:
    """ln Laplace(x; mean, b) = -(|x - mean| / b + ln b + ln 2), in nats; the gradient at x = mean is 0."""
    log_scale = scale if form == "log_scale" else scale.log()
    return -(_standardize(x - mean, 2 * log_scale).abs() + log_scale + math.log(2))


def _log_var_ratio(
    scale: Tensor, prior_scale: Tensor, form: str, prior_form: str, floor: float, prior_floor: float
) -> Tensor:
    """d = ln(sigma^2 / sigma_p^2), to full relative precision for sigma -> sigma_p where forms and floors agree."""
    if form != prior_form or floor != prior_floor or form == "logvar":
        return _logvar(scale, form, floor) - _logvar(prior_scale, prior_form, prior_floor)
    if form == "rho" or "+" in form:
        return _log_floored_ratio(scale, prior_scale, form, floor)
    if form == "log_std":
        return 2 * (scale - prior_scale)
    # The difference of logarithms would cancel for close scales, ln(1 + (s - s_p) / s_p) for s << s_p. Where
    # the latter is not used its arguments are 1, to keep its derivative finite too.
    close = (scale - prior_scale).abs() < prior_scale / 2
    s, p = torch.where(close, scale, 1.0), torch.where(close, prior_scale, 1.0)
    log_ratio = torch.where(close, torch.log1p((s - p) / p), scale.log() - prior_scale.log())
    return 2 * log_ratio if form == "std" else log_ratio


def _log_floored_ratio(scale: Tensor, prior_scale: Tensor, form: str, floor: float) -> Tensor:
    """ln(1 + (s - s_p) / s_p) of close scales, s being what the floor is added to; else the difference of logarithms."""
    name, _, of = form.partition("+")

    def relative(a: Tensor, b: Tensor) -> Tensor:
        difference = a - b if of == "min_var" and name == "var" else _difference(a, b, name)
        if of == "min_var" and name != "var":
            difference = difference * (standard_deviation(a, name) + standard_deviation(b, name))
        return difference / (_above_floor(b, name, of) + floor)

    close = relative(scale.detach(), prior_scale.detach()).abs() < 0.5
    s, p = (torch.where(close, t, _UNIT[name]) for t in (scale, prior_scale))
    far = _logvar(scale, form, floor) - _logvar(prior_scale, form, floor)
    return torch.where(close, torch.log1p(relative(s, p)) * (1 if of == "min_var" else 2), far)


def _exp_remainder(d: Tensor) -> Tensor:
    """phi(d) = e^d - 1 - d >= 0, elementwise, to full relative precision; phi'(d) = e^d - 1 likewise.

    For |d| < 1 the Taylor series d^2 (1/2! + d/3! + d^2/4! + ...) up to d^20/20!; the rest is below 1e-18.
    """
    near = d.abs() < 1
    small = torch.where(near, d, 0.0)  # the derivatives of the series would overflow for large d
    series = torch.full_like(small, 1 / math.factorial(20))
    for k in range(19, 1, -1):
        series = series * small + 1 / math.factorial(k)
    # Where d is infinite, so is e^d - d. The derivative is taken of e^d alone there, which is as good.
    far = d.exp()
    return torch.where(near, small * (small * series), torch.where(far.isinf(), far, far - (1 + d)))


def gaussian_kl(
    mu: Tensor, scale: Tensor, prior_mu: Tensor, prior_scale: Tensor, form: str, prior_form: str,
    floor: float = 0.0, prior_floor: float = 0.0,
) -> Tensor:  # fmt: skip
    """KL(N(mu, sigma^2) || N(mu_p, sigma_p^2)) = 1/2 ((mu - mu_p)^2 / sigma_p^2 + e^d - 1 - d), in nats.

    d = ln(sigma^2 / sigma_p^2). For mu_p = 0, sigma_p = 1 this is minus Kingma & Welling 2014, appendix B.
    Never negative. Broadcastable tensors in, their broadcast shape out. The names in the prior's form begin with "prior_".
    """
    prior_form = prior_form.replace("prior_", "")
    z = _standardize(mu - prior_mu, _logvar(prior_scale, prior_form, prior_floor))
    return 0.5 * (z * z + _exp_remainder(_log_var_ratio(scale, prior_scale, form, prior_form, floor, prior_floor)))


def weighted(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], masked: Sequence[float], weight: Tensor | None
) -> Tensor:
    """weight * formula(*inputs), shapes broadcasting; a weight of zero leaves out even a term that is not finite.

    The inputs of a term that is left out are replaced as well, by numbers ``masked`` that the formula bears: 0 * NaN would
    come back in the derivatives.
    """
    term = formula(*inputs)
    if weight is None:
        return term
    out = (weight == 0) & ~term.isfinite()
    return torch.where(
        out, 0.0, formula(*(torch.where(out, number, t) for t, number in zip(inputs, masked, strict=True))) * weight
    )
