"""The kernels' numbers where formulas written down naively lose them, against 50 digits (mpmath).

Collapsed posteriors, scales from e^-200 to e^200, logits of 700, sums of a million terms. Every element is an example
of its own, so that no sum hides an error.
"""

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import elbo_ext
from elbo_ext import bernoulli_log_prob, gaussian_kl, gaussian_log_prob
from samples import DTYPES, FORMS, Maker, devices
from test_reference import (
    exact_bernoulli,
    exact_gaussian,
    exact_kl,
    exact_logvar,
    exact_slope,
    exact_std,
    mp,
    scale_from_logvar,
)

WIDE = (torch.float32, torch.float64)
NARROW = (torch.float32, torch.float64, torch.bfloat16)  # float16 cannot hold most of these numbers

Row = tuple[float, ...]


def compute_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def leaves(rows: list[Row], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """One tensor per column, requiring gradients."""
    return [torch.tensor(c, dtype=dtype, device=device, requires_grad=True) for c in zip(*rows, strict=True)]


def exactly(tensors: list[Tensor]) -> list[Row]:
    """The rows as the dtype holds them: where the truth is to be evaluated."""
    return list(zip(*(t.detach().cpu().double().tolist() for t in tensors), strict=True))


def assert_relative(actual: Tensor, exact: list[Any], allowed: float | list[float]) -> None:
    """|actual - exact| <= allowed |exact|, and half a unit in the last place for storing a half-precision number.
    Numbers below the smallest normal one may be rounded to 0, numbers above the largest one to infinity."""
    info = torch.finfo(actual.dtype)
    rounding = info.eps / 2 if info.bits == 16 else 0.0
    allowed = allowed if isinstance(allowed, list) else [allowed] * len(exact)
    values = actual.detach().cpu().double().flatten().tolist()
    assert len(values) == len(exact) > 0
    for i, (value, truth, relative) in enumerate(zip(values, exact, allowed, strict=True)):
        if abs(truth) > info.max:
            assert value == math.copysign(math.inf, truth), f"element {i}: {value}, expected {mp.nstr(truth, 9)}"
            continue
        error = abs(mp.mpf(value) - truth) if math.isfinite(value) else mp.inf
        message = f"element {i}: {value!r}, expected {mp.nstr(truth, 17)}, off by {mp.nstr(error / abs(truth or 1), 3)}"
        assert error <= (relative + rounding) * abs(truth) + info.tiny, message


def slopes(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), inputs)


# ---- KL near zero ----

