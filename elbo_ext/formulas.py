"""The formulas in torch operations, differentiable any number of times in every tensor argument.

Each takes the inputs of a term in order, tensors that broadcast, then the form of each input that has several, and then
the floor of each that may have one; it gives their broadcast shape, in nats. The registry (likelihoods.py) names them.
Derivatives of derivatives are taken of them, and :mod:`elbo_ext.reference` sums them; first derivatives come from the
kernels, which have the same formulas in csrc/terms.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

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
    size = _without_floor(inside, name, of) + floor
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


def _without_floor(scale: Tensor, form: str, of: str) -> Tensor:
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
        root = _ROOT[0] if scale.dtype == torch.float64 else float.fromhex("0x1.152888p-1")  # in float32
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


def _in_double(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The function in float64, in the dtype of the tensors: where what it adds up cancels, float32 would keep no digit."""
    return function(*(t.double() for t in tensors)).to(tensors[0].dtype)


def _log_gamma_ratio(x: Tensor, t: Tensor) -> Tensor:
    """ln Gamma(x + t) - ln Gamma(t)."""
    return _in_double(lambda x, t: torch.lgamma(x + t) - torch.lgamma(t), x, t)


def _of_counts(x: Tensor, log_prob: Callable[[Tensor], Tensor]) -> Tensor:
    """A log-probability of counts, -inf with derivative 0 outside of the support, x < 0."""
    outside = x < 0
    return torch.where(outside, -math.inf, log_prob(torch.where(outside, 0.0, x)))


def _times_log(x: Tensor, number: Tensor) -> Tensor:
    """x ln(number), 0 where x is, for number = 0 too."""
    return x * torch.where((x == 0) & (number == 0), 1.0, number).log()


def poisson(x: Tensor, rate: Tensor, form: str) -> Tensor:
    """ln Poisson(x; r) = x ln r - r - ln Gamma(x + 1), in nats; rate is ln r or r, as form says."""
    r = rate.exp() if form == "log_rate" else rate

    def log_prob(x: Tensor) -> Tensor:
        of_rate = x * rate if form == "log_rate" else _times_log(x, rate)
        return of_rate - r - torch.lgamma(x + 1)

    return _of_counts(x, log_prob)


def negative_binomial(x: Tensor, mean: Tensor, theta: Tensor, form: str, theta_form: str) -> Tensor:
    """ln NB(x; m, t) = ln Gamma(x + t) - ln Gamma(t) - ln Gamma(x + 1) + t ln(t / (t + m)) + x ln(m / (t + m)), in nats.

    mean is m, ln m or the logits ln(m / t), theta is t or ln t, as their forms say.
    """
    t = theta.exp() if theta_form == "log_theta" else theta
    log_sigmoid = torch.nn.functional.logsigmoid

    def log_prob(x: Tensor) -> Tensor:
        if form == "mean":
            of_mean = _times_log(x, mean / (t + mean)) - t * torch.log1p(mean / t)
        else:
            logits = mean if form == "logits" else mean - (theta if theta_form == "log_theta" else theta.log())
            of_mean = x * log_sigmoid(logits) + t * log_sigmoid(-logits)
        return _log_gamma_ratio(x, t) - torch.lgamma(x + 1) + of_mean

    return _of_counts(x, log_prob)


def zero_inflated_negative_binomial(
    x: Tensor, mean: Tensor, theta: Tensor, gate_logits: Tensor, form: str, theta_form: str
) -> Tensor:
    """ln(g + (1 - g) NB(0)) for x = 0, else ln(1 - g) + ln NB(x), g = sigmoid(gate_logits), in nats."""
    log_sigmoid = torch.nn.functional.logsigmoid

    def log_prob(x: Tensor) -> Tensor:
        def closed(x: Tensor) -> Tensor:
            return negative_binomial(x, mean, theta, form, theta_form) + log_sigmoid(-gate_logits)

        # x = 0 is a jump, where nothing depends on x.
        at_zero = torch.logaddexp(log_sigmoid(gate_logits), closed(torch.zeros_like(x)))
        return torch.where(x == 0, at_zero, closed(x))

    return _of_counts(x, log_prob)


def student_t(x: Tensor, df: Tensor, mean: Tensor, scale: Tensor, df_form: str, form: str) -> Tensor:
    """ln Gamma((n + 1) / 2) - ln Gamma(n / 2) - 1/2 ln(n pi) - ln s - (n + 1) / 2 ln(1 + z^2 / n), z = (x - mean) / s."""
    n = df.exp() if df_form == "log_df" else df
    log_scale = scale if form == "log_scale" else scale.log()
    z = _standardize(x - mean, 2 * log_scale)
    normalizer = _in_double(lambda n: torch.lgamma((n + 1) / 2) - torch.lgamma(n / 2) - n.log() / 2, n)
    return normalizer - math.log(math.pi) / 2 - log_scale - (n + 1) / 2 * torch.log1p(z.square() / n)


