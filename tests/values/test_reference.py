"""The reference against truths it shares no code with: mpmath at 50 digits, scipy, torch.distributions,
published test vectors, explicit loops. The kernels are then checked against the reference."""

import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from elbo_ext import formulas, reference
from elbo_ext.reference import (
    ELBO,
    bernoulli_log_prob,
    elbo_loss,
    gaussian_kl,
    gaussian_log_prob,
    normal_noise,
    philox4x32_10,
    rsample,
    rsample_kl,
)

FORMS = ("logvar", "log_std", "std", "var", "rho")
DTYPES = (torch.float32, torch.float64)
mp = mpmath.mp.clone()  # a context of our own: other tests keep their precision
mp.dps = 50

# torch.func takes forward derivatives of some torch operators from a script that it compiles on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def scale_from_logvar(logvar: float, form: str) -> float:
    if form == "rho":  # sigma = ln(1 + e^rho)
        std = mp.exp(mp.mpf(logvar) / 2)
        return float(std + mp.log(-mp.expm1(-std)))
    value = logvar / 2 if form in ("log_std", "std") else logvar
    return value if form.startswith("log") else math.exp(value)


def scales_from_logvar(logvar: Tensor, form: str) -> Tensor:
    if form == "rho":
        std = (logvar / 2).exp()
        return std + torch.log(-torch.expm1(-std))
    value = logvar / 2 if form in ("log_std", "std") else logvar
    return value if form.startswith("log") else value.exp()


def exact_std(scale: float, form: str, floor: tuple[str, float] | None = None) -> mpmath.mpf:
    """sigma, with its floor if it has one, by name."""
    std = mp.exp(exact_logvar(scale, form) / 2)
    if floor is None:
        return std
    return std + mp.mpf(floor[1]) if floor[0] == "min_std" else mp.sqrt(std**2 + mp.mpf(floor[1]))


def exact_logvar(scale: float, form: str) -> mpmath.mpf:
    scale = mp.mpf(scale)
    if form == "rho":
        return 2 * mp.log(mp.log1p(mp.exp(scale)))
    value = scale if form.startswith("log") else mp.log(scale)
    return 2 * value if form in ("log_std", "std") else value


def exact_slope(scale: float, form: str) -> mpmath.mpf:
    """d ln sigma^2 / d scale."""
    if form == "rho":
        return 2 / ((1 + mp.exp(-mp.mpf(scale))) * mp.log1p(mp.exp(mp.mpf(scale))))
    slope = mp.mpf(2 if form in ("log_std", "std") else 1)
    return slope if form.startswith("log") else slope / mp.mpf(scale)


def exact_kl(mu: float, scale: float, prior_mu: float, prior_scale: float, form: str, prior_form: str) -> mpmath.mpf:
    prior_logvar = exact_logvar(prior_scale, prior_form)
    d = exact_logvar(scale, form) - prior_logvar
    return ((mp.mpf(mu) - mp.mpf(prior_mu)) ** 2 * mp.exp(-prior_logvar) + mp.expm1(d) - d) / 2


def exact_gaussian(x: float, mean: float, scale: float, form: str) -> mpmath.mpf:
    logvar = exact_logvar(scale, form)
    return -((mp.mpf(x) - mp.mpf(mean)) ** 2 * mp.exp(-logvar) + logvar + mp.log(2 * mp.pi)) / 2


def exact_bernoulli(x: float, logit: float) -> mpmath.mpf:
    x, logit = mp.mpf(x), mp.mpf(logit)
    return -x * mp.log1p(mp.exp(-logit)) - (1 - x) * mp.log1p(mp.exp(logit))


def assert_rel(actual: Tensor, exact: list[mpmath.mpf], tolerance: float | list[float]) -> None:
    """Each |actual / exact - 1| <= tolerance, compared in 50 digits; an exact 0 demands 0."""
    values = actual.detach().flatten().tolist()
    tolerances = tolerance if isinstance(tolerance, list) else [tolerance] * len(exact)
    assert len(values) == len(exact) == len(tolerances) > 0
    for i, (value, truth, rel) in enumerate(zip(values, exact, tolerances)):
        assert math.isfinite(value), f"element {i}: {value}, expected {mp.nstr(truth, 17)}"
        error = abs(mp.mpf(value) - truth)
        message = f"element {i}: {value!r}, expected {mp.nstr(truth, 17)}, allowed {rel:.1e}"
        assert error <= rel * abs(truth), message


def columns(rows: list[tuple[float, ...]], dtype: torch.dtype) -> list[Tensor]:
    """One tensor per column, leaves that require gradients."""
    return [torch.tensor(c, dtype=dtype, requires_grad=True) for c in zip(*rows)]


def exact_inputs(tensors: list[Tensor]) -> list[tuple[float, ...]]:
    """The rows after rounding to the tensors' dtype: what the truth must be evaluated at."""
    return list(zip(*(t.tolist() for t in tensors)))


