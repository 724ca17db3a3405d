"""The likelihoods of pixels, value and every gradient, against 60 digits (mpmath) where usual formulas lose them: logits
around 0 and of 90 and more, bins far narrower and far wider than the scale, means inside of a bin and far away, outermost
bins. Every element is an example of its own, so that no sum hides an error.

An error is measured against the larger of the number itself and its attainable size: what it changes by when one of the
inputs moves by one unit in the last place, over the relative size of that move. No computation in the inputs' own precision
can do better.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import likelihoods, reference
from samples import DTYPES, FLOORS, FORMS, devices

mp = mpmath.mp.clone()
mp.dps = 60
ERROR = {torch.float32: 2e-6, torch.float64: 5e-12}
Number = mpmath.mpf
Exact = Callable[..., tuple[Number, ...]]  # the value and its derivatives by each input


def exact_continuous_bernoulli(x: Number, a: Number) -> tuple[Number, ...]:
    if a == 0:
        return mp.mpf(0), a, x - mp.mpf(1) / 2
    mean = -1 / mp.expm1(-a) - 1 / a
    # ln((e^a - 1) / a), kept in range
    normalizer = a + mp.log(-mp.expm1(-a) / a) if a > 0 else mp.log(mp.expm1(a) / a)
    return a * x - normalizer, a, x - mean


FLOOR = 0.015625


def in_form(s: Number, form: str) -> tuple[Number, Number]:
    """The scale itself, and the derivative of its logarithm by what is given. "rho+min_std" has a FLOOR."""
    form, _, floor = form.partition("+")
    if floor:
        alone, slope = in_form(s, form)
        if floor == "min_std":
            return alone + FLOOR, slope * alone / (alone + FLOOR)
        return mp.sqrt(alone**2 + FLOOR), slope * alone**2 / (alone**2 + FLOOR)
    half = mp.mpf(1) / 2
    return {
        "log_scale": lambda: (mp.exp(s), mp.mpf(1)),
        "log_std": lambda: (mp.exp(s), mp.mpf(1)),
        "logvar": lambda: (mp.exp(s * half), half),
        "scale": lambda: (s, 1 / s),
        "std": lambda: (s, 1 / s),
        "var": lambda: (mp.sqrt(s), half / s),
        "rho": lambda: (mp.log1p(mp.exp(s)), 1 / ((1 + mp.exp(-s)) * mp.log1p(mp.exp(s)))),
    }[form]()


def exact_discretized(
    x: Number, mean: Number, s: Number, *, form: str, low: float, high: float, half_bin: float, logistic: bool
) -> tuple[Number, ...]:
    """ln(F(hi) - F(lo)) of a symmetric distribution, seen from the mean: by the tails outside of the bin where it holds the
    mean, else by the difference of the smaller ones."""
    tail = (lambda t: mp.exp(-t) / (1 + mp.exp(-t))) if logistic else (lambda t: mp.erfc(t / mp.sqrt(2)) / 2)
    density = (
        (lambda t: mp.exp(-abs(t)) / (1 + mp.exp(-abs(t))) ** 2)
        if logistic
        else (lambda t: mp.exp(-t * t / 2) / mp.sqrt(2 * mp.pi))
    )
    scale, slope = in_form(s, form)
    sign = -1 if x < mean else 1
    bottom, top = x <= low + half_bin, x >= high - half_bin
    near, far = (sign * (x - mean) / scale + h / scale for h in (-mp.mpf(half_bin), mp.mpf(half_bin)))
    at_near, at_far = density(near), density(far)
    outer = tail(far)
    before = tail(-near)
    if (bottom, sign) == (True, 1) or (top, sign) == (True, -1):  # begins at -infinity
        before, at_near = mp.mpf(0), mp.mpf(0)
    elif bottom or top:
        outer, at_far = mp.mpf(0), mp.mpf(0)
    log_mass = mp.log1p(-before - outer) if near < 0 or before == 0 else mp.log(tail(near) - outer)
    mass = mp.exp(log_mass)
    by_centre = (at_far - at_near) / mass
    by_log_scale = -(at_far * far - at_near * near) / mass
    return log_mass, sign * by_centre / scale, -sign * by_centre / scale, by_log_scale * slope


def attainable(exact: Exact, inputs: list[Number], eps: float) -> list[Number]:
    """Of the value and of each derivative."""
    here, size = exact(*inputs), [mp.mpf(0)] * (len(inputs) + 1)
    for k, number in enumerate(inputs):
        moved = exact(*inputs[:k], number * (1 + mp.mpf(eps)), *inputs[k + 1 :])
        size = [total + abs(a - b) / eps for total, a, b in zip(size, here, moved, strict=True)]
    return size


def worst_error(actual: list[Tensor], inputs: list[Tensor], exact: Exact, eps: float) -> float:
    """Of the value, or of the value and its derivatives. Numbers below the smallest normal one may be rounded to 0."""
    tiny = torch.finfo(actual[0].dtype).tiny
    rows = list(zip(*(t.detach().cpu().double().tolist() for t in inputs), strict=True))
    columns = [t.detach().cpu().double().tolist() for t in actual]
    worst = 0.0
    for i, row in enumerate(rows):
        numbers = [mp.mpf(number) for number in row]
        sizes = attainable(exact, numbers, eps)
        for column, truth, size in zip(columns, exact(*numbers), sizes, strict=False):
            assert math.isfinite(column[i]), f"{row}: {column[i]}, expected {mp.nstr(truth, 9)}"
            error = abs(column[i] - truth) - tiny
            if error > 0:
                worst = max(worst, float(error / max(abs(truth), size, tiny)))
    return worst


def evaluated(function: Callable[..., Tensor], names: list[str], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The value of each element, and the gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = function(**dict(zip(names, leaves, strict=True)), batch_dims=1, **options)
    return [value, *torch.autograd.grad(value.sum(), leaves)]


def columns(rows: Any, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [torch.tensor(column, dtype=dtype, device=device) for column in zip(*rows, strict=True)]


# ---- continuous Bernoulli ----

LOGITS = (0.0, 1e-30, 1e-7, 1e-3, 0.5, 1.0, 1.9999, 2.0, 2.0001, 3.0, 10.0, 30.0, 90.0, 700.0, 1e4)
GREYS = (0.0, 1e-3, 0.25, 0.5, 0.5000001, 0.75, 1.0)
UNIT_ROWS = [(x, sign * a) for x in GREYS for a in LOGITS for sign in (1.0, -1.0)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("module", [elbo_ext, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_continuous_bernoulli(dtype: torch.dtype, module: Any, device: str) -> None:
    inputs = columns(UNIT_ROWS, dtype, device)
    actual = evaluated(module.continuous_bernoulli_log_prob, ["x", "logits"], inputs)
    assert worst_error(actual, inputs, exact_continuous_bernoulli, torch.finfo(dtype).eps) < ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_continuous_bernoulli_at_zero(dtype: torch.dtype) -> None:
    x, logits = torch.linspace(0, 1, 5, dtype=dtype), torch.zeros(5, dtype=dtype)
    value, of_x, of_logits = evaluated(elbo_ext.continuous_bernoulli_log_prob, ["x", "logits"], [x, logits])
    assert value.tolist() == [0.0] * 5 and of_x.tolist() == [0.0] * 5
    assert torch.equal(of_logits, x - 0.5)


def test_continuous_bernoulli_is_a_density() -> None:
    """Simpson's rule over [0, 1] gives 1."""
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    weights = torch.tensor([1.0, *[4.0, 2.0] * 999, 4.0, 1.0], dtype=torch.float64) / 6000
    for logits in (-20.0, -3.0, -1e-6, 0.3, 5.0):
        density = elbo_ext.continuous_bernoulli_log_prob(x, logits, batch_dims=1).exp()
        assert (density * weights).sum().item() == pytest.approx(1, abs=1e-8)