def _over_factorials_of_bernoulli_numbers(count: int) -> list[float]:
    """B_2n / (2n)! for n = 1, ..., count, by sum_k C(m + 1, k) B_k = 0."""
    numbers = [Fraction(1)]
    for m in range(1, 2 * count + 1):
        numbers.append(-sum((math.comb(m + 1, k) * b for k, b in enumerate(numbers)), Fraction(0)) / (m + 1))
    return [float(numbers[2 * n] / math.factorial(2 * n)) for n in range(1, count + 1)]


_BERNOULLI_NUMBERS = _over_factorials_of_bernoulli_numbers(17)


def continuous_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """ln CB(x; a) = a x - ln((e^a - 1) / a) = a (x - 1/2) - ln(sinh(a / 2) / (a / 2)), a the logits, in nats.

    Loaiza-Ganem & Cunningham 2019. For |a| < 2 the logarithm is its Taylor series, sum_n B_2n / (2n (2n)!) a^2n; elsewhere
    a / 2 is taken out of it. Where one of the two is not used its argument is 1 or 2, to keep its derivatives finite.
    """
    near = logits.abs() < 2
    small, large = torch.where(near, logits, 1.0), torch.where(near, 2.0, logits).abs()
    series = torch.zeros_like(small)
    for n in range(len(_BERNOULLI_NUMBERS), 0, -1):
        series = (series + _BERNOULLI_NUMBERS[n - 1] / (2 * n)) * small.square()
    far = logits * (x - (logits > 0).to(x.dtype)) + (large / -torch.expm1(-large)).log()
    return torch.where(near, logits * (x - 0.5) - series, far)


def _log1mexp(u: Tensor, log_u: Tensor) -> Tensor:
    """ln(1 - e^-u), u > 0, to full relative precision; ln u is for where u itself has left the dtype."""
    tiny, large = u < 1e-8, u > math.log(2)
    ordinary = torch.where(tiny | large, 0.5, u)
    near = torch.where(tiny, log_u - u / 2, (-torch.expm1(-ordinary)).log())
    return torch.where(large, torch.log1p(-torch.where(large, u, 1.0).neg().exp()), near)


def discretized_logistic(
    x: Tensor, mean: Tensor, scale: Tensor, low: Tensor, high: Tensor, half_bin: Tensor, form: str
) -> Tensor:
    """ln(S(hi) - S(lo)), hi, lo = (x - mean +- half_bin) / b, S the logistic function, in nats.

    = ln(1 - e^-(hi - lo)) + ln S(hi) + ln S(-lo). Where x <= low + half_bin the bin begins at -infinity, where
    x >= high - half_bin it ends at +infinity, and only one of the last two logarithms is left.
    """
    log_scale = scale if form == "log_scale" else scale.log()
    hi, lo = (_standardize(x - mean + h, 2 * log_scale) for h in (half_bin, -half_bin))
    width = _standardize(2 * half_bin, 2 * log_scale)
    begins, ends = (
        ~(x <= low + half_bin),
        ~(x >= high - half_bin),
    )  # NaN lies in a bin with both ends, and comes through
    log_sigmoid = torch.nn.functional.logsigmoid
    value = torch.where(ends, log_sigmoid(hi), 0.0) + torch.where(begins, log_sigmoid(-lo), 0.0)
    return value + torch.where(begins & ends, _log1mexp(width, (2 * half_bin).log() - log_scale), 0.0)


def _log_mass_of_narrow_bin(c: Tensor, r: Tensor, log_width: Tensor) -> Tensor:
    """ln(Phi(c + r) - Phi(c - r)) = ln(2 r phi(c) sum_k r^2k He_2k(c) / (2k + 1)!), He Hermite's polynomials, for small r."""
    before, last, total = torch.ones_like(r * c), r * c, torch.ones_like(r * c)  # r^n He_n
    for n in range(1, 18, 2):
        before, last = last, r * c * last - n * r * r * before
        total = total + last / math.factorial(n + 2)
        before, last = last, r * c * last - (n + 1) * r * r * before
    return log_width - LOG_TWO_PI / 2 - c * c / 2 + total.log()