# ------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors, "philox4x32 10"
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox4x32_10(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert words.dtype == np.uint32 and words.tolist() == expected


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox in Python integers, straight from the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def exact_noise(seed: int, i: int) -> mpmath.mpf:
    block = i // 4
    words = philox_scalar([block % 2**32, block >> 32, 0, 0], [seed % 2**32, (seed >> 32) % 2**32])
    a, b = words[0:2] if (i // 2) % 2 == 0 else words[2:4]
    u = (mp.mpf(a >> 1) + mp.mpf(1) / 2) / 2**31
    theta = 2 * mp.pi * b / 2**32
    return mp.sqrt(-2 * mp.log(u)) * (mp.cos(theta) if i % 2 == 0 else mp.sin(theta))


def test_philox_broadcasts_keys_and_matches_integers() -> None:
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (5, 1, 4), dtype=np.uint32)
    key = rng.integers(0, 2**32, (3, 2), dtype=np.uint32)
    words = philox4x32_10(counter, key)
    assert words.shape == (5, 3, 4)
    for i, j in itertools.product(range(5), range(3)):
        assert words[i, j].tolist() == philox_scalar(counter[i, 0].tolist(), key[j].tolist())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 3, 2**34 - 2, 2**40 + 1])  # 2^34: the second counter word
def test_noise_is_the_definition(seed: int, offset: int) -> None:
    eps = normal_noise(seed, 11, offset)
    assert eps.dtype == np.float64
    for k, value in enumerate(eps.tolist()):
        # Absolute: the angle is rounded to 2^-51, and the radius is at most 6.7.
        assert abs(mp.mpf(value) - exact_noise(seed, offset + k)) < 4e-15


@pytest.mark.parametrize("a", [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF])
def test_noise_radius_at_the_ends_of_the_unit_interval(a: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """u -> 0 gives the longest radius, u -> 1 the shortest, where ln u must not lose its digits."""
    monkeypatch.setattr(reference.noise, "philox4x32_10", lambda counter, key: np.array([[a, 0, a, 0]], np.uint32))
    radius = mp.sqrt(-2 * mp.log((mp.mpf(a >> 1) + mp.mpf(1) / 2) / 2**31))
    eps = normal_noise(0, 4)
    assert_rel(torch.from_numpy(eps[0::2].copy()), [radius, radius], 4e-16)
    assert eps[1::2].tolist() == [0.0, 0.0]  # sin 0


def test_noise_depends_on_the_index_alone() -> None:
    whole = normal_noise(7, 64)
    for offset, n in itertools.product(range(9), (0, 1, 2, 3, 4, 5, 17)):
        assert np.array_equal(normal_noise(7, n, offset), whole[offset : offset + n])


@pytest.mark.parametrize("seed", [0, -123456789012345])
def test_noise_is_standard_normal(seed: int) -> None:
    """Bounds are 4.5 standard errors; the seeds are fixed, so this cannot fail by chance from run to run."""
    n = 1_000_000
    eps = normal_noise(seed, n)
    standard_error = 1 / math.sqrt(n)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)]:
        assert abs((eps**power).mean() - moment) < 4.5 * math.sqrt(variance) * standard_error
    assert scipy.stats.kstest(eps, "norm").pvalue > 1e-3
    for position in range(4):  # each place in a Philox block by itself, its tails too
        assert scipy.stats.kstest(eps[position::4], "norm").pvalue > 1e-3
        expected = n / 4 * 2 * scipy.stats.norm.sf(3.5)
        assert abs((abs(eps[position::4]) > 3.5).sum() - expected) < 4.5 * math.sqrt(expected)


def test_noise_is_uncorrelated() -> None:
    n = 400_000
    eps = normal_noise(3, n)
    bound = 4.5 / math.sqrt(n - 8)
    for lag in range(1, 9):
        # The squares too: the two values of one Box-Muller pair share their radius.
        for a in (eps, eps**2):
            assert abs(np.corrcoef(a[lag:], a[:-lag])[0, 1]) < bound
    for other in (4, 3 + 2**32, 3 - 2**63):  # the next seed, and seeds that differ in the high word alone
        assert abs(np.corrcoef(eps, normal_noise(other, n))[0, 1]) < bound


# ------------------------------------------------------------------------------------------------- Gaussian


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_gaussian_and_its_gradients(form: str, dtype: torch.dtype) -> None:
    logvars = (-80.0, -20.0, -3.0, -1e-3, 0.0, 0.7, 5.0, 40.0, 80.0)
    differences = (0.0, 1e-6, 0.3, -1.0, 2.5, 40.0)
    grid = itertools.product(logvars, differences)
    rows = [(0.25 + d * math.exp(v / 2), 0.25, scale_from_logvar(v, form)) for v, d in grid]
    x, mean, scale = columns(rows, dtype)
    value = formulas.gaussian(x, mean, scale, form)
    grads = torch.autograd.grad(value.sum(), (x, mean, scale))
    exact, exact_x, exact_scale, size, size_scale, tolerance = [], [], [], [], [], []
    for a, m, s in exact_inputs([x, mean, scale]):
        v = exact_logvar(s, form)
        z2 = (mp.mpf(a) - mp.mpf(m)) ** 2 * mp.exp(-v)
        slope = exact_slope(s, form)
        exact.append(exact_gaussian(a, m, s, form))
        exact_x.append((mp.mpf(m) - mp.mpf(a)) * mp.exp(-v))
        exact_scale.append(slope * (z2 - 1) / 2)
        # Where the summands cancel, the error is to be small against them; exp(-v) carries the rounding of v.
        size.append(z2 + abs(v) + 2)
        size_scale.append(slope * (z2 + 1))
        tolerance.append(float(4 + abs(v)) * torch.finfo(dtype).eps)
    assert_rel(grads[0], exact_x, [2 * t for t in tolerance])
    assert torch.equal(grads[1], -grads[0])
    for actual, truth, scale_of_error in ((value, exact, size), (grads[2], exact_scale, size_scale)):
        for a, t, s, rel in zip(actual.tolist(), truth, scale_of_error, tolerance):
            assert abs(mp.mpf(a) - t) <= rel * s, (a, float(t))