# ---- discretized logistic and Gaussian ----

GRID = dict(low=-1.0, high=1.0, half_bin=1 / 255)
WHOLE = dict(low=-math.inf, high=math.inf, half_bin=0.5)
PIXELS = [2 * k / 255 - 1 for k in (0, 1, 37, 127, 128, 200, 254, 255)]
MEANS = (-300.0, -1.5, -1.0, -0.996, -0.3, 0.0, 1e-4, 0.00392, 0.57, 1.0, 1.003, 4.0)
LOG_SCALES = (-8.0, -6.5, -5.0, -3.0, -1.0, -1e-3, 0.0, 1.0, 3.0)
WHOLE_NUMBERS = [(x, m) for x in (0.0, 1.0, -3.0, 40.0) for m in (0.0, 1e-5, 0.3, 0.5, 0.9, -1.0, -2.6, 37.3)]
WIDER_SCALES = (-8.0, -4.0, -2.0, -1.2, -0.7, -0.2, 0.0, 1.0, 3.0)


def rows_of(grid: dict[str, float]) -> list[tuple[float, float, float]]:
    if grid is WHOLE:
        return [(x, m, s) for (x, m), s in itertools.product(WHOLE_NUMBERS, WIDER_SCALES)]
    return list(itertools.product(PIXELS, MEANS, LOG_SCALES))