# d = ln(sigma^2 / prior_sigma^2) from where the textbook formula has lost all digits to where it has lost none; 1 is
# where the kernels go over from the series to exp.
STEPS = (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.9, 0.999, 1.0, 1.001, 1.5, 4.0, 10.0)
DISTANCES = [sign * d for d in STEPS for sign in (1, -1)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", ["default", "number", "tensor"])
@pytest.mark.parametrize("form", FORMS)
def test_kl_of_a_collapsed_posterior(form: str, prior: str, dtype: torch.dtype, device: str) -> None:
    """mu = 0, prior N(0, 1): value 1/2 (e^d - 1 - d) ~ d^2 / 4, slope (e^d - 1) / 2 ~ d / 2, in every form."""
    rows = [(0.0, scale_from_logvar(d, form)) for d in DISTANCES]
    mu, scale = leaves(rows, dtype, device)
    unit = scale_from_logvar(0.0, form)
    priors: dict[str, Any] = {
        "default": {},
        "number": {"prior_" + form: unit},
        "tensor": {"prior_" + form: torch.full_like(scale, unit)},
    }
    value = gaussian_kl(mu, **{form: scale}, **priors[prior])
    dmu, dscale = slopes(value, [mu, scale])
    # No number for rho is sigma = 1 exactly, so that the prior is only next to N(0, 1) unless it is the default.
    held = torch.tensor(
        unit, dtype=dtype if prior == "tensor" else torch.float64 if dtype == torch.float64 else torch.float32
    )
    of_prior = mp.mpf(0) if prior == "default" else exact_logvar(held.item(), form)
    d = [exact_logvar(s, form) - of_prior for _, s in exactly([mu, scale])]
    # A few roundings; for large d the error of e^d, which carries the rounding of d. rho takes an exponential and a logarithm
    # more, each right to an ulp or two.
    few = 6 if form == "rho" else 4
    allowed = [(few + 2 * float(abs(x))) * compute_eps(dtype) for x in d]
    assert_relative(value, [(mp.expm1(x) - x) / 2 for x in d], allowed)
    assert_relative(
        dscale,
        [exact_slope(s, form) * mp.expm1(x) / 2 for (_, s), x in zip(exactly([mu, scale]), d, strict=True)],
        allowed,
    )
    assert bool((dmu == 0).all())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_kl_of_neighbouring_numbers(form: str, dtype: torch.dtype, device: str) -> None:
    """Posterior and learned prior 0 to 40 units in the last place apart, at scales away from 1."""
    priors = [scale_from_logvar(x, form) for x in (-5.3, -0.7, 0.4, 3.1)]
    prior = torch.tensor([p for p in priors for _ in range(14)], dtype=dtype, device=device)
    ulps = torch.tensor([0, 1, -1, 2, -2, 3, -3, 5, -5, 10, -10, 25, -25, 40] * 4, device=device, dtype=torch.float64)
    scale = (prior.double() + ulps * prior.abs().double() * torch.finfo(dtype).eps).to(dtype)
    mean = torch.full_like(scale, 0.75)
    inputs = [mean, scale, mean.clone(), prior]
    for t in inputs:
        t.requires_grad_()
    value = gaussian_kl(inputs[0], prior_mu=inputs[2], **{form: scale, "prior_" + form: prior})
    _, dscale, _, dprior = slopes(value, inputs)
    rows = exactly(inputs)
    d = [exact_logvar(s, form) - exact_logvar(p, form) for _, s, _, p in rows]
    # The same few roundings as of the unit prior: the difference of the two scales is exact.
    allowed = 8 * compute_eps(dtype)
    assert_relative(value, [(mp.expm1(x) - x) / 2 for x in d], allowed)
    for gradient, sign, column in ((dscale, 1, 1), (dprior, -1, 3)):
        exact = [sign * exact_slope(row[column], form) * mp.expm1(x) / 2 for row, x in zip(rows, d, strict=True)]
        assert_relative(gradient, exact, allowed)
    assert value[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["log_std", "std", "var", "rho"])
def test_kl_of_a_collapsed_posterior_in_another_form(form: str, dtype: torch.dtype) -> None:
    """ln sigma^2 is exact near sigma = 1, so a prior of log-variance 0 costs nothing in any form."""
    inputs = leaves([(0.0, scale_from_logvar(d, form)) for d in DISTANCES], dtype)
    value = gaussian_kl(inputs[0], prior_logvar=0.0, **{form: inputs[1]})
    (dscale,) = slopes(value, inputs[1:])
    rows = exactly(inputs)
    d = [exact_logvar(s, form) for _, s in rows]
    allowed = [(6 + 2 * float(abs(x))) * compute_eps(dtype) for x in d]
    assert_relative(value, [(mp.expm1(x) - x) / 2 for x in d], allowed)
    exact = [exact_slope(s, form) * mp.expm1(x) / 2 for (_, s), x in zip(rows, d, strict=True)]
    assert_relative(dscale, exact, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_of_small_means(dtype: torch.dtype) -> None:
    """mu^2 / 2 next to a KL of the scales that is exactly 0; its gradient is mu itself, without a rounding."""
    inputs = leaves([(sign * m, 0.0) for m in (0.0, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 30.0) for sign in (1, -1)], dtype)
    value = gaussian_kl(*inputs)
    dmu, dlogvar = slopes(value, inputs)
    assert_relative(value, [mp.mpf(m) ** 2 / 2 for m, _ in exactly(inputs)], 2 * compute_eps(dtype))
    assert torch.equal(dmu, inputs[0].detach())
    assert bool((dlogvar == 0).all())


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("form", ["std", "var"])
def test_kl_of_scales_far_apart(form: str, dtype: torch.dtype) -> None:
    """The quotient of the scales is tiny or huge, and their KL an ordinary number."""
    pairs = [(1e-30, 1.0), (1e-5, 1.0), (1e-25, 1e15), (0.4, 1.0), (3e-8, 2.0), (1e-37, 1e-12), (2.5, 1.0), (40.0, 2.0)]
    inputs = leaves([(0.0, s, 0.0, p) for s, p in pairs], dtype)
    value = gaussian_kl(inputs[0], prior_mu=inputs[2], **{form: inputs[1], "prior_" + form: inputs[3]})
    gradients = slopes(value, inputs)
    rows = exactly(inputs)
    assert_relative(value, [exact_kl(*row, form, form) for row in rows], 8 * compute_eps(dtype))
    expm1 = [mp.expm1(exact_logvar(s, form) - exact_logvar(p, form)) / 2 for _, s, _, p in rows]
    for k, sign in ((1, 1), (3, -1)):
        exact = [sign * e * exact_slope(row[k], form) for e, row in zip(expm1, rows, strict=True)]
        assert_relative(gradients[k], exact, 8 * compute_eps(dtype))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("form", ["std", "var"])
@pytest.mark.parametrize("dtype", WIDE)
def test_kl_of_scales_whose_quotient_leaves_the_dtype(dtype: torch.dtype, form: str, device: str) -> None:
    """Too small or too large a quotient, next to ordinary ones in the same register. The KL itself has room."""
    small, large = (1e-25, 1e20) if dtype == torch.float32 else (1e-170, 1e160)
    rows = [(0.5, s, 0.0, p) for s, p in [(small, large), (large, small), (1.0, 2.0), (small, 1.0), (large, 1.0)]]
    inputs = leaves(rows, dtype, device)
    mu, scale, prior_mu, prior_scale = inputs
    value = gaussian_kl(mu, prior_mu=prior_mu, batch_dims=1, **{form: scale, f"prior_{form}": prior_scale})
    exact = [exact_kl(*row, form, form) for row in exactly(inputs)]
    assert_relative(value, exact, 8 * compute_eps(dtype))
    # Of the reference as well: its formula is what second derivatives are taken of. It has the ratio from its logarithm.
    detached = [t.detach().cpu() for t in inputs]
    again = elbo_ext.reference.gaussian_kl(
        detached[0], prior_mu=detached[2], **{form: detached[1], f"prior_{form}": detached[3]}
    )
    logs = [float(abs(exact_logvar(s, form) - exact_logvar(p, form))) for _, s, _, p in exactly(inputs)]
    assert_relative(again, exact, [8 * compute_eps(dtype) * (1 + size) for size in logs])


@pytest.mark.parametrize("device", devices())
def test_kl_of_an_infinite_log_variance(device: str) -> None:
    """The limit is infinity, not NaN."""
    logvar = torch.tensor([math.inf, -math.inf, 1e30, 0.0], device=device)
    mu = torch.zeros(4, device=device)
    assert gaussian_kl(mu, logvar, batch_dims=1).tolist() == [math.inf, math.inf, math.inf, 0.0]
    assert elbo_ext.reference.gaussian_kl(mu, logvar, batch_dims=1).tolist() == [math.inf, math.inf, math.inf, 0.0]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", NARROW)
def test_kl_of_extreme_log_variances(dtype: torch.dtype, device: str) -> None:
    """Finite wherever the KL is; where e^d exceeds the dtype, infinite, and never NaN."""
    rows = [(0.0, -200.0, 0.0, 0.0), (0.5, -200.0, 0.0, 1.0), (0.0, 80.0, 0.0, 0.0), (0.0, 0.0, 0.0, 200.0)]
    rows += [(3.0, 200.0, 3.0, 200.0), (3.0, -200.0, 3.0, -200.0), (0.0, -4096.0, 0.0, 0.0), (0.5, 0.0, 0.5, 80.0)]
    rows += [(0.0, 200.0, 0.0, 0.0), (0.0, -200.0, 0.0, -200.0), (1.0, 0.0, 0.0, -60.0), (1.0, -60.0, 1.0, -60.5)]
    rows += [(1e3, 0.0, 0.0, 200.0), (0.0, 1.0, 0.0, 0.0), (0.0, 200.0, 0.0, 200.5), (0.0, -88.0, 0.0, 0.0)]
    inputs = leaves(rows, dtype, device)
    value = gaussian_kl(*inputs)
    dmu, dlogvar, dprior_mu, dprior_logvar = slopes(value, inputs)
    rows = exactly(inputs)
    d = [mp.mpf(s) - mp.mpf(p) for _, s, _, p in rows]
    z2 = [(mp.mpf(m) - mp.mpf(pm)) ** 2 * mp.exp(-mp.mpf(p)) for m, _, pm, p in rows]
    # e^x carries half a rounding of x, here of up to 200; the extreme regime takes it in four factors.
    allowed = 100 * compute_eps(dtype)
    assert_relative(value, [exact_kl(*row, "logvar", "logvar") for row in rows], allowed)
    over_var = [(mp.mpf(m) - mp.mpf(pm)) * mp.exp(-mp.mpf(p)) for m, _, pm, p in rows]
    assert_relative(dmu, over_var, allowed)
    assert_relative(dprior_mu, [-x for x in over_var], allowed)
    assert_relative(dlogvar, [mp.expm1(x) / 2 for x in d], allowed)
    assert_relative(dprior_logvar, [-(mp.expm1(x) + z) / 2 for x, z in zip(d, z2, strict=True)], allowed)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    forms=st.tuples(st.sampled_from(FORMS), st.sampled_from(FORMS)),
    dtype=st.sampled_from(DTYPES),
    prior_logvar=st.floats(-8, 8),
    distance=st.floats(-6, 6),
    exponent=st.floats(-20, 0),
    offset=st.sampled_from([0.0, 1e-20, -1e-4, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_kl_is_never_negative(
    forms: tuple[str, str],
    dtype: torch.dtype,
    prior_logvar: float,
    distance: float,
    exponent: float,
    offset: float,
    seed: int,
) -> None:
    """Also where two scales differ by roundings alone, or are the same number spelled in two forms."""
    noise = torch.randn(19, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0**exponent
    scale = torch.tensor([scale_from_logvar(prior_logvar + distance * x, forms[0]) for x in noise.tolist()])
    prior = torch.tensor(scale_from_logvar(prior_logvar, forms[1]))
    mean = torch.tensor(0.3 + offset)
    value = gaussian_kl(
        mean.to(dtype),
        prior_mu=torch.tensor(0.3).to(dtype),
        **{forms[0]: scale.to(dtype), "prior_" + forms[1]: prior.to(dtype)},
    )
    assert bool((value >= 0).all()), value


# ---- rho and floors ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", WIDE)
def test_rho_of_any_size(dtype: torch.dtype, device: str) -> None:
    """Where softplus(rho) underflows ln sigma is rho, to the last digit, and its derivative 1; where sigma is next to 1 the
    KL keeps its digits."""
    most, unit = (200.0, math.log(math.e - 1)) if dtype == torch.float32 else (1000.0, math.log(math.e - 1))
    grid = [
        *torch.linspace(-most, most, 81).tolist(),
        *(unit + d / 2 for d in DISTANCES),
        -103.5,
        -708.0,
        -745.0,
        -17.0,
    ]
    rows = [(mean, rho) for rho in grid for mean in (0.0, 1e-3)]
    mu, rho = leaves(rows, dtype, device)
    value = gaussian_kl(mu, rho=rho)
    dmu, drho = slopes(value, [mu, rho])
    held = exactly([mu, rho])
    d = [exact_logvar(r, "rho") for _, r in held]
    allowed = [(6 + 2 * float(mp.log1p(abs(x)))) * compute_eps(dtype) for x in d]
    assert_relative(
        value, [((mp.expm1(x) - x) + mp.mpf(m) ** 2) / 2 for (m, _), x in zip(held, d, strict=True)], allowed
    )
    exact = [exact_slope(r, "rho") * mp.expm1(x) / 2 for (_, r), x in zip(held, d, strict=True)]
    assert_relative(drho, exact, allowed)
    assert torch.equal(dmu, mu.detach())

    # ln q and its score: d ln sigma / d rho is 1 at the one end and 1 / rho at the other.
    eps = torch.full_like(rho, 0.5)
    _, log_q, _ = elbo_ext.rsample_with_log_prob(mu, rho=rho, noise=eps, gradient="score")
    (score,) = slopes(log_q, [rho])
    half = [mp.mpf(1) / 8 + x / 2 + mp.log(2 * mp.pi) / 2 for x in d]
    for actual, truth in zip(log_q.tolist(), half, strict=True):
        assert abs(mp.mpf(actual) + truth) <= 3 * compute_eps(dtype) * (abs(truth) + 1)
    assert_relative(score, [exact_slope(r, "rho") * (mp.mpf(1) / 4 - 1) / 2 for _, r in held], 6 * compute_eps(dtype))

    # The log-density of a prior or likelihood with such a scale, at a distance of some sigma.
    kept = [(m, r) for m, r in held if r > -100]
    std = [exact_std(r, "rho") for _, r in kept]
    x, scale = leaves([(float(3 * s), r) for s, (_, r) in zip(std, kept, strict=True)], dtype, device)
    value = gaussian_log_prob(x, 0.0, rho=scale)
    dx, dscale = slopes(value, [x, scale])
    for i, (at, r) in enumerate(exactly([x, scale])):
        s = exact_std(r, "rho")
        z2, scale_of_error = (mp.mpf(at) / s) ** 2, abs(mp.log(s)) + 12
        assert abs(mp.mpf(value[i].item()) + (z2 + 2 * mp.log(s) + mp.log(2 * mp.pi)) / 2) <= (
            150 * compute_eps(dtype) * scale_of_error
        )
        if mp.mpf(at) / s**2 < torch.finfo(dtype).max:
            assert abs(mp.mpf(dx[i].item()) + mp.mpf(at) / s**2) <= 150 * compute_eps(dtype) * mp.mpf(at) / s**2
        slope = exact_slope(r, "rho")
        assert abs(mp.mpf(dscale[i].item()) - slope * (z2 - 1) / 2) <= 150 * compute_eps(dtype) * slope * (z2 + 1)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("floor", [("min_std", 0.0625), ("min_var", 2.0**-13)])
@pytest.mark.parametrize("form", FORMS)
def test_scales_with_floors(form: str, floor: tuple[str, float], dtype: torch.dtype, device: str) -> None:
    """The KL to N(0, 1) and its gradient: for a sigma next to 1, for one that is the floor alone, where the scale by itself
    underflows, and for one that is so large that its square overflows."""
    logvars = [*DISTANCES, *(float(s) for s in range(-20, 90, 4))]
    rows = [(0.5, scale_from_logvar(v, form)) for v in logvars]
    rows += [
        (0.5, s) for s in ((-300.0, -1000.0, -80.0) if form in ("logvar", "log_std", "rho") else (0.0, 1e-30, 1e-12))
    ]
    mu, scale = leaves(rows, dtype, device)
    options: dict[str, Any] = {form: scale, floor[0]: floor[1]}
    value = gaussian_kl(mu, **options)
    dmu, dscale = slopes(value, [mu, scale])
    assert torch.equal(dmu, mu.detach())
    z = elbo_ext.rsample(mu, noise=torch.ones_like(mu), **options)
    (slope_of_z,) = slopes(z, [scale])
    eps = compute_eps(dtype)
    for i, (m, s) in enumerate(exactly([mu, scale])):
        std = exact_std(s, form, floor)
        nothing = s == 0 and form in ("std", "var")
        alone = mp.mpf(0) if nothing else exact_std(s, form)
        # d sigma / d scale of the scale by itself, then of all; a root has no slope at 0.
        if nothing and form == "var":
            slope = mp.inf if floor[0] == "min_std" else 1 / (2 * std)
        else:
            by_itself = mp.mpf(1) if nothing else alone * exact_slope(s, form) / 2
            slope = by_itself if floor[0] == "min_std" else by_itself * alone / std
        d = 2 * mp.log(std)
        exact = (mp.expm1(d) - d + mp.mpf(m) ** 2) / 2
        # e^d carries the rounding of d, which the floor's own rounding is added to.
        allowed = 8 + 2 * abs(d)
        if exact < torch.finfo(dtype).max:
            assert abs(mp.mpf(value[i].item()) - exact) <= allowed * eps * exact, (i, s)
        if slope == mp.inf:
            assert slope_of_z[i] == math.inf
            continue
        exact_slope_of_kl = slope / std * mp.expm1(d)
        error = allowed * eps * abs(exact_slope_of_kl) + 2 * eps * mp.mpf(floor[1]) * slope / std
        if abs(exact_slope_of_kl) < torch.finfo(dtype).max:
            assert abs(mp.mpf(dscale[i].item()) - exact_slope_of_kl) <= error + torch.finfo(dtype).tiny, (i, s)
        if slope < torch.finfo(dtype).max:
            assert abs(mp.mpf(slope_of_z[i].item()) - slope) <= 6 * eps * slope + torch.finfo(dtype).tiny, (i, s)
            assert abs(mp.mpf(z[i].item()) - mp.mpf(m) - std) <= 5 * eps * (std + 1), (i, s)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("floor", [("min_std", 0.0625), ("min_var", 2.0**-13)])
@pytest.mark.parametrize("form", FORMS)
def test_kl_of_neighbouring_numbers_above_a_floor(
    form: str, floor: tuple[str, float], dtype: torch.dtype, device: str
) -> None:
    """As without a floor: where form and floor are the same the numbers as given are compared."""
    logvars = (-30.0, -5.3, -0.7, 0.4, 3.1)
    prior = torch.tensor([scale_from_logvar(v, form) for v in logvars for _ in range(11)], dtype=dtype, device=device)
    ulps = torch.tensor([0, 1, -1, 3, -3, 10, -10, 1e3, -1e3, 1e5, -1e5] * 5, device=device, dtype=torch.float64)
    scale = (prior.double() + ulps * prior.abs().double() * torch.finfo(dtype).eps).to(dtype)
    inputs = [scale.requires_grad_(), prior.requires_grad_()]
    options: dict[str, Any] = {floor[0]: floor[1], "prior_" + floor[0]: floor[1]}
    value = gaussian_kl(torch.zeros_like(scale), **{form: scale, "prior_" + form: prior}, **options)
    dscale, dprior = slopes(value, inputs)
    rows = exactly(inputs)
    with mp.workdps(120):
        std = [[exact_std(s, form, floor) for s in row] for row in rows]
        d = [2 * mp.log(s / p) for s, p in std]
        exact = [(mp.expm1(x) - x) / 2 for x in d]
        of_floor = [
            [mp.mpf(exact_std(s, form)) / total if floor[0] == "min_std" else (exact_std(s, form) / total) ** 2
             for s, total in zip(row, totals, strict=True)] for row, totals in zip(rows, std, strict=True)
        ]  # fmt: skip
        slope = [
            [share * exact_slope(s, form) for s, share in zip(row, shares, strict=True)]
            for row, shares in zip(rows, of_floor, strict=True)
        ]
        of_scale = [by[0] * mp.expm1(x) / 2 for by, x in zip(slope, d, strict=True)]
        of_prior = [-by[1] * mp.expm1(x) / 2 for by, x in zip(slope, d, strict=True)]
    allowed = 10 * compute_eps(dtype)
    assert_relative(value, exact, allowed)
    assert_relative(dscale, of_scale, allowed)
    assert_relative(dprior, of_prior, allowed)
    assert bool((value[::11] == 0).all())


# ---- Gaussian log-density ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("logvar", [-1e4, -400.0, -200.0, -100.0, 100.0, 200.0, 400.0, 1e4])
def test_gaussian_at_its_mean(logvar: float, dtype: torch.dtype, device: str) -> None:
    """x = mean: value -1/2 (ln sigma^2 + ln 2 pi) and gradients are finite for any finite ln sigma^2, also next to
    ordinary elements, in full registers and in the rest after them."""
    for n in (1, 5, 37):
        x = torch.full((n,), 0.3, dtype=dtype, device=device, requires_grad=True)
        mean = torch.full_like(x, 0.3, requires_grad=True)
        scale = torch.full_like(x, logvar)
        scale[1::3] = 0.5
        scale.requires_grad_()
        value = gaussian_log_prob(x, mean, scale)
        dx, dmean, dscale = slopes(value, [x, mean, scale])
        exact = [-(mp.mpf(s) + mp.log(2 * mp.pi)) / 2 for s in scale.tolist()]
        assert_relative(value, exact, 2 * compute_eps(dtype))
        assert bool((dx == 0).all()) and bool((dmean == 0).all())
        assert bool((dscale == -0.5).all())
        # The same with the scale as one number, and reduced, which makes the gradients in the forward pass.
        total = gaussian_log_prob(x, mean, logvar, reduction="sum")
        assert_relative(total, [-n * (mp.mpf(logvar) + mp.log(2 * mp.pi)) / 2], 2 * compute_eps(dtype))
        assert all(bool((g == 0).all()) for g in slopes(total, [x, mean]))


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("form", FORMS)
def test_gaussian_over_all_scales(form: str, dtype: torch.dtype) -> None:
    """z from 0 to 40 at sigma from e^-43 to e^43 (the range of float32 and beyond its square), in one tensor."""
    grid = itertools.product((-86.0, -70.0, -20.0, -3.0, 0.0, 0.7, 5.0, 40.0, 86.0), (0.0, 1e-3, 0.3, 1.0, 2.5, 40.0))
    inputs = leaves([(z * math.exp(v / 2), 0.0, scale_from_logvar(v, form)) for v, z in grid], dtype)
    value = gaussian_log_prob(inputs[0], inputs[1], **{form: inputs[2]})
    dx, dmean, dscale = slopes(value, inputs)
    eps = compute_eps(dtype)
    rows = exactly(inputs)
    v = [exact_logvar(s, form) for *_, s in rows]
    z = [(mp.mpf(x) - mp.mpf(m)) * mp.exp(-w / 2) for (x, m, _), w in zip(rows, v, strict=True)]
    # e^-v carries the rounding of v or of ln sigma, so errors grow with |v|; the sum of positive and negative parts is
    # to be exact against their sizes.
    sizes = [a * a + abs(w) + 2 for a, w in zip(z, v, strict=True)]
    allowed = [(4 + float(abs(w))) * eps for w in v]
    for i, row in enumerate(rows):
        exact = exact_gaussian(*row, form)
        assert abs(mp.mpf(value[i].item()) - exact) <= allowed[i] * sizes[i], (row, value[i].item(), mp.nstr(exact, 9))
    assert_relative(dmean, [a * mp.exp(-w / 2) for a, w in zip(z, v, strict=True)], [2 * a for a in allowed])
    assert torch.equal(dx, -dmean)
    info = torch.finfo(dtype)
    for i, (*_, s) in enumerate(rows):
        slope = exact_slope(s, form)
        exact = slope * (z[i] ** 2 - 1) / 2
        if abs(exact) < info.max:
            assert abs(mp.mpf(dscale[i].item()) - exact) <= 2 * allowed[i] * abs(slope) * (z[i] ** 2 + 1), (rows[i], i)


@pytest.mark.parametrize("form", FORMS)
def test_gaussian_of_an_almost_vanishing_scale(form: str) -> None:
    """sigma = 1e-30 (its square is 0 in float32, its inverse squared infinite) with x - mean of the same size."""
    if form == "var":
        sigma = 1e-18  # var = 1e-36 is about the least that float32 holds in full
    else:
        sigma = 1e-30
    scale = scale_from_logvar(2 * math.log(sigma), form)
    inputs = leaves([(0.0, 0.0, scale), (sigma, 0.0, scale), (-3 * sigma, 0.0, scale)], torch.float32)
    value = gaussian_log_prob(inputs[0], inputs[1], **{form: inputs[2]})
    dx, _, dscale = slopes(value, inputs)
    rows = exactly(inputs)
    # ln sigma^2 = -138 as a float32 has an error of 7.6e-6, which is the relative error of z^2.
    allowed = 150 * torch.finfo(torch.float32).eps
    assert_relative(value, [exact_gaussian(*row, form) for row in rows], allowed)
    v = [exact_logvar(s, form) for *_, s in rows]
    assert_relative(dx, [-mp.mpf(x) * mp.exp(-w) for (x, *_), w in zip(rows, v, strict=True)], allowed)
    z2 = [mp.mpf(x) ** 2 * mp.exp(-w) for (x, *_), w in zip(rows, v, strict=True)]
    for i, (*_, s) in enumerate(rows):
        slope = exact_slope(s, form)
        assert abs(mp.mpf(dscale[i].item()) - slope * (z2[i] - 1) / 2) <= allowed * slope * (z2[i] + 1)


def test_gaussian_beyond_the_range_of_float32() -> None:
    """The true log-density and its gradients exceed the largest float32: infinite with the right sign, never NaN."""
    for logvar in (-100.0, -200.0, -400.0):
        inputs = leaves([(0.3, 0.2, logvar)], torch.float32)
        value = gaussian_log_prob(*inputs)
        assert [value.item(), *(g.item() for g in slopes(value, inputs))] == [-math.inf, -math.inf, math.inf, math.inf]


# ---- Bernoulli ----

LOGITS = (700.0, 100.0, 88.0, 40.0, 20.5, 17.0, 1.0, 0.5, 1e-8, 0.0, -1e-8, -1.0, -20.5, -40.0, -88.0, -100.0, -700.0)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
def test_bernoulli_of_any_logits(dtype: torch.dtype, device: str) -> None:
    """Where p rounds to 0 or 1, ln p and ln(1 - p) are still right, and so is x - p."""
    inputs = leaves([(x, logit) for x in (0.0, 1e-3, 0.3, 0.5, 1.0) for logit in LOGITS], dtype, device)
    value = bernoulli_log_prob(*inputs)
    dx, dlogits = slopes(value, inputs)
    rows = exactly(inputs)
    eps = compute_eps(dtype)
    for i, (x, logit) in enumerate(rows):
        exact = exact_bernoulli(x, logit)
        # At x = 0 and 1 nothing cancels. Between, x * logit and softplus do, with the size of the larger.
        size = abs(exact) if x in (0.0, 1.0) else max(abs(exact), abs(mp.mpf(logit)), mp.mpf(1))
        assert abs(mp.mpf(value[i].item()) - exact) <= 4 * eps * size + torch.finfo(torch.float32).tiny, (x, logit)
    odds = [mp.exp(mp.mpf(logit)) for _, logit in rows]
    exact = [mp.mpf(x) / (1 + o) - (1 - mp.mpf(x)) * o / (1 + o) for (x, _), o in zip(rows, odds, strict=True)]
    info = torch.finfo(dtype)
    rounding = info.eps / 2 if info.bits == 16 else 0.0
    for i, ((x, logit), truth) in enumerate(zip(rows, exact, strict=True)):
        size = abs(truth) if x in (0.0, 1.0) else 1
        assert abs(mp.mpf(dlogits[i].item()) - truth) <= (4 * eps + rounding) * size + info.tiny, (x, logit)
    assert torch.equal(dx, inputs[1].detach())


# ---- sampling ----


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("form", FORMS)
def test_sample_of_extreme_scales(form: str, dtype: torch.dtype) -> None:
    """z = mu + sigma eps and its gradients for sigma from e^-40 to e^40; at sigma = 0, which std, var and
    logvar = -inf can say, z is mu."""
    v = [-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0]
    inputs = leaves([(0.0, scale_from_logvar(x, form), 0.8) for x in v], dtype)
    z = elbo_ext.rsample(inputs[0], noise=inputs[2], **{form: inputs[1]})
    dmu, dscale, dnoise = slopes(z, inputs)
    rows = exactly(inputs)
    sigma = [mp.exp(exact_logvar(s, form) / 2) for _, s, _ in rows]
    # exp(x) to 2 ulp and the rounding of x / 2
    allowed = 4 * compute_eps(dtype)
    assert_relative(z, [s * mp.mpf(row[2]) for s, row in zip(sigma, rows, strict=True)], allowed)
    slope = [mp.mpf(e) * s * exact_slope(scale, form) / 2 for s, (_, scale, e) in zip(sigma, rows, strict=True)]
    assert_relative(dscale, slope, allowed)
    assert_relative(dnoise, sigma, allowed)
    assert bool((dmu == 1).all())

    zero = {"logvar": -math.inf, "log_std": -math.inf, "std": 0.0, "var": 0.0, "rho": -math.inf}[form]
    mu = torch.tensor([0.25, -3.0], dtype=dtype)
    assert torch.equal(elbo_ext.rsample(mu, **{form: torch.full_like(mu, zero)}), mu)


# ---- sums ----

N = 1_000_000


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", [(N,), (1000, 1000), (20_000, 50)])
@pytest.mark.parametrize("function", ["gaussian_log_prob", "bernoulli_log_prob", "gaussian_kl"])
def test_sums_of_a_million_terms(function: str, shape: tuple[int, ...], device: str) -> None:
    """In float32 as exact as its rounding: partial sums are short, and added up in double."""
    m = Maker(torch.float32, device, 0)
    a, b = m.unit(*shape), m.normal(*shape)
    term = getattr(elbo_ext, function)
    exact = term(a.double(), b.double(), reduction="sum")
    size = term(a.double(), b.double(), batch_dims=len(shape)).abs().sum()
    # Half an ulp for the result, and less for all the roundings on the way, which are random.
    allowed = 1.2e-7 * size / 2 + 2e-8 * size
    assert (term(a, b, reduction="sum").double() - exact).abs() <= allowed
    assert (term(a, b, reduction="mean").double() * shape[0] - exact).abs() <= allowed
    rows = term(a, b, batch_dims=1)
    assert (rows.double().sum() - exact).abs() <= allowed
    # The gradient of a number that all elements share is a sum of the same kind.
    shared = torch.zeros((), device=device, requires_grad=True)
    wide = torch.zeros((), device=device, dtype=torch.float64, requires_grad=True)
    if function == "gaussian_log_prob":
        (slope,) = torch.autograd.grad(term(a, b, shared, reduction="sum"), shared)
        (truth,) = torch.autograd.grad(term(a.double(), b.double(), wide, reduction="sum"), wide)
        assert (slope.double() - truth).abs() <= allowed


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equal_terms_do_not_drift(reduction: str) -> None:
    """A running sum of a million equal float32 numbers drifts by 1e-3 and more, as all its roundings point one way.
    Here a double takes over after at most 256 numbers (a tile in the narrowest registers), a drift of 1e-6."""
    x = torch.full((1, N), 1.1)
    term = -0.5 * (float(x[0, 0]) ** 2 + math.log(2 * math.pi))
    value = gaussian_log_prob(x, torch.zeros(()), reduction=reduction)
    assert value.item() == pytest.approx(N * term, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums(dtype: torch.dtype) -> None:
    """204,800 does not fit into float16, and a bfloat16 sum of ones stops at 256."""
    x = torch.full((2, 16384), 5.0, dtype=dtype)
    value = gaussian_log_prob(x, torch.zeros(16384, dtype=dtype))
    exact = -0.5 * 16384 * (25 + math.log(2 * math.pi))
    assert value.dtype == torch.float32
    assert value.tolist() == pytest.approx([exact, exact], rel=2e-6)  # equal terms, see above
    shared = torch.ones((), dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(gaussian_kl(shared, torch.zeros(4096, dtype=dtype), batch_dims=0), shared)
    assert slope.item() == 4096.0


def test_mpmath_is_the_truth_here() -> None:
    """The truths that these tests import, at numbers known otherwise."""
    assert mp.dps == 50 and mpmath.mp.dps != 50
    assert abs(exact_kl(1.0, 0.0, 0.0, 0.0, "logvar", "logvar") - 0.5) < 1e-45
    assert abs(exact_kl(0.0, 2.0, 0.0, 1.0, "std", "std") - (1.5 - mp.log(2))) < 1e-45
    assert abs(exact_gaussian(0.0, 0.0, 1.0, "var") + mp.log(2 * mp.pi) / 2) < 1e-45
    assert abs(exact_bernoulli(1.0, 0.0) + mp.log(2)) < 1e-45