def test_gaussian_against_scipy() -> None:
    rng = np.random.default_rng(1)
    x, mean, std = rng.normal(size=200), rng.normal(size=200), rng.lognormal(size=200)
    actual = formulas.gaussian(*map(torch.from_numpy, (x, mean, std)), "std").numpy()
    np.testing.assert_allclose(actual, scipy.stats.norm.logpdf(x, mean, std), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logvar", [-4000.0, -400.0, -200.0, 200.0, 400.0, -math.inf])
def test_gaussian_at_its_mean_for_any_scale(logvar: float, dtype: torch.dtype) -> None:
    """0 / sigma is 0 although 1 / sigma overflows: value and gradients are limits, not NaN."""
    inputs = columns([(0.3, 0.3, logvar)], dtype)
    value = formulas.gaussian(*inputs, "logvar")
    dx, dmean, dlogvar = torch.autograd.grad(value.sum(), inputs)
    assert (dx.item(), dmean.item(), dlogvar.item()) == (0.0, 0.0, -0.5)
    expected = torch.tensor(-0.5 * (logvar + math.log(2 * math.pi)), dtype=dtype)
    torch.testing.assert_close(value[0], expected, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


def test_gaussian_far_from_its_mean_with_a_vanishing_scale() -> None:
    """The true value and gradients exceed the largest float32, so they are infinite with the right sign."""
    for logvar in (-100.0, -200.0, -400.0):
        inputs = columns([(0.3, 0.2, logvar)], torch.float32)
        value = formulas.gaussian(*inputs, "logvar")
        grads = [g.item() for g in torch.autograd.grad(value.sum(), inputs)]
        assert [value.item(), *grads] == [-math.inf, -math.inf, math.inf, math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_quotient_in_range_of_factors_out_of_range(dtype: torch.dtype) -> None:
    """x - mean = 1e-30, sigma = 1e-31: z = 10, but 1 / sigma^2 overflows float32."""
    logvar = 2 * math.log(1e-31)
    inputs = columns([(1e-30, 0.0, logvar), (-1e30, 0.0, -logvar)], dtype)
    value = formulas.gaussian(*inputs, "logvar")
    exact = [exact_gaussian(*row, "logvar") for row in exact_inputs(inputs)]
    # z^2 carries the rounding of exp(-logvar / 4): |logvar| eps, with z^2 = 100 in a sum of 90.
    assert_rel(value, exact, 200 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------------ Bernoulli

LOGITS = (-700.0, -100.0, -40.0, -20.5, -1.0, -1e-8, 0.0, 1e-8, 0.5, 17.0, 20.5, 40.0, 80.0, 100.0, 700.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bernoulli_and_its_gradients(dtype: torch.dtype) -> None:
    rows = [(x, logit) for x in (0.0, 1e-3, 0.3, 0.5, 1.0) for logit in LOGITS]
    x, logits = columns(rows, dtype)
    value = formulas.bernoulli(x, logits)
    dx, dlogits = torch.autograd.grad(value.sum(), (x, logits))
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    inputs = exact_inputs([x, logits])
    for i, (a, logit) in enumerate(inputs):
        exact = exact_bernoulli(a, logit)
        # No summand of the value is positive, so even 1 - p = e^-40 comes out in full; below the smallest
        # normal number nothing can.
        assert abs(mp.mpf(value[i].item()) - exact) <= 4 * eps * abs(exact) + tiny
        odds = mp.exp(mp.mpf(logit))
        slope = mp.mpf(a) / (1 + odds) - (1 - mp.mpf(a)) * odds / (1 + odds)  # x - p without cancelling
        # At x = 0 and x = 1 the gradient is one exponential, elsewhere a difference.
        scale_of_error = abs(slope) if a in (0.0, 1.0) else 1
        assert abs(mp.mpf(dlogits[i].item()) - slope) <= 4 * eps * scale_of_error + tiny
        assert abs(mp.mpf(dx[i].item()) - mp.mpf(logit)) <= 2 * eps * max(1, abs(logit))


def test_bernoulli_second_derivative() -> None:
    rows = [(x, logit) for x in (0.0, 0.3, 1.0) for logit in LOGITS]
    x, logits = columns(rows, torch.float64)
    (slope,) = torch.autograd.grad(formulas.bernoulli(x, logits).sum(), logits, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), logits)
    exact = [-mp.exp(-abs(mp.mpf(v))) / (1 + mp.exp(-abs(mp.mpf(v)))) ** 2 for _, v in rows]
    # Absolute: torch evaluates p (1 - p) from p, which rounds to 1.
    np.testing.assert_allclose(curvature.numpy(), [float(e) for e in exact], rtol=1e-13, atol=3e-16)


def test_bernoulli_against_scipy() -> None:
    rng = np.random.default_rng(2)
    x, logits = rng.integers(0, 2, 200), 3 * rng.normal(size=200)
    actual = formulas.bernoulli(torch.from_numpy(x).double(), torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(actual, scipy.stats.bernoulli.logpmf(x, 1 / (1 + np.exp(-logits))), rtol=1e-12)


# ------------------------------------------------------------------------------------------------------- KL

STEPS = (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.3, 0.9, 0.999, 1.0, 1.001, 1.5, 4.0, 10.0)


def kl_rows(form: str, prior_form: str, dtype: torch.dtype) -> list[Tensor]:
    rows = []
    for prior_logvar, d, sign in itertools.product((-3.0, 0.0, 0.75), STEPS, (-1, 1)):
        scale = scale_from_logvar(prior_logvar + sign * d, form)
        rows.append((0.0, scale, 0.0, scale_from_logvar(prior_logvar, prior_form)))
    return columns(rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_kl_and_its_gradient_for_close_scales(form: str, dtype: torch.dtype) -> None:
    """phi(d) = e^d - 1 - d ~ d^2 / 2, phi'(d) = e^d - 1 ~ d, to full precision: posterior collapse."""
    inputs = kl_rows(form, form, dtype)
    value = formulas.gaussian_kl(*inputs, form, form)
    dscale, dprior = torch.autograd.grad(value.sum(), (inputs[1], inputs[3]))
    exact, exact_scale, exact_prior, tolerance = [], [], [], []
    for m, s, pm, p in exact_inputs(inputs):
        d = exact_logvar(s, form) - exact_logvar(p, form)
        exact.append(exact_kl(m, s, pm, p, form, form))
        exact_scale.append(exact_slope(s, form) * mp.expm1(d) / 2)
        exact_prior.append(-exact_slope(p, form) * mp.expm1(d) / 2)
        # Relative error of phi = (d phi' / phi) times that of d; std and var take logarithms of up to 13.
        tolerance.append(float(8 + 2 * abs(d)) * torch.finfo(dtype).eps)
    assert_rel(value, exact, tolerance)
    assert_rel(dscale, exact_scale, tolerance)
    assert_rel(dprior, exact_prior, tolerance)


@pytest.mark.parametrize(("form", "prior_form"), [p for p in itertools.product(FORMS, FORMS) if p[0] != p[1]])
def test_kl_of_mixed_forms(form: str, prior_form: str) -> None:
    inputs = kl_rows(form, prior_form, torch.float64)
    value = formulas.gaussian_kl(*inputs, form, prior_form)
    assert bool((value >= 0).all())
    for actual, row in zip(value.tolist(), exact_inputs(inputs)):
        exact = exact_kl(*row, form, prior_form)
        # d is a difference of logarithms of different things, so its error is absolute: a few roundings of
        # |ln var|. It changes phi by phi'(d) = e^d - 1 times itself, and near d = 0 by its square.
        error = 16 * torch.finfo(torch.float64).eps
        d = exact_logvar(row[1], form) - exact_logvar(row[3], prior_form)
        assert abs(mp.mpf(actual) - exact) <= error * (abs(mp.expm1(d)) + error) + 1e-15 * exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_kl_with_the_unit_prior_keeps_full_precision(form: str, dtype: torch.dtype) -> None:
    """ln sigma^2 itself is precise near sigma = 1, so a prior of log-variance 0 costs nothing in any form."""
    scales = [scale_from_logvar(sign * d, form) for d in STEPS for sign in (-1, 1)]
    inputs = columns([(0.0, s, 0.0, 0.0) for s in scales], dtype)
    value = formulas.gaussian_kl(*inputs, form, "logvar")
    (slope,) = torch.autograd.grad(value.sum(), inputs[1])
    rows = exact_inputs(inputs)
    exact_slopes = [exact_slope(s, form) * mp.expm1(exact_logvar(s, form)) / 2 for _, s, _, _ in rows]
    assert_rel(value, [exact_kl(*row, form, "logvar") for row in rows], 24 * torch.finfo(dtype).eps)
    assert_rel(slope, exact_slopes, 24 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["std", "var"])
def test_kl_of_scales_orders_of_magnitude_apart(form: str, dtype: torch.dtype) -> None:
    """ln(1 + (s - p) / p) would round to -inf; the KL and its gradients are finite, in float32 too."""
    pairs = [(1e-30, 1.0), (1e-5, 1.0), (1e-25, 1e15), (0.4, 1.0), (3e-8, 2.0), (1e-38, 1e-12), (2.5, 1.0)]
    inputs = columns([(0.0, s, 0.0, p) for s, p in pairs], dtype)
    value = formulas.gaussian_kl(*inputs, form, form)
    grads = torch.autograd.grad(value.sum(), (inputs[1], inputs[3]))
    exact = [exact_kl(*row, form, form) for row in exact_inputs(inputs)]
    k = 2 if form == "std" else 1
    slopes = [(k * mp.expm1(k * mp.log(mp.mpf(s) / p)) / 2) for _, s, _, p in exact_inputs(inputs)]
    eps = torch.finfo(dtype).eps
    assert_rel(value, exact, 16 * eps)
    assert_rel(grads[0], [g / mp.mpf(row[1]) for g, row in zip(slopes, exact_inputs(inputs))], 16 * eps)
    assert_rel(grads[1], [-g / mp.mpf(row[3]) for g, row in zip(slopes, exact_inputs(inputs))], 16 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_of_extreme_log_variances(dtype: torch.dtype) -> None:
    rows = [(0.1, -200.0, 0.1, 0.0), (0.5, -200.0, 0.0, 1.0), (0.0, 80.0, 0.0, 0.0), (0.0, 0.0, 0.0, 200.0)]
    rows += [(3.0, 200.0, 3.0, 200.0), (3.0, -200.0, 3.0, -200.0), (3.0, -399.5, 3.0, -399.0)]
    rows += [(0.0, -4000.0, 0.0, 0.0), (0.0, -1e10, 0.0, 0.0)]
    inputs = columns(rows, dtype)
    value = formulas.gaussian_kl(*inputs, "logvar", "logvar")
    exact = [exact_kl(*row, "logvar", "logvar") for row in exact_inputs(inputs)]
    assert_rel(value, exact, 100 * torch.finfo(dtype).eps)  # e^80 carries the rounding of its exponent
    grads = torch.autograd.grad(value.sum(), inputs)
    assert all(bool(g.isfinite().all()) for g in grads)
    d = [mp.mpf(s) - mp.mpf(p) for _, s, _, p in exact_inputs(inputs)]
    assert_rel(grads[1], [mp.expm1(v) / 2 for v in d], 100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "prior_form"), list(itertools.product(FORMS, FORMS)))
def test_kl_is_never_negative(form: str, prior_form: str, dtype: torch.dtype) -> None:
    """mu = prior_mu and d spread over twenty decades, where a rounding error could turn the sign."""
    generator = torch.Generator().manual_seed(0)
    n = 5_000
    prior_logvar = 4 * torch.randn(n, generator=generator, dtype=torch.float64)
    d = torch.randn(n, generator=generator, dtype=torch.float64)
    d = d * 10 ** (-20 * torch.rand(n, generator=generator, dtype=torch.float64) + 1)

    zero = torch.zeros((), dtype=dtype)
    scales = [scales_from_logvar(prior_logvar + d, form), scales_from_logvar(prior_logvar, prior_form)]
    s, p = (t.to(dtype) for t in scales)
    assert formulas.gaussian_kl(zero, s, zero, p, form, prior_form).min() >= 0
    if form == prior_form:  # the same scale: exactly zero
        assert bool((formulas.gaussian_kl(zero, s, zero, s, form, form) == 0).all())


def test_kl_against_torch_distributions() -> None:
    torch.manual_seed(0)
    mu, prior_mu = torch.randn(2, 500, dtype=torch.float64)
    std, prior_std = torch.randn(2, 500, dtype=torch.float64).exp()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, std), torch.distributions.Normal(prior_mu, prior_std)
    )
    for form, prior_form in itertools.product(FORMS, FORMS):
        scales = [
            {"logvar": 2 * s.log(), "log_std": s.log(), "std": s, "var": s**2, "rho": torch.expm1(s).log()}[f]
            for s, f in ((std, form), (prior_std, prior_form))
        ]
        actual = formulas.gaussian_kl(mu, scales[0], prior_mu, scales[1], form, prior_form)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)


# ------------------------------------------------------------------------- derivatives of any order and kind


def term_cases() -> list:
    """(callable of tensors alone, inputs), with both sides of every torch.where among the inputs."""
    f64 = {"dtype": torch.float64}
    x = torch.tensor([0.3, -1.2, 0.4], **f64)
    mean = torch.tensor([0.1, -1.0, 0.4], **f64)  # equal to x in one place
    logvar = torch.tensor([-1.0, 0.2, 1.5], **f64)
    priors = torch.tensor([[0.3, 0.2, -0.9], [-0.9, 0.1, 1.9]], **f64)  # d = -1.3, 0, 2.4 and -0.1, 0.1, -0.4

    bernoulli = formulas.bernoulli
    cases = [pytest.param(bernoulli, (torch.tensor([0.0, 0.3, 1.0], **f64), 3 * mean - 0.3), id="bernoulli")]
    for form in FORMS:
        gaussian = partial(formulas.gaussian, form=form)
        inputs = (x, mean, scales_from_logvar(logvar, form))
        cases.append(pytest.param(gaussian, inputs, id=f"gaussian-{form}"))
    for form, prior_form in [*zip(FORMS, FORMS), ("logvar", "std"), ("var", "log_std")]:
        kl = partial(formulas.gaussian_kl, form=form, prior_form=prior_form)
        for name, prior in zip(("apart", "close"), priors):
            inputs = (x, scales_from_logvar(logvar, form), mean[:1], scales_from_logvar(prior, prior_form))
            cases.append(pytest.param(kl, inputs, id=f"kl-{form}-{prior_form}-{name}"))
    for form, floor in itertools.product(FORMS, ("min_std", "min_var")):
        with_floor = f"{form}+{floor}"
        gaussian = partial(formulas.gaussian, form=with_floor, floor=0.25)
        scale = scales_from_logvar(logvar, form)
        cases.append(pytest.param(gaussian, (x, mean, scale), id=f"gaussian-{with_floor}"))
        kl = partial(formulas.gaussian_kl, form=with_floor, prior_form=with_floor, floor=0.25, prior_floor=0.25)
        for name, prior in zip(("apart", "close"), priors):
            inputs = (x, scale, mean[:1], scales_from_logvar(prior, form))
            cases.append(pytest.param(kl, inputs, id=f"kl-{with_floor}-{name}"))
    return cases


@pytest.mark.parametrize(("function", "inputs"), term_cases())
def test_gradcheck(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradgradcheck(function, leaves, rtol=1e-5, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize(("function", "inputs"), term_cases())
def test_torch_func_agrees_with_autograd(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    argnums = tuple(range(len(inputs)))
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = function(*leaves)
    cotangent = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    grads = torch.autograd.grad(value, leaves, cotangent)

    out, vjp = torch.func.vjp(function, *inputs)
    torch.testing.assert_close((out, vjp(cotangent)), (value.detach(), grads), rtol=1e-14, atol=1e-15)

    tangents = tuple(torch.linspace(1, -1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in inputs)
    _, pushed = torch.func.jvp(function, inputs, tangents)
    paired = sum((g * t).sum() for g, t in zip(grads, tangents))
    torch.testing.assert_close((pushed * cotangent).sum(), paired, rtol=1e-12, atol=1e-13)

    stacked = tuple(torch.stack([t, t + 0.01]) for t in inputs)
    rows = [function(*(t[i] for t in stacked)) for i in range(2)]
    torch.testing.assert_close(torch.func.vmap(function)(*stacked), torch.stack(rows), rtol=1e-14, atol=1e-15)

    hessian = torch.func.hessian(lambda *a: function(*a).sum(), argnums)(*inputs)
    expected = torch.autograd.functional.hessian(lambda *a: function(*a).sum(), inputs)
    torch.testing.assert_close(hessian, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_kl_second_derivative_near_zero(form: str) -> None:
    """phi'' = e^d: the curvature of the KL where posterior and prior agree, against mpmath's derivative."""
    p = scale_from_logvar(0.4, form)
    for relative_step in (0.0, 1e-9, 1e-3):
        s = torch.tensor(p * (1 + relative_step), dtype=torch.float64, requires_grad=True)
        zero, prior = torch.zeros((), dtype=torch.float64), torch.tensor(p, dtype=torch.float64)
        value = formulas.gaussian_kl(zero, s, zero, prior, form, form)
        (slope,) = torch.autograd.grad(value, s, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, s)
        exact = mp.diff(lambda t: exact_kl(0.0, t, 0.0, p, form, form), mp.mpf(s.item()), 2)
        assert_rel(curvature, [exact], 1e-13)


# ------------------------------------------------------------------------------------------ public functions


Index = tuple[int, ...]


def kl_by_loop(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor, index: Index) -> float:
    m, v, pm, pv = (t.expand(mu.shape)[index].item() for t in (mu, logvar, prior_mu, prior_logvar))
    return 0.5 * ((m - pm) ** 2 / math.exp(pv) + math.exp(v - pv) - 1 - (v - pv))


def gaussian_by_loop(x: Tensor, mean: Tensor, logvar: Tensor, index: Index) -> float:
    shape = torch.broadcast_shapes(x.shape, mean.shape, logvar.shape)
    a, m, v = (t.expand(shape)[index].item() for t in (x, mean, logvar))
    return -0.5 * ((a - m) ** 2 / math.exp(v) + v + math.log(2 * math.pi))


def bernoulli_by_loop(x: Tensor, logits: Tensor, index: Index) -> float:
    a, p = x.expand_as(logits)[index].item(), 1 / (1 + math.exp(-logits[index].item()))
    return a * math.log(p) + (1 - a) * math.log(1 - p)


def reduce_by_loop(
    element: Callable[[Index], float], shape: Index, weight: Tensor | None, batch_dims: int, reduction: str
) -> Tensor:
    """Sums element(index) times its weight example by example, then the examples."""
    batch = shape[:batch_dims]
    examples = torch.zeros(batch, dtype=torch.float64)
    for index in itertools.product(*map(range, shape)):
        factor = 1.0 if weight is None else float(weight.expand(shape)[index])
        examples[index[:batch_dims]] += factor * element(index)
    if reduction == "none":
        return examples
    total = torch.tensor(math.fsum(examples.flatten().tolist()), dtype=torch.float64)
    return total if reduction == "sum" else total / math.prod(batch)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("weight_shape", [None, (5,), (2, 3, 1)])
def test_reductions_against_loops(reduction: str, batch_dims: int, weight_shape: Index | None) -> None:
    torch.manual_seed(1)
    shape = (2, 3, 5)
    x, a, b = torch.randn(3, *shape, dtype=torch.float64)
    channel, scalar = torch.randn(3, 1, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    weight = None if weight_shape is None else torch.rand(weight_shape, dtype=torch.float64)
    options = {"weight": weight, "batch_dims": batch_dims, "reduction": reduction}

    def check(actual: Tensor, element: Callable[[Index], float]) -> None:
        expected = reduce_by_loop(element, shape, weight, batch_dims, reduction)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)

    check(gaussian_kl(a, b, **options), partial(kl_by_loop, a, b, scalar * 0, scalar * 0))
    check(gaussian_kl(a, channel, x, scalar, **options), partial(kl_by_loop, a, channel, x, scalar))
    check(gaussian_log_prob(x, a, channel, **options), partial(gaussian_by_loop, x, a, channel))
    # The broadcast shape counts, not x's: here x is the smallest of the three.
    check(gaussian_log_prob(scalar, a, b, **options), partial(gaussian_by_loop, scalar, a, b))
    check(bernoulli_log_prob(x.sigmoid(), a, **options), partial(bernoulli_by_loop, x.sigmoid(), a))


def test_boolean_mask_drops_elements() -> None:
    x, mean = torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[1], [3], [6], [0]])
    actual = gaussian_log_prob(x, mean, weight=mask)
    expected = [gaussian_log_prob(x[i, mask[i]], mean[i, mask[i]], batch_dims=0) for i in range(4)]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-13, atol=1e-14)
    assert actual[3] == 0


@pytest.mark.parametrize("as_float", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_scale_forms_are_one_distribution(form: str, as_float: bool) -> None:
    """sigma = 0.8 of q and of the likelihood, 1.7 of the prior, however they are spelled."""
    mu, prior_mu = torch.randn(2, 3, 4, dtype=torch.float64)

    def scale(sigma: float) -> Tensor | float:
        value = scale_from_logvar(2 * math.log(sigma), form)
        return value if as_float else torch.full((4,), value, dtype=torch.float64)

    normal = torch.distributions.Normal
    q, p = normal(mu, 0.8), normal(prior_mu, 1.7)
    own, prior, recon = {form: scale(0.8)}, {f"prior_{form}": scale(1.7)}, {f"recon_{form}": scale(0.8)}
    kl = torch.distributions.kl_divergence(q, p).sum(-1)
    log_prob = q.log_prob(prior_mu).sum(-1)
    noise = torch.randn(3, 4, dtype=torch.float64)
    same = {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(gaussian_kl(mu, prior_mu=prior_mu, **own, **prior), kl, **same)
    torch.testing.assert_close(gaussian_log_prob(prior_mu, mu, **own), log_prob, **same)
    torch.testing.assert_close(rsample(mu, **own, noise=noise), mu + 0.8 * noise, **same)
    z, kl_with_sample = rsample_kl(mu, prior_mu=prior_mu, **own, **prior, noise=noise)
    torch.testing.assert_close((z, kl_with_sample), (mu + 0.8 * noise, kl), **same)
    bound = elbo_loss(mu, prior_mu, mu, prior_mu=prior_mu, **own, **prior, **recon, reduction="none")
    torch.testing.assert_close(bound, ELBO(kl - log_prob, log_prob, kl), **same)


@pytest.mark.parametrize("form", FORMS)
def test_default_prior_is_the_unit_normal(form: str) -> None:
    mu = torch.randn(5, 2, dtype=torch.float64)
    scale = torch.full((2,), 0.6, dtype=torch.float64)
    std = {
        "logvar": (scale / 2).exp(), "log_std": scale.exp(), "std": scale, "var": scale.sqrt(), "rho": scale.exp().log1p()
    }[form]  # fmt: skip
    expected = (0.5 * (mu**2 + std**2 - 1) - std.log()).sum(-1)
    torch.testing.assert_close(gaussian_kl(mu, **{form: scale}), expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float64, torch.float16), torch.float64),
    ],
)
def test_result_dtypes(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    a, b = (torch.randn(4, 3).to(d) for d in dtypes)
    wide = a.to(expected), b.to(expected)
    for function in (gaussian_kl, gaussian_log_prob, lambda a, b: bernoulli_log_prob(a.sigmoid().round(), b)):
        actual = function(a, b)
        assert actual.dtype == expected
        assert torch.equal(actual, function(*wide))  # nothing is rounded to half on the way
    assert all(t.dtype == expected for t in elbo_loss(a, b, a, b))
    noise = torch.randn(4, 3).to(dtypes[0])
    z, kl = rsample_kl(a, b, noise=noise)
    assert (z.dtype, kl.dtype) == (torch.promote_types(*dtypes), expected)
    torch.testing.assert_close(z, rsample(*wide, noise=noise.to(expected)).to(z.dtype), rtol=0, atol=0)


def test_half_precision_sums_do_not_overflow() -> None:
    """16384 squares of 5, halved: 204800, which float16 cannot hold."""
    x, mean = torch.full((1, 16384), 5.0, dtype=torch.float16), torch.zeros(16384, dtype=torch.float16)
    expected = -0.5 * 16384 * (25 + math.log(2 * math.pi))
    assert gaussian_log_prob(x, mean).item() == pytest.approx(expected, rel=1e-6)


def test_empty_batches_and_empty_rows() -> None:
    for batch, width in ((0, 4), (3, 0)):
        x = torch.zeros(batch, width)
        for function in (gaussian_kl, gaussian_log_prob, bernoulli_log_prob):
            assert torch.equal(function(x, x), torch.zeros(batch))
        assert rsample(x, x, noise=x).shape == x.shape
        assert all(v == 0 for v in elbo_loss(x, x, x, x, reduction="sum"))


# ----------------------------------------------------------------------------------------------- sampling


@pytest.fixture
def seed(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pins the seed: how it is drawn is not the reference's business."""
    value = -987654321987654321
    ops = SimpleNamespace(draw_seed=lambda device, generator=None: torch.tensor([value]))
    monkeypatch.setitem(sys.modules, "elbo_ext.ops", ops)
    return value


@pytest.mark.parametrize("num_samples", [None, 1, 3])
def test_rsample_uses_the_row_major_index(seed: int, num_samples: int | None) -> None:
    mu = torch.randn(5, 4, dtype=torch.float64).t()  # not contiguous: shape (4, 5)
    logvar = torch.randn(5, dtype=torch.float64)
    z = rsample(mu, logvar, num_samples=num_samples)
    assert z.shape == ((4, 5) if num_samples is None else (num_samples, 4, 5))
    leading = (0,) if num_samples is None else range(num_samples)
    for k, i, j in itertools.product(leading, range(4), range(5)):
        eps = normal_noise(seed, 1, offset=(k * 4 + i) * 5 + j).item()
        expected = mu[i, j].item() + math.exp(logvar[j].item() / 2) * eps
        actual = z[i, j] if num_samples is None else z[k, i, j]
        assert actual.item() == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_rsample_gradients_are_one_and_eps_sigma_half(seed: int) -> None:
    mu = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    logvar = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    dmu, dlogvar = torch.autograd.grad(rsample(mu, logvar).sum(), (mu, logvar))
    eps = torch.from_numpy(normal_noise(seed, 18)).reshape(6, 3)
    assert torch.equal(dmu, torch.ones(6, 3, dtype=torch.float64))
    torch.testing.assert_close(dlogvar, eps * (logvar.detach() / 2).exp() / 2, rtol=1e-14, atol=0.0)


def test_rsample_kl_is_both_and_kl_has_no_sample_axis(seed: int) -> None:
    mu, logvar, prior_mu, prior_logvar = torch.randn(4, 7, 2, 3)
    options = {"batch_dims": 2, "reduction": "none"}
    z, kl = rsample_kl(mu, logvar, prior_mu, prior_logvar, num_samples=4, **options)
    assert torch.equal(z, rsample(mu, logvar, num_samples=4)) and z.shape == (4, 7, 2, 3)
    assert torch.equal(kl, gaussian_kl(mu, logvar, prior_mu, prior_logvar, **options)) and kl.shape == (7, 2)


# -------------------------------------------------------------------------------------------------- ELBO


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_elbo_with_samples_against_loops(likelihood: str, reduction: str) -> None:
    """K = 3 reconstructions of each of 4 examples; one KL per example, counted once per sample."""
    torch.manual_seed(2)
    recon, x = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    mu, logvar = torch.randn(2, 4, 2, dtype=torch.float64)
    recon_logvar, weight = torch.randn(5, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    options = {"likelihood": likelihood, "beta": 0.25, "weight": weight, "batch_dims": 2}
    options["reduction"] = reduction
    if likelihood == "gaussian":
        options["recon_logvar"] = recon_logvar
        element = partial(gaussian_by_loop, x, recon, recon_logvar)
    else:
        element = partial(bernoulli_by_loop, x, recon)

    log_likelihood = reduce_by_loop(element, (3, 4, 5), weight, 2, reduction)
    # The weight belongs to the data's elements, not to the latent ones.
    kl = reduce_by_loop(lambda i: kl_by_loop(mu, logvar, zero, zero, i[1:]), (3, 4, 2), None, 2, reduction)
    expected = ELBO(0.25 * kl - log_likelihood, log_likelihood, kl)
    same = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(elbo_loss(recon, x, mu, logvar, **options), expected, **same)
    torch.testing.assert_close(elbo_loss(recon, x, kl=gaussian_kl(mu, logvar), **options), expected, **same)


def test_elbo_mean_divides_by_examples_not_by_elements() -> None:
    """Otherwise beta would silently change with the image size."""
    x = torch.zeros(2, 3, 8, 8)
    bound = elbo_loss(x, x, torch.ones(2, 5), torch.zeros(2, 5))
    assert bound.log_likelihood.item() == pytest.approx(-0.5 * 192 * math.log(2 * math.pi), rel=1e-6)
    assert bound.kl.item() == 2.5
    assert bound.loss.item() == pytest.approx(0.5 * 192 * math.log(2 * math.pi) + 2.5, rel=1e-6)


def test_elbo_bounds_the_evidence_of_a_linear_model(seed: int) -> None:
    """p(z) = N(0, 1), p(x|z) = N(x; z, 1/4), so p(x) = N(x; 0, 5/4) and p(z|x) = N(4x/5, 1/5).

    At the true posterior the bound averaged over z is ln p(x) itself; at another q it is lower by
    KL(q || p(z|x)). The analytic expectation over q = N(m, v) of ln p(x|z) is ln N(x; m, 1/4) - 2 v.
    """
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).unsqueeze(1)
    evidence = torch.distributions.Normal(0.0, math.sqrt(1.25)).log_prob(x).squeeze(1)
    samples = 200_000
    for shift, var in ((0.0, 0.2), (0.3, 0.5)):
        mu = 0.8 * x + shift
        z, kl = rsample_kl(mu, var=var, num_samples=samples)
        bound = elbo_loss(z, x, kl=kl, recon_var=0.25, batch_dims=2, reduction="none")
        q, posterior = (torch.distributions.Normal(m, math.sqrt(v)) for m, v in ((mu, var), (0.8 * x, 0.2)))
        gap = torch.distributions.kl_divergence(q, posterior).squeeze(1)
        error = (-bound.loss.mean(0) - (evidence - gap)).abs()
        assert bool((error < 4.5 * bound.loss.std(0) / math.sqrt(samples)).all())
