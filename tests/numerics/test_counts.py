"""Likelihoods of counts and heavy tails against mpmath, at values and parameters where the usual formulas lose their digits."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import elbo_ext

mp = mpmath.mp
Numbers = dict[str, float]
Truth = Callable[..., Any]


def log_gamma(z: Any) -> Any:
    return mp.loggamma(z)


def poisson(x: Any, rate: Any) -> Any:
    return (x * mp.log(rate) if x else 0) - rate - log_gamma(x + 1)


def negative_binomial(x: Any, mean: Any, theta: Any) -> Any:
    of_mean = x * mp.log(mean / (theta + mean)) if x else 0
    return log_gamma(x + theta) - log_gamma(theta) - log_gamma(x + 1) + theta * mp.log(theta / (theta + mean)) + of_mean


def zinb(x: Any, mean: Any, theta: Any, gate_logits: Any) -> Any:
    gate, count = 1 / (1 + mp.exp(-gate_logits)), negative_binomial(x, mean, theta)
    return mp.log(gate + (1 - gate) * mp.exp(count)) if x == 0 else count - mp.log(1 + mp.exp(gate_logits))


def student_t(x: Any, df: Any, mean: Any, scale: Any) -> Any:
    z2 = ((x - mean) / scale) ** 2
    constant = log_gamma((df + 1) / 2) - log_gamma(df / 2) - mp.log(df * mp.pi) / 2 - mp.log(scale)
    return constant - (df + 1) / 2 * mp.log(1 + z2 / df)


COUNTS = (0.0, 1.0, 2.0, 3.0, 7.5, 30.0, 1000.0, 10_000.0)
MEANS = (1e-4, 0.03, 1.0, 3.1, 40.0, 1e4)
THETAS = (1e-2, 0.3, 1.0, 12.0, 1e3, 1e5, 1e6)
GATES = (-12.0, -1.0, 0.5, 12.0)
GRIDS: dict[str, tuple[str, Truth, dict[str, tuple[float, ...]]]] = {
    "poisson": ("poisson_log_prob", poisson, dict(x=COUNTS, rate=MEANS)),
    "negative_binomial": ("negative_binomial_log_prob", negative_binomial, dict(x=COUNTS, mean=MEANS, theta=THETAS)),
    "zinb": (
        "zero_inflated_negative_binomial_log_prob",
        zinb,
        dict(x=COUNTS[:6], mean=MEANS, theta=THETAS, gate_logits=GATES),
    ),
    "student_t": (
        "student_t_log_prob",
        student_t,
        dict(
            x=(-3.0, 0.2, 1.0, 50.0), df=(0.1, 1.0, 2.5, 30.0, 1e3, 1e6), mean=(0.0, 1.0), scale=(3e-4, 0.1, 1.0, 20.0)
        ),
    ),
}
# By where they are computed: the error over the larger of the value and its attainable size.
LIMITS = {torch.float32: 2e-6, torch.float64: 5e-12}


def derivative(function: Truth, numbers: dict[str, Any], name: str) -> Any:
    """By central differences, which leave 20 digits of 100 where a derivative is differentiated again."""
    h = abs(numbers[name]) * mp.mpf(10) ** -20 or mp.mpf(10) ** -20
    above, below = ({**numbers, name: numbers[name] + sign * h} for sign in (1, -1))
    return (function(**above) - function(**below)) / (2 * h)


def attainable(function: Truth, numbers: dict[str, Any], names: list[str]) -> Any:
    """How far a function moves when its inputs do by their own size: a rounding of an input is worth eps times this."""
    return sum(abs(numbers[name] * derivative(function, numbers, name)) for name in names)


def parts_of_theta(name: str, numbers: dict[str, Any]) -> Any:
    """What cancels in d/dtheta for few counts and a small mean, psi(x + theta) - psi(theta) against x / theta."""
    return numbers["x"] / numbers["theta"] if name == "theta" else 0


def points(grid: dict[str, tuple[float, ...]], dtype: torch.dtype) -> Iterator[Numbers]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, torch.tensor(values, dtype=dtype).tolist(), strict=True))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_grid(name: str, dtype: torch.dtype) -> None:
    """Value and derivatives by all parameters."""
    public, function, grid = GRIDS[name]
    every = list(points(grid, dtype))
    columns = {
        key: torch.tensor([point[key] for point in every], dtype=dtype, requires_grad=key != "x") for key in grid
    }
    value = getattr(elbo_ext, public)(**columns)
    names = [key for key in grid if key != "x"]
    gradients = dict(zip(names, torch.autograd.grad(value.sum(), [columns[key] for key in names]), strict=True))
    with mp.workdps(100):
        for i, point in enumerate(every):
            exact = {key: mp.mpf(number) for key, number in point.items()}
            truth = function(**exact)
            limit = LIMITS[dtype] * max(abs(truth), attainable(function, exact, names))
            assert abs(value[i].item() - truth) <= limit, (point, value[i].item(), float(truth))
            for key in names:

                def slope(key: str = key, **numbers: Any) -> Any:
                    return derivative(function, numbers, key)

                truth = slope(**exact)
                limit = LIMITS[dtype] * max(abs(truth), attainable(slope, exact, names), parts_of_theta(key, exact))
                actual = gradients[key][i].item()
                assert abs(actual - truth) <= limit + 1e-37, (key, point, actual, float(truth))


# ---- limits ----


def value_and_gradients(function: Callable[..., Tensor], **operands: Tensor) -> tuple[Tensor, ...]:
    leaves = {name: t.clone().requires_grad_(name != "x") for name, t in operands.items()}
    value = function(**leaves)
    return (value.detach(), *torch.autograd.grad(value.sum(), [t for name, t in leaves.items() if name != "x"]))


def test_infinite_theta_is_a_poisson() -> None:
    x, mean = torch.tensor([0.0, 1.0, 5.0, 900.0]), torch.tensor([2.5, 0.1, 5.0, 1000.0])
    expected = value_and_gradients(elbo_ext.poisson_log_prob, x=x, rate=mean)
    for theta in (1e12, 1e20, 1e30):
        actual = value_and_gradients(
            elbo_ext.negative_binomial_log_prob, x=x, mean=mean, theta=torch.full_like(x, theta)
        )
        # What cancels is x - mean, compared to which a rounding of the mean is worth as much.
        limit = 1e-6 * (expected[0].abs() + (x - mean).abs())
        assert bool(((actual[0] - expected[0]).abs() <= limit).all())
        torch.testing.assert_close(actual[1], expected[1], rtol=4e-7, atol=0)


def test_infinite_df_is_a_gaussian() -> None:
    x, mean, log_scale = torch.tensor([0.3, -2.0, 7.0]), torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.0, -1.0, 1.0])
    expected = value_and_gradients(
        lambda x, mean, log_scale: elbo_ext.gaussian_log_prob(x, mean, log_std=log_scale),
        x=x,
        mean=mean,
        log_scale=log_scale,
    )
    for df in (1e12, 1e30):
        actual = value_and_gradients(
            lambda x, mean, log_scale, df=df: elbo_ext.student_t_log_prob(x, df, mean, log_scale),
            x=x, mean=mean, log_scale=log_scale,
        )  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_no_counts_of_a_rate_of_zero() -> None:
    zero = torch.zeros(3)
    assert elbo_ext.poisson_log_prob(zero, rate=zero, batch_dims=0).item() == 0
    value, slope = value_and_gradients(elbo_ext.poisson_log_prob, x=zero, rate=zero)
    assert value.tolist() == [0.0] * 3 and slope.tolist() == [-1.0] * 3
    value, slope, of_theta = value_and_gradients(
        elbo_ext.negative_binomial_log_prob, x=zero, mean=zero, theta=torch.full_like(zero, 2.0)
    )
    assert value.tolist() == [0.0] * 3 and slope.tolist() == [-1.0] * 3 and of_theta.tolist() == [0.0] * 3


@pytest.mark.parametrize("logits", [-700.0, -90.0, -1e-7, 0.0, 90.0, 700.0])
def test_extreme_logits(logits: float) -> None:
    """x ln p + theta ln(1 - p) is linear in the logits far out, where neither p nor 1 - p is a number."""
    x, theta = torch.tensor([0.0, 3.0]), torch.tensor([0.7, 0.7])
    value, slope, of_theta = value_and_gradients(
        elbo_ext.negative_binomial_log_prob, x=x, logits=torch.full_like(x, logits), theta=theta
    )
    with mp.workdps(400):
        a, t = mp.mpf(torch.tensor(logits).item()), mp.mpf(theta[0].item())
        p = 1 / (1 + mp.exp(-a))
        for i, k in enumerate((0, 3)):
            constant = mp.loggamma(k + t) - mp.loggamma(t) - mp.loggamma(k + 1)
            assert value[i].item() == pytest.approx(float(constant + t * mp.log(1 - p) + k * mp.log(p)), rel=5e-7)
            assert slope[i].item() == pytest.approx(float(k * (1 - p) - t * p), rel=5e-7, abs=1e-30)
            assert of_theta[i].item() == pytest.approx(
                float(mp.digamma(k + t) - mp.digamma(t) + mp.log(1 - p)), rel=5e-7
            )


def test_gates_that_leave_nothing() -> None:
    """Neither the gate nor the count makes a zero with a probability that float32 can hold: the larger one counts."""
    x, gate = torch.zeros(3), torch.tensor([-200.0, -150.0, -100.0])
    mean, theta = torch.full((3,), 1e30), torch.full((3,), 2.0)
    value, of_mean, of_theta, of_gate = value_and_gradients(
        elbo_ext.zero_inflated_negative_binomial_log_prob, x=x, mean=mean, theta=theta, gate_logits=gate
    )
    count = -2.0 * torch.log1p(mean / theta)
    expected = torch.logaddexp(gate.double(), count.double())
    torch.testing.assert_close(value.double(), expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(of_gate.double(), torch.sigmoid(gate.double() - count.double()), rtol=1e-5, atol=1e-30)
    assert bool(of_mean.isfinite().all() and of_theta.isfinite().all())


@pytest.mark.parametrize("name", ["poisson", "negative_binomial", "zero_inflated_negative_binomial"])
def test_outside_of_the_support(name: str) -> None:
    """Below 0 a count has the probability 0, and no gradient; a weight of 0 leaves it out."""
    x = torch.tensor([-1.0, 2.0, -3.0])
    parameters = [torch.full((3,), 0.5, requires_grad=True) for _ in elbo_ext.likelihoods.LIKELIHOODS[name].inputs[1:]]
    function = getattr(elbo_ext, f"{name}_log_prob")
    value = function(x, *parameters)
    assert value.isneginf().tolist() == [True, False, True]
    for gradient in torch.autograd.grad(value.sum(), parameters):
        assert (gradient == 0).tolist() == [True, False, True]
    alone = function(x[1:2], *(p[1:2] for p in parameters))
    assert torch.equal(function(x, *parameters, weight=x > 0, reduction="sum"), alone.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name, of in elbo_ext.likelihoods.LIKELIHOODS.items() if not of.over_classes])
def test_data_that_are_nan(name: str, dtype: torch.dtype) -> None:
    """Come through, alone and among others, and say nothing about their weight where that is 0."""
    likelihood = elbo_ext.likelihoods.LIKELIHOODS[name]
    x = torch.full((40,), 1.0, dtype=dtype)
    x[::3] = torch.nan
    parameters = [
        torch.full((40,), 0.5, dtype=dtype, requires_grad=True)
        for input in likelihood.inputs[1:]
        if input not in likelihood.numbers
    ]
    function = getattr(elbo_ext, f"{name}_log_prob")
    value = function(x, *parameters, batch_dims=1)
    assert torch.equal(value.isnan(), x.isnan())
    weight = torch.where(x.isnan(), 0.0, 1.0).requires_grad_()
    weighted = function(x, *parameters, weight=weight, reduction="sum")
    torch.testing.assert_close(weighted, value[~x.isnan()].sum())
    for gradient in torch.autograd.grad(weighted, [*parameters, weight]):
        assert bool(gradient.isfinite().all()) and not bool(gradient[::3].any()) and bool(gradient[1::3].any())