def given(log_scale: float, form: str) -> float:
    """What stands for a scale, without its floor."""
    form = form.partition("+")[0]
    if form == "rho":
        return math.exp(log_scale) + math.log(-math.expm1(-math.exp(log_scale)))
    value = 2 * log_scale if form.endswith("var") else log_scale
    return value if form.startswith("log") else math.exp(value)


def options_of(grid: dict[str, float]) -> dict[str, Any]:
    return {"low": None, "high": None} if grid is WHOLE else {}


def named(form: str) -> tuple[list[str], dict[str, float]]:
    """The names of the inputs, and the floor after them if the form has one."""
    form, _, floor = form.partition("+")
    return ["x", "mean", form], {floor: FLOOR} if floor else {}


WITH_FLOORS = [f"{form}+{floor}" for form in FORMS for floor in FLOORS]
CASES = [("logistic", form) for form in ("log_scale", "scale")] + [
    ("gaussian", form) for form in (*FORMS, *WITH_FLOORS)
]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("grid", [GRID, WHOLE], ids=["grid", "whole"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(("family", "form"), CASES)
def test_discretized(family: str, form: str, dtype: torch.dtype, grid: dict[str, float], device: str) -> None:
    inputs = columns([(x, m, given(s, form)) for x, m, s in rows_of(grid)], dtype, device)
    (names, floor), function = named(form), f"discretized_{family}_log_prob"
    exact = functools.partial(exact_discretized, form=form, logistic=family == "logistic", **grid)
    actual = evaluated(getattr(elbo_ext, function), names, inputs, **options_of(grid), **floor)
    assert worst_error(actual, inputs, exact, torch.finfo(dtype).eps) < ERROR[dtype]


@pytest.mark.parametrize("grid", [GRID, WHOLE], ids=["grid", "whole"])
@pytest.mark.parametrize(
    ("family", "form"),
    [("logistic", "log_scale"), ("gaussian", "logvar"), ("gaussian", "rho"), ("gaussian", "rho+min_std")],
)
def test_formulas_of_discretized(family: str, form: str, grid: dict[str, float]) -> None:
    """The formulas in torch operations, of which second derivatives are taken. Autograd subtracts what the two ends of a bin
    around the mean give, which the kernels do without."""
    inputs = columns([(x, m, given(s, form)) for x, m, s in rows_of(grid)], torch.float64)
    (names, floor), function = named(form), f"discretized_{family}_log_prob"
    exact = functools.partial(exact_discretized, form=form, logistic=family == "logistic", **grid)
    actual = evaluated(getattr(reference, function), names, inputs, **options_of(grid), **floor)
    eps = torch.finfo(torch.float64).eps
    assert worst_error(actual[:1], inputs, exact, eps) < ERROR[torch.float64]
    assert worst_error(actual, inputs, exact, eps) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["continuous_bernoulli", "discretized_logistic", "discretized_gaussian"])
def test_half_precision_is_computed_in_float32(family: str, dtype: torch.dtype) -> None:
    """The same bits as of the same numbers in float32."""
    generator = torch.Generator().manual_seed(0)
    names = ["x", *likelihoods.LIKELIHOODS[family].inputs[1:3]][: 2 if family == "continuous_bernoulli" else 3]
    inputs = [torch.randn(400, generator=generator).to(dtype) for _ in names]
    function = getattr(elbo_ext, f"{family}_log_prob")
    narrow = evaluated(function, names, inputs)
    wide = evaluated(function, names, [t.float() for t in inputs])
    assert narrow[0].dtype == torch.float32 and torch.equal(narrow[0], wide[0])
    for half, full in zip(narrow[1:], wide[1:], strict=True):
        assert half.dtype == dtype and torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("family", ["logistic", "gaussian"])
def test_the_bins_add_up_to_one(family: str, dtype: torch.dtype) -> None:
    x = torch.linspace(0, 255, 256, dtype=dtype)[:, None]
    mean = torch.tensor([-30.0, 0.2, 100.0, 255.4], dtype=dtype)
    for log_scale in (-3.0, 0.0, 2.0, 5.0):
        scale = {"scale" if family == "logistic" else "std": math.exp(log_scale)}
        function = getattr(elbo_ext, f"discretized_{family}_log_prob")
        mass = function(x, mean, low=0.0, high=255.0, bins=256, batch_dims=2, **scale).exp().sum(0)
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("family", ["logistic", "gaussian"])
def test_extreme_scales(family: str, dtype: torch.dtype, device: str) -> None:
    """A flat distribution: the density times the width of the bin. One without width: 0 in the mean's bin, half on its edge.
    Next to ordinary numbers in the same register, and with gradients that are finite where mathematics has finite ones."""
    form = "log_scale" if family == "logistic" else "log_std"
    s = torch.tensor([100.0, 1000.0, 0.0, -100.0, -100.0, -1000.0, 85.0], dtype=dtype, device=device)
    x = torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0, 1.0, 7.0], dtype=dtype, device=device)
    mean = torch.tensor([0.25, 0.0, 0.0, 3.0, 1.5, 1.0, 0.0], dtype=dtype, device=device)
    name, options = f"discretized_{family}_log_prob", dict(low=None, high=None, batch_dims=1)
    actual = evaluated(getattr(elbo_ext, name), ["x", "mean", form], [x, mean, s], low=None, high=None)
    torch.testing.assert_close(
        actual[0], getattr(reference, name)(x, mean, **{form: s}, **options), rtol=1e-6, atol=1e-6
    )
    peak = math.log(4) if family == "logistic" else math.log(2 * math.pi) / 2
    ordinary = exact_discretized(*map(mp.mpf, (1.0, 0.0, 0.0)), form=form, logistic=family == "logistic", **WHOLE)
    expected = [-100 - peak, -1000 - peak, float(ordinary[0]), 0.0, -math.log(2), 0.0, -85 - peak]
    torch.testing.assert_close(actual[0].cpu(), torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=1e-6)
    assert all(bool(gradient[[0, 1, 2, 3, 5, 6]].isfinite().all()) for gradient in actual[1:])
    expected = [-1.0, -1.0, float(ordinary[3]), 0.0, 0.0, -1.0]
    of_scale = actual[3].cpu()[[0, 1, 2, 3, 5, 6]]
    torch.testing.assert_close(of_scale, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=1e-6)