def discretized_gaussian(
    x: Tensor, mean: Tensor, scale: Tensor, low: Tensor, high: Tensor, half_bin: Tensor, form: str, floor: float = 0.0
) -> Tensor:
    """ln(Phi(hi) - Phi(lo)), hi, lo = (x - mean +- half_bin) / sigma, in nats; the outermost bins as above.

    By symmetry x lies above the mean, or the bin of x is the highest one. Three regimes: bins that are narrow compared to sigma
    and to sigma / hi; those in the tail, by erfcx; and those around the mean, 1 minus what lies outside. What a regime
    does not use is replaced by a number that keeps its derivatives finite.
    """
    logvar = _logvar(scale, form, floor)
    begins, ends = x > low + half_bin, x < high - half_bin
    bounded = begins & ends
    difference = x - mean
    flipped = torch.where(bounded, difference < 0, ends)
    distance = torch.where(flipped, -difference, difference)
    r, c = _standardize(half_bin, logvar), _standardize(distance, logvar)
    near, far = _standardize(distance - half_bin, logvar), _standardize(distance + half_bin, logvar)
    is_narrow = bounded & (r * (c + 2) < 1)
    log_width = (2 * half_bin).log() - logvar / 2
    narrow = _log_mass_of_narrow_bin(torch.where(is_narrow, c, 0.0), torch.where(is_narrow, r, 0.1), log_width)

    in_tail = ~is_narrow & (near >= 0)
    a = torch.where(in_tail, near, 0.0)
    fall = torch.where(in_tail & bounded, 2 * r * c, 1.0)
    b = torch.where(in_tail & bounded, far, 1.0)
    scaled = torch.special.erfcx(a / math.sqrt(2))
    scaled = scaled - torch.where(bounded, (-fall).exp() * torch.special.erfcx(b / math.sqrt(2)), 0.0)
    tail = (scaled / 2).log() - a * a / 2

    around = ~is_narrow & (near < 0)
    a, b = torch.where(around, -near, 1.0), torch.where(around & bounded, far, 1.0)
    outside = torch.erfc(a / math.sqrt(2)) + torch.where(bounded, torch.erfc(b / math.sqrt(2)), 0.0)
    return torch.where(is_narrow, narrow, torch.where(in_tail, tail, torch.log1p(-outside / 2)))


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
        return difference / (_without_floor(b, name, of) + floor)

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


def categorical(x: Tensor, logits: Tensor, ignored: float) -> Tensor:
    """log softmax(logits)_x over the last dimension, in nats: of classes x ``[..., 1]``, ``[...]``. 0 where x is ``ignored``,
    -inf where it is no class."""
    log_p = logits.log_softmax(-1)
    shape = torch.broadcast_shapes(x.shape[:-1], log_p.shape[:-1])
    x = x.long().expand(*shape, 1)
    inside = (x >= 0) & (x < log_p.shape[-1])
    chosen = log_p.expand(*shape, log_p.shape[-1]).gather(-1, torch.where(inside, x, 0))
    left_out = torch.where(x == int(ignored), 0.0, -math.inf)
    return torch.where(inside & (x != int(ignored)), chosen, left_out.to(chosen.dtype)).squeeze(-1)


def multinomial(x: Tensor, logits: Tensor, _: float) -> Tensor:
    """sum_c x_c log softmax(logits)_c over the last dimension, in nats; 0 of an impossible class with x_c = 0."""
    log_p = logits.log_softmax(-1)
    x, log_p = torch.broadcast_tensors(x.to(log_p.dtype), log_p)
    return (x * torch.where((x == 0) & log_p.isinf(), 0.0, log_p)).sum(-1)


def mixed_with_uniform(log_s: Tensor, unimix: float) -> Tensor:
    """ln((1 - unimix) s + unimix / C), given ln s, over the last dimension."""
    return log_s if unimix == 0 else ((1 - unimix) * log_s.exp() + unimix / log_s.shape[-1]).log()


def categorical_kl(logits: Tensor, prior_logits: Tensor, unimix: float) -> Tensor:
    """sum_c p_c (r_c + e^-r_c - 1), r = ln p - ln q, over the last dimension, in nats: the KL, as sum p = sum q = 1. No term is
    negative."""
    shape = torch.broadcast_shapes(logits.shape, prior_logits.shape)
    log_p, log_q = (mixed_with_uniform(t.expand(shape).log_softmax(-1), unimix) for t in (logits, prior_logits))
    p, q = log_p.exp(), log_q.exp()
    possible = p > 0
    r = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    near = r.abs() < 1
    close = p * _exp_remainder(-torch.where(near, r, 0.0))
    return torch.where(possible, torch.where(near, close, q - p + p * r), q).sum(-1)


def weighted_rows(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], masked: Sequence[float], weight: Tensor | None
) -> Tensor:
    """:func:`weighted` for a sum over the last dimension, that of the classes, which the weight ``[..., 1]`` lacks."""
    term = formula(*inputs)
    if weight is None:
        return term
    weight = weight.squeeze(-1)
    out = (weight == 0) & ~term.isfinite()
    replaced = (torch.where(out.unsqueeze(-1), number, t) for t, number in zip(inputs, masked, strict=True))
    return torch.where(out, 0.0, formula(*replaced) * weight)


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
