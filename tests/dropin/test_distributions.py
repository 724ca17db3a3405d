"""elbo_ext.distributions, against torch.distributions in float64, scipy.stats, mpmath where torch's formulas fail, draws."""

import copy
import importlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch import distributions as theirs
from torch.distributions import Independent, TransformedDistribution, constraints, kl_divergence

import elbo_ext
from elbo_ext import distributions as ours
from subclasses import Plain, Wrapper, unwrapped

SHAPE = (4, 3)


@pytest.fixture(autouse=True)
def _checks_and_seed() -> Iterator[None]:
    """torch.compile turns torch's default of validate_args off, in whatever test it comes first."""
    theirs.Distribution.set_default_validate_args(True)
    torch.manual_seed(0)
    yield
    theirs.Distribution.set_default_validate_args(True)


def numbers(low: float, high: float, *shape: int, seed: int) -> Tensor:
    draw = torch.rand(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + (high - low) * draw


class ZeroInflated(theirs.Distribution):
    """torch has none: two lines on its negative binomial."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.nonnegative_integer

    def __init__(self, mu: Tensor, theta: Tensor, zi_logits: Tensor) -> None:
        self.counts, self.gate = theirs.NegativeBinomial(theta, logits=(mu / theta).log()), zi_logits.sigmoid()
        super().__init__(self.counts.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        mass = (1 - self.gate) * self.counts.log_prob(value).exp()
        return torch.where(value == 0, self.gate + mass, mass).log()


@dataclass(frozen=True)
class Family:
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    parameters: dict[str, Tensor]
    value: Tensor
    scipy: Callable[..., Any]  # frozen, of NumPy arrays

    def cast(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
        return {name: t.to(dtype) for name, t in self.parameters.items()}, self.value.to(dtype)


LOC, SCALE, REAL = numbers(-1, 1, seed=1), numbers(0.3, 2, seed=2), numbers(-2, 2, seed=3)
LOGITS, PROBS, UNIT = numbers(-3, 3, seed=4), numbers(0.05, 0.95, seed=5), numbers(0, 1, seed=6)
POSITIVE, COUNTS = numbers(0.5, 6, seed=7), numbers(0, 8, seed=8).floor()
BINARY = (UNIT > 0.5).double()
COUNTS[0, 0] = 0.0
NB, ZINB = ours.NegativeBinomial, ours.ZeroInflatedNegativeBinomial

FAMILIES = {
    "normal": Family(
        ours.Normal, theirs.Normal, {"loc": LOC, "scale": SCALE}, REAL, lambda loc, scale: scipy.stats.norm(loc, scale)
    ),
    "normal-logvar": Family(
        ours.Normal.from_logvar,
        lambda loc, logvar: theirs.Normal(loc, (logvar / 2).exp()),
        {"loc": LOC, "logvar": LOGITS},
        REAL,
        lambda loc, logvar: scipy.stats.norm(loc, np.exp(logvar / 2)),
    ),
    "laplace": Family(
        ours.Laplace,
        theirs.Laplace,
        {"loc": LOC, "scale": SCALE},
        REAL,
        lambda loc, scale: scipy.stats.laplace(loc, scale),
    ),
    "student_t": Family(
        ours.StudentT,
        theirs.StudentT,
        {"df": POSITIVE, "loc": LOC, "scale": SCALE},
        REAL,
        lambda df, loc, scale: scipy.stats.t(df, loc, scale),
    ),
    "bernoulli-logits": Family(
        lambda logits: ours.Bernoulli(logits=logits),
        lambda logits: theirs.Bernoulli(logits=logits),
        {"logits": LOGITS},
        BINARY,
        lambda logits: scipy.stats.bernoulli(scipy.special.expit(logits)),
    ),
    "bernoulli-probs": Family(
        ours.Bernoulli, theirs.Bernoulli, {"probs": PROBS}, BINARY, lambda probs: scipy.stats.bernoulli(probs)
    ),
    "continuous_bernoulli-logits": Family(
        lambda logits: ours.ContinuousBernoulli(logits=logits),
        lambda logits: theirs.ContinuousBernoulli(logits=logits),
        {"logits": LOGITS},
        UNIT,
        lambda logits: ContinuousBernoulliOfScipy(logits),
    ),
    "continuous_bernoulli-probs": Family(
        ours.ContinuousBernoulli,
        theirs.ContinuousBernoulli,
        {"probs": PROBS},
        UNIT,
        lambda probs: ContinuousBernoulliOfScipy(scipy.special.logit(probs)),
    ),
    "poisson": Family(ours.Poisson, theirs.Poisson, {"rate": POSITIVE}, COUNTS, lambda rate: scipy.stats.poisson(rate)),
    "negative_binomial-logits": Family(
        lambda total_count, logits: NB(total_count, logits=logits),
        lambda total_count, logits: theirs.NegativeBinomial(total_count, logits=logits),
        {"total_count": POSITIVE, "logits": LOC},
        COUNTS,
        lambda total_count, logits: scipy.stats.nbinom(total_count, scipy.special.expit(-logits)),
    ),
    "negative_binomial-probs": Family(
        NB,
        theirs.NegativeBinomial,
        {"total_count": POSITIVE, "probs": PROBS},
        COUNTS,
        lambda total_count, probs: scipy.stats.nbinom(total_count, 1 - probs),
    ),
    "negative_binomial-mu": Family(
        lambda mu, theta: NB(mu=mu, theta=theta),
        lambda mu, theta: theirs.NegativeBinomial(theta, logits=(mu / theta).log()),
        {"mu": POSITIVE, "theta": SCALE},
        COUNTS,
        lambda mu, theta: scipy.stats.nbinom(theta, theta / (theta + mu)),
    ),
    "zero_inflated_negative_binomial": Family(
        ZINB,
        ZeroInflated,
        {"mu": POSITIVE, "theta": SCALE, "zi_logits": LOGITS},
        COUNTS,
        lambda mu, theta, zi_logits: ZeroInflatedOfScipy(mu, theta, scipy.special.expit(zi_logits)),
    ),
}
CONTINUOUS = ("normal", "laplace", "student_t", "continuous_bernoulli")
WITH_RSAMPLE = [name for name in FAMILIES if name.startswith(CONTINUOUS)]
WITH_KL = [name for name in FAMILIES if not name.startswith(("student_t", "negative", "zero"))]
OF_TORCH = [name for name in FAMILIES if not name.startswith("zero")]


class ContinuousBernoulliOfScipy:
    """An exponential distribution of rate -logits, cut off at 1."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def logpdf(self, x: Any) -> Any:
        rate = abs(self.logits)
        return scipy.stats.truncexpon.logpdf(rate * np.where(self.logits < 0, x, 1 - x), b=rate) + np.log(rate)


class ZeroInflatedOfScipy:
    def __init__(self, mu: Any, theta: Any, gate: Any) -> None:
        self.counts, self.gate = scipy.stats.nbinom(theta, theta / (theta + mu)), gate

    def logpmf(self, x: Any) -> Any:
        return np.log((1 - self.gate) * self.counts.pmf(x) + self.gate * (x == 0))


def leaves(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone().requires_grad_() for name, t in parameters.items()}


def assert_alive(gradients: Any) -> None:
    """No gradient is missing or zero, which a comparison of two wrong ones would not show."""
    for g in gradients:
        assert g is not None and g.isfinite().all() and (g != 0).any()


# ---- log_prob ----


@pytest.mark.parametrize("name", FAMILIES)
def test_log_prob_and_gradients_are_torchs(name: str) -> None:
    family = FAMILIES[name]
    results = []
    for make in (family.ours, family.theirs):
        parameters, value = leaves(family.parameters), family.value.clone()
        value.requires_grad_(name.startswith(CONTINUOUS))
        log_prob = make(**parameters).log_prob(value)
        inputs = [*parameters.values(), *([value] if value.requires_grad else [])]
        results.append((log_prob, torch.autograd.grad((log_prob * torch.arange(12.0).reshape(SHAPE)).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert_alive(results[0][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_log_prob_is_scipys(name: str) -> None:
    family = FAMILIES[name]
    exact = family.scipy(**{name: t.numpy() for name, t in family.parameters.items()})
    exact = getattr(exact, "logpdf", None) or exact.logpmf
    log_prob = family.ours(**family.parameters).log_prob(family.value)
    torch.testing.assert_close(log_prob, torch.as_tensor(exact(family.value.numpy())), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Of half precision too the values are float32; samples and gradients have the parameters' dtype."""
    family = FAMILIES[name]
    parameters, value = family.cast(dtype)
    parameters = leaves(parameters)
    distribution = family.ours(**parameters)
    log_prob = distribution.log_prob(value)
    assert log_prob.dtype is torch.float32
    gradients = torch.autograd.grad(log_prob.sum(), list(parameters.values()))
    assert all(g.dtype is dtype for g in gradients)
    assert_alive(gradients)
    exact = family.theirs(**{k: t.detach().double() for k, t in parameters.items()}).log_prob(value.double())
    # torch makes logits of probs in their own dtype
    tolerance = 5e-6 if dtype is torch.float32 or "probs" not in name else 0.1
    torch.testing.assert_close(log_prob.double(), exact, rtol=tolerance, atol=tolerance)
    assert distribution.sample((2,)).dtype is dtype
    if name in WITH_RSAMPLE:
        assert distribution.rsample().dtype is dtype
    if name in WITH_KL:
        assert kl_divergence(distribution, distribution).dtype is torch.float32
    if name in WITH_RSAMPLE or name.startswith("bernoulli"):
        assert distribution.entropy().dtype is torch.float32


def test_extreme_logits_and_scales() -> None:
    """Where torch's formulas, squares and quotients, leave the dtype."""
    x, tiny = torch.tensor([1e-25, 0.0]), torch.tensor([1e-25, 1e-30])
    exact = theirs.Normal(0.0, tiny.double()).log_prob(x.double()).float()
    torch.testing.assert_close(ours.Normal(0.0, tiny).log_prob(x), exact)
    assert not theirs.Normal(0.0, tiny).log_prob(x).isfinite().any()
    logvar = torch.tensor([-200.0, 200.0])
    torch.testing.assert_close(
        ours.Normal.from_logvar(0.0, logvar).log_prob(torch.zeros(2)), -(logvar + 1.8378770664) / 2
    )


@pytest.mark.parametrize(
    ("total_count", "mean", "x"), [(1e6, 3.0, 5.0), (1e9, 40.0, 30.0), (1e15, 0.5, 2.0), (1e12, 300.0, 310.0)]
)
def test_negative_binomial_of_a_huge_total_count(total_count: float, mean: float, x: float) -> None:
    """In torch ln Gamma(x + total_count) - ln Gamma(total_count) cancels, in float32 from 1e6 on altogether."""
    logits = torch.tensor(mean / total_count, dtype=torch.float64).log()
    with mpmath.workdps(50):
        theta, odds = mpmath.mpf(total_count), mpmath.exp(mpmath.mpf(logits.item()))
        exact = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(mpmath.mpf(x) + 1)
        exact = float(exact - theta * mpmath.log1p(odds) + x * mpmath.log(odds / (1 + odds)))
    value = torch.tensor(x, dtype=torch.float64)
    log_prob = NB(total_count, logits=logits).log_prob(value)
    assert log_prob.item() == pytest.approx(exact, rel=1e-11)
    by_mean = NB(mu=torch.tensor(mean), theta=torch.tensor(total_count)).log_prob(value.float())
    assert by_mean.item() == pytest.approx(exact, rel=1e-5)
    wrong = theirs.NegativeBinomial(torch.tensor(total_count), logits=logits.float()).log_prob(value.float())
    assert abs(wrong.item() - exact) > 0.05


@pytest.mark.parametrize("df", [1e6, 1e12])
def test_student_t_of_many_degrees_of_freedom(df: float) -> None:
    """In torch, in float32, ln Gamma((df + 1) / 2) - ln Gamma(df / 2) has lost its digits."""
    z = 1.5
    df = torch.tensor(df).item()
    with mpmath.workdps(50):
        n = mpmath.mpf(df)
        normalizer = mpmath.loggamma((n + 1) / 2) - mpmath.loggamma(n / 2) - mpmath.log(n * mpmath.pi) / 2
        log_prob = float(normalizer - (n + 1) / 2 * mpmath.log1p(mpmath.mpf(z) ** 2 / n))
        entropy = float((n + 1) / 2 * (mpmath.psi(0, (n + 1) / 2) - mpmath.psi(0, n / 2)) - normalizer)
    distribution, of_torch = ours.StudentT(torch.tensor(df)), theirs.StudentT(torch.tensor(df))
    assert distribution.log_prob(torch.tensor(z)).item() == pytest.approx(log_prob, rel=1e-6)
    assert distribution.entropy().item() == pytest.approx(entropy, rel=1e-6)
    assert abs(of_torch.log_prob(torch.tensor(z)).item() - log_prob) > 0.01
    assert abs(of_torch.entropy().item() - entropy) > 0.01


# ---- shapes, copies, checks ----


@pytest.mark.parametrize("name", OF_TORCH)
def test_shapes_and_attributes_are_torchs(name: str) -> None:
    family = FAMILIES[name]
    parameters, value = family.cast(torch.float32)
    mine, reference = family.ours(**parameters), family.theirs(**parameters)
    assert isinstance(mine, type(reference))
    for attribute in ("batch_shape", "event_shape", "has_rsample", "has_enumerate_support"):
        assert getattr(mine, attribute) == getattr(reference, attribute)
    assert mine.support is reference.support or repr(mine.support) == repr(reference.support)
    if name not in ("normal-logvar", "negative_binomial-mu"):
        assert repr(mine) == repr(reference)
    exact = family.theirs(**{k: t.double() for k, t in parameters.items()})
    for attribute in ("mean", "variance", "stddev"):
        found, expected = getattr(mine, attribute), getattr(exact, attribute).float()
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    rows = {k: t[:1] for k, t in parameters.items()}
    for shapes, values in (
        (parameters, value), (rows, value), (parameters, value[0]), (parameters, value[None].expand(2, 4, 3)),
        ({k: t[0, 0] for k, t in parameters.items()}, value), (parameters, value[0, 0]),
        ({k: t[:, :1] if i else t for i, (k, t) in enumerate(parameters.items())}, value),
        ({k: t[0, 0] for k, t in parameters.items()}, value[0, 0]), ({k: t[:0] for k, t in parameters.items()}, value[:0]),
    ):  # fmt: skip
        mine, reference = family.ours(**shapes), family.theirs(**shapes)
        torch.testing.assert_close(mine.log_prob(values), reference.log_prob(values), rtol=1e-4, atol=1e-4)
        assert mine.batch_shape == reference.batch_shape
        for sample_shape in ((), (5,), (2, 0), (2, 3)):
            assert mine.sample(sample_shape).shape == reference.sample(sample_shape).shape
            if mine.has_rsample:
                assert mine.rsample(sample_shape).shape == (*sample_shape, *mine.batch_shape)
    assert not mine.sample().requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_copies(name: str) -> None:
    """expand, also of an expanded one and of one that has computed what is computed when asked for; pickle; deepcopy."""
    family = FAMILIES[name]
    parameters, value = family.cast(torch.float32)
    distribution = family.ours(**{k: t[0] for k, t in parameters.items()})
    distribution.log_prob(value[0])
    _ = distribution.variance
    expected = distribution.log_prob(value)
    expanded = distribution.expand((4, 3))
    for made in (
        expanded,
        distribution.expand([1, 3]).expand((4, 3)),
        pickle.loads(pickle.dumps(expanded)),
        copy.deepcopy(expanded),
    ):
        assert type(made) is type(distribution)
        assert made.batch_shape == (4, 3) or made.batch_shape == (1, 3)
        torch.testing.assert_close(made.log_prob(value), expected)
        torch.testing.assert_close(made.variance.expand(4, 3), distribution.variance.expand(4, 3))
        assert made.sample().shape == (4, 3)
    by_dimension = Independent(expanded, 1)
    torch.testing.assert_close(by_dimension.log_prob(value), expected.sum(-1))
    assert by_dimension.expand((2, 4)).log_prob(value).shape == (2, 4)


def test_logvar_is_not_exponentiated_for_nothing() -> None:
    """Nothing of from_logvar needs the scale, also where it is expanded."""
    first = ours.Normal.from_logvar(LOC, LOGITS)
    for distribution in (first, first.expand((2, *SHAPE)), first.expand((2, *SHAPE)).expand((5, 2, *SHAPE))):
        distribution.log_prob(distribution.rsample((2,)) + distribution.sample())
        _ = distribution.entropy() + distribution.variance + kl_divergence(distribution, first)
        assert "scale" not in vars(distribution)
    torch.testing.assert_close(first.scale, (LOGITS / 2).exp())
    torch.testing.assert_close(ours.Normal(0.0, first.scale).logvar, LOGITS)


def test_numbers_as_parameters() -> None:
    for mine, reference in (
        (ours.Normal(0, 2.0), theirs.Normal(0, 2.0)),
        (ours.Normal.from_logvar(0.0, 2 * torch.tensor(2.0).log()), theirs.Normal(0, 2.0)),
        (ours.Laplace(0.5, 2), theirs.Laplace(0.5, 2)),
        (ours.StudentT(3), theirs.StudentT(3)),
        (ours.Bernoulli(0.3), theirs.Bernoulli(0.3)),
        (ours.ContinuousBernoulli(logits=1), theirs.ContinuousBernoulli(logits=1)),
        (ours.Poisson(2), theirs.Poisson(2)),
        (NB(2, 0.3), theirs.NegativeBinomial(2, 0.3)),
    ):
        assert mine.batch_shape == reference.batch_shape == ()
        for value in (torch.tensor(1.0), torch.ones(2, 1)):
            torch.testing.assert_close(mine.log_prob(value), reference.log_prob(value))
        assert mine.sample((2,)).shape == (2,)
    assert NB(mu=1, theta=2.0).log_prob(torch.tensor([0, 1])).shape == (2,)  # counts of an integer dtype
    torch.testing.assert_close(ZINB(1.0, 2, 0.0).mean, torch.tensor(0.5))


def test_a_lognormal() -> None:
    parameters = leaves({"loc": LOC, "scale": SCALE})
    mine = TransformedDistribution(ours.Normal(**parameters), [theirs.transforms.ExpTransform()])
    reference = theirs.LogNormal(**parameters)
    x = REAL.exp()
    torch.testing.assert_close(mine.log_prob(x), reference.log_prob(x))
    gradients = [torch.autograd.grad(d.log_prob(x).sum(), list(parameters.values())) for d in (mine, reference)]
    torch.testing.assert_close(*gradients)
    z = mine.rsample((4000,)).detach()
    assert (
        scipy.stats.kstest(z[:, 1, 2].numpy(), scipy.stats.lognorm(SCALE[1, 2], scale=LOC[1, 2].exp()).cdf).pvalue
        > 1e-3
    )
    assert_alive(torch.autograd.grad(mine.rsample().sum(), list(parameters.values())))


@pytest.mark.parametrize("name", FAMILIES)
def test_validate_args(name: str) -> None:
    """Bad values are errors as in torch, with the same words, unless they are not looked at."""
    family = FAMILIES[name]
    parameters, value = family.cast(torch.float32)
    nan = {k: t.clone() for k, t in parameters.items()}
    next(iter(nan.values()))[1, 1] = float("nan")
    bad_value = torch.full_like(value, float("nan"))
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        family.ours(**nan)
    with pytest.raises(ValueError, match="within the support"):
        family.ours(**parameters).log_prob(bad_value)
    with pytest.raises(ValueError, match="not broadcastable"):
        family.ours(**parameters).log_prob(value[:, :2])
    theirs.Distribution.set_default_validate_args(False)
    family.ours(**parameters).log_prob(bad_value)
    family.ours(**nan)


def test_values_are_not_looked_at_elsewhere() -> None:
    """On a GPU a check would wait; the meta device stands for it, where a check is an error."""
    loc = torch.zeros(3, device="meta")
    assert ours.Normal(loc, 1.0).expand((2, 3)).log_prob(loc).is_meta
    assert ours.StudentT(loc).expand((2, 3)).log_prob(loc).is_meta
    with pytest.raises(RuntimeError):
        ours.Normal(loc, 1.0, validate_args=True)


def test_errors() -> None:
    with pytest.raises(TypeError, match="loc must have dtype float32, float64, bfloat16 or float16, got int64"):
        ours.Normal(torch.tensor([1]), torch.tensor([1.0]))
    with pytest.raises(TypeError, match="value must be a torch.Tensor, got float"):
        ours.Normal(0.0, 1.0).log_prob(0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="value must be a torch.Tensor, got float"):
        ours.Poisson(1.0, validate_args=False).log_prob(0.0)  # type: ignore[arg-type]
    for arguments in ({}, {"mu": 1.0}, {"total_count": 1.0}, {"total_count": 1.0, "probs": 0.5, "logits": 0.0},
                      {"mu": 1.0, "theta": 1.0, "probs": 0.5}):  # fmt: skip
        with pytest.raises(
            ValueError, match="total_count must be given beside one of probs and logits, or mu beside theta"
        ):
            NB(**arguments)
    with pytest.raises(ValueError, match="total_count .* to satisfy the constraint"):
        NB(0.0, logits=0.0)
    for make in (ours.Bernoulli, ours.ContinuousBernoulli):
        with pytest.raises(ValueError, match="Either `probs` or `logits`"):
            make()

    class Custom(ours.StudentT):
        def __init__(self) -> None:
            super().__init__(3.0)

    with pytest.raises(NotImplementedError, match="expand"):
        Custom().expand((2,))


# ---- entropy and moments ----


@pytest.mark.parametrize("name", [n for n in FAMILIES if n in WITH_RSAMPLE or n.startswith("bernoulli")])
def test_entropy_and_its_gradient_are_torchs(name: str) -> None:
    family = FAMILIES[name]
    results = []
    for make in (family.ours, family.theirs):
        parameters = leaves(family.parameters)
        entropy = make(**parameters).entropy()
        gradients = torch.autograd.grad(entropy.sum(), list(parameters.values()), allow_unused=True)
        results.append((entropy, [g for g in gradients if g is not None and (g != 0).any()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert_alive(results[0][1])
    assert len(results[0][1]) == len(results[1][1]) > 0


def of_continuous_bernoulli(logits: float) -> tuple[float, float, float]:
    """Mean, variance and entropy."""
    with mpmath.workdps(120):
        a = mpmath.mpf(logits)
        if a == 0:
            return 0.5, 1 / 12, 0.0
        mean = 1 / (1 - mpmath.exp(-a)) - 1 / a
        variance = 1 / a**2 - 1 / (4 * mpmath.sinh(a / 2) ** 2)
        return float(mean), float(variance), float(mpmath.log(mpmath.expm1(a) / a) - a * mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_for_any_logits(dtype: torch.dtype) -> None:
    """torch's mean and density are wrong by 1e-5 around logits of 0, and end at logits of 16, in float32."""
    logits = torch.tensor(
        [0.0, 1e-30, 1e-6, -1e-3, 0.0039, 0.0081, -0.1, 0.5, -1.99, 2.01, -9.0, 15.0, 40.0, -100.0, 1e4, -1e4],
        dtype=dtype,
    )
    eps = torch.finfo(dtype).eps
    logits.requires_grad_()
    distribution = ours.ContinuousBernoulli(logits=logits)
    exact = torch.tensor([of_continuous_bernoulli(a) for a in logits.tolist()], dtype=torch.float64).T
    torch.testing.assert_close(distribution.mean.double(), exact[0], rtol=4 * eps, atol=0)
    torch.testing.assert_close(distribution.variance.double(), exact[1], rtol=20 * eps, atol=0)
    torch.testing.assert_close(distribution.entropy().double(), exact[2], rtol=8 * eps, atol=2 * eps)
    # The mean's derivative is the variance, that of the entropy -logits * variance.
    of_mean, of_entropy = (torch.autograd.grad(t.sum(), logits)[0] for t in (distribution.mean, distribution.entropy()))
    torch.testing.assert_close(of_mean.double(), exact[1], rtol=200 * eps, atol=eps * 1e-2)
    torch.testing.assert_close(of_entropy.double(), -logits.detach().double() * exact[1], rtol=200 * eps, atol=10 * eps)
    x = torch.tensor(0.3, dtype=dtype)
    log_prob = distribution.log_prob(x)
    for a, value in zip(logits.tolist(), log_prob.tolist()):
        with mpmath.workdps(60):
            normalizer = mpmath.log(mpmath.expm1(a) / a) if a else 0
            assert value == pytest.approx(float(mpmath.mpf(x.item()) * a - normalizer), rel=8 * eps, abs=2 * eps)
    if dtype is torch.float32:
        of_torch = theirs.ContinuousBernoulli(logits=logits.detach())
        wrong = (of_torch.mean.double() - exact[0]).abs()
        assert wrong[5] > 1e-6 and wrong[12] > 0.03
        assert (of_torch.log_prob(x) - log_prob).abs()[5] > 1e-6


def test_continuous_bernoulli_distribution_function() -> None:
    """cdf and icdf undo each other, and the derivative of a sample is -dF/d logits / density."""
    logits = torch.tensor(
        [0.0, 1e-8, 1e-3, -0.05, 0.099, -0.101, 1.0, -3.0, 30.0, -80.0], dtype=torch.float64, requires_grad=True
    )
    u = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)[:, None]
    distribution = ours.ContinuousBernoulli(logits=logits)
    x = distribution.icdf(u)
    torch.testing.assert_close(distribution.cdf(x), u.expand_as(x), rtol=1e-11, atol=1e-13)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(distribution.icdf(ends), ends.expand(2, 10), rtol=0, atol=1e-15)
    extreme = torch.tensor([1e4, -1e4], requires_grad=True)
    at_ends = ours.ContinuousBernoulli(logits=extreme).icdf(ends.float())
    torch.testing.assert_close(at_ends, ends.float().expand(2, 2))
    assert (torch.autograd.grad(at_ends.sum(), extreme)[0] == 0).all()
    torch.testing.assert_close(distribution.cdf(ends), ends.expand(2, 10), rtol=0, atol=1e-15)

    def by_mpmath(x: float, a: float) -> tuple[float, float]:
        """F, and dx / da at fixed F."""
        with mpmath.workdps(40):
            if a == 0:
                return x, x * (1 - x) / 2
            x, a = mpmath.mpf(x), mpmath.mpf(a)
            cdf = mpmath.expm1(a * x) / mpmath.expm1(a)
            return float(cdf), float((cdf * mpmath.exp(a - a * x) - x) / a)

    for k, a in enumerate(logits.tolist()):
        for row in (1, 5):
            cdf, slope = by_mpmath(x[row, k].item(), a)
            assert cdf == pytest.approx(u[row].item(), rel=1e-10)
            (gradient,) = torch.autograd.grad(x[row, k], logits, retain_graph=True)
            assert gradient[k].item() == pytest.approx(slope, rel=1e-9), a
    # The same as torch's, where torch's are right.
    outside = torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64)
    of_torch = theirs.ContinuousBernoulli(logits=outside)
    torch.testing.assert_close(ours.ContinuousBernoulli(logits=outside).icdf(u), of_torch.icdf(u))
    torch.testing.assert_close(ours.ContinuousBernoulli(logits=outside).cdf(u), of_torch.cdf(u))


def test_continuous_bernoulli_samples_have_a_gradient_at_zero() -> None:
    """Where torch's is 0."""
    logits = torch.zeros(3, requires_grad=True)
    x = ours.ContinuousBernoulli(logits=logits).rsample((50,))
    (gradient,) = torch.autograd.grad(x.sum(), logits)
    torch.testing.assert_close(gradient, (x * (1 - x) / 2).sum(0).detach())
    (of_torch,) = torch.autograd.grad(theirs.ContinuousBernoulli(logits=logits).rsample((50,)).sum(), logits)
    assert (of_torch == 0).all() and (gradient > 1).all()


def test_moments_of_the_zero_inflated() -> None:
    counts = torch.arange(4000.0, dtype=torch.float64)
    for mu, theta, logits in ((3.0, 0.7, -1.0), (20.0, 5.0, 1.5), (0.2, 2.0, 0.0)):
        distribution = ZINB(*(torch.tensor(t, dtype=torch.float64) for t in (mu, theta, logits)))
        mass = distribution.log_prob(counts).exp()
        mean = (mass * counts).sum()
        torch.testing.assert_close(mass.sum(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(distribution.mean, mean)
        torch.testing.assert_close(distribution.variance, (mass * (counts - mean).square()).sum())
        torch.testing.assert_close(distribution.zi_probs, torch.tensor(logits, dtype=torch.float64).sigmoid())


# ---- samples ----

DRAWS = 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_samples(name: str, dtype: torch.dtype) -> None:
    """By Kolmogorov and Smirnov where they are continuous, else by the frequency of each count; mean and variance within 5
    standard errors."""
    family = FAMILIES[name]
    parameters = {k: t[:1, :2].to(dtype) for k, t in family.parameters.items()}
    distribution = family.ours(**parameters)
    draws = distribution.sample((DRAWS,)).double()
    exact = family.ours(**{k: t.double() for k, t in parameters.items()})
    assert draws.shape == (DRAWS, 1, 2)
    for k in range(2):
        x = draws[:, 0, k]
        if name in WITH_RSAMPLE:
            if dtype is torch.float32:  # else draws are rounded
                cdf = cdf_of(exact, k)
                assert scipy.stats.kstest(x.numpy(), cdf).pvalue > 1e-3
        else:
            support = torch.arange(200.0, dtype=torch.float64)
            mass = exact.log_prob(
                support[:, None, None] if not name.startswith("bernoulli") else support[:2, None, None]
            ).exp()[:, 0, k]
            found = torch.bincount(x.long(), minlength=200)[: len(mass)]
            enough = mass * DRAWS > 10
            rest = DRAWS * (1 - mass[enough].sum())
            error = (found[enough] - DRAWS * mass[enough]).square() / (DRAWS * mass[enough])
            assert scipy.stats.chi2.sf(error.sum().item(), int(enough.sum())) > 1e-3 and rest < DRAWS / 5
        mean, variance = exact.mean[0, k], exact.variance[0, k]
        if not (variance.isfinite() and name != "student_t"):
            continue
        fourth = (x - mean).pow(4).mean()
        rounding = 0 if dtype is torch.float32 else 2e-3
        assert abs(x.mean() - mean) < 5 * (variance / DRAWS).sqrt() + rounding * (1 + mean.abs())
        assert abs((x - mean).square().mean() - variance) < 5 * (fourth / DRAWS).sqrt() + 4 * rounding * (1 + variance)


def cdf_of(distribution: Any, k: int) -> Callable[[Any], Any]:
    if isinstance(distribution, theirs.StudentT):
        return scipy.stats.t(*(t[0, k].item() for t in (distribution.df, distribution.loc, distribution.scale))).cdf
    return lambda x: distribution.cdf(torch.as_tensor(x)[:, None, None].expand(-1, 1, 2))[:, 0, k].numpy()


@pytest.mark.parametrize("name", WITH_RSAMPLE)
def test_gradients_of_samples(name: str) -> None:
    """d E[z^2] / d parameter, by samples and by the moments."""
    family = FAMILIES[name]
    parameters = leaves({k: t[0, 0] for k, t in family.parameters.items()})
    if name == "student_t":
        parameters["df"].data += 8
    distribution = family.ours(**parameters)
    inputs = list(parameters.values())
    expected = torch.autograd.grad(
        (family.theirs(**parameters).variance + family.theirs(**parameters).mean.square()), inputs
    )
    z = distribution.rsample((50, 200))
    groups = torch.stack(
        [torch.stack(torch.autograd.grad(group.square().mean(), inputs, retain_graph=True)) for group in z]
    )
    assert_alive(groups.T)
    error = groups.std(0) / len(groups) ** 0.5
    assert ((groups.mean(0) - torch.stack(expected)).abs() < 4.5 * error + 1e-12).all()


def assert_same_draws(*draws: Callable[[], Tensor]) -> None:
    samples = []
    for draw in draws:
        torch.manual_seed(3)
        samples.append(draw())
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)


def test_the_noise_of_normal_is_the_packages() -> None:
    loc, scale = LOC.float(), SCALE.float()
    normal = ours.Normal(loc, scale)
    assert_same_draws(
        lambda: normal.rsample((2, 5)), lambda: elbo_ext.rsample(loc, std=scale, num_samples=10).view(2, 5, *SHAPE)
    )
    assert_same_draws(normal.sample, lambda: elbo_ext.rsample(loc, std=scale))


@pytest.mark.parametrize("name", [name for name in OF_TORCH if not name.startswith(("normal", "student"))])
def test_the_noise_of_others_is_torchs(name: str) -> None:
    family = FAMILIES[name]
    parameters, _ = family.cast(torch.float32)
    assert_same_draws(*(lambda make=make: make(**parameters).sample((3,)) for make in (family.ours, family.theirs)))


# ---- KL ----


def two(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    family = FAMILIES[name]
    p, q = leaves(family.parameters), leaves({k: t.flip(0) for k, t in family.parameters.items()})
    return p, q


@pytest.mark.parametrize("name", WITH_KL)
def test_kl_and_gradients_are_torchs(name: str) -> None:
    """Of ours and ours, and of ours and torch's, in either place; alone and in Independent."""
    family = FAMILIES[name]
    results = []
    for of_p, of_q in (
        (family.theirs, family.theirs),
        (family.ours, family.ours),
        (family.ours, family.theirs),
        (family.theirs, family.ours),
    ):
        p, q = two(name)
        kl = kl_divergence(of_p(**p), of_q(**q))
        gradients = torch.autograd.grad((kl * torch.arange(12.0).reshape(SHAPE)).sum(), [*p.values(), *q.values()])
        assert_alive(gradients)
        results.append((kl, gradients))
        of_rows = kl_divergence(Independent(of_p(**p), 1), Independent(of_q(**q), 1))
        torch.testing.assert_close(of_rows, kl.sum(-1))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", WITH_KL)
def test_kl_is_the_mean_of_the_log_ratio(name: str) -> None:
    family = FAMILIES[name]
    p, q = (family.ours(**{k: t.detach() for k, t in parameters.items()}) for parameters in two(name))
    x = p.sample((DRAWS,))
    log_ratio = p.log_prob(x) - q.log_prob(x)
    error = log_ratio.std(0) / DRAWS**0.5
    assert ((log_ratio.mean(0) - kl_divergence(p, q)).abs() < 4.5 * error + 1e-12).all()
    assert (kl_divergence(p, p) == 0).all()


def test_kl_of_close_distributions() -> None:
    """To full relative precision, where torch's are 0, negative or noise."""
    d = torch.logspace(-6, -2, 30)
    with mpmath.workdps(60):
        exact = {}
        exact["normal"] = [(mpmath.expm1(mpmath.mpf(t)) - mpmath.mpf(t)) / 2 for t in d.tolist()]
        rate = torch.tensor(3.0) * (1 + d)
        ratios = [mpmath.mpf(t) / 3 for t in rate.tolist()]
        exact["poisson"] = [3 * (r - 1 - mpmath.log(r)) for r in ratios]
        exact["laplace"] = [mpmath.mpf(t) + mpmath.exp(-mpmath.mpf(t)) - 1 for t in d.tolist()]
    found = {
        "normal": kl_divergence(ours.Normal.from_logvar(torch.zeros(30), d), theirs.Normal(0.0, 1.0)),
        "poisson": kl_divergence(ours.Poisson(3.0), ours.Poisson(rate)),
        "laplace": kl_divergence(ours.Laplace(d, 1.0), ours.Laplace(0.0, 1.0)),
    }
    for name, kl in found.items():
        torch.testing.assert_close(
            kl.double(), torch.tensor([float(t) for t in exact[name]], dtype=torch.float64), rtol=2e-6, atol=0
        )
    of_theirs = kl_divergence(theirs.Laplace(d, 1.0), ours.Laplace(0.0, 1.0))
    torch.testing.assert_close(of_theirs, found["laplace"], rtol=0, atol=0)
    wrong = kl_divergence(theirs.Laplace(d, 1.0), theirs.Laplace(0.0, 1.0))
    assert ((wrong - found["laplace"]).abs() > 0.5 * found["laplace"]).any()


def test_kl_at_the_edges() -> None:
    """Rates of 0, probabilities of 0 and 1, logits of any size."""
    zero, two = torch.tensor(0.0), torch.tensor(2.0)
    assert kl_divergence(ours.Poisson(zero), ours.Poisson(two)).item() == 2
    assert kl_divergence(ours.Poisson(two), ours.Poisson(zero)).item() == float("inf")
    assert kl_divergence(ours.Poisson(zero), ours.Poisson(zero)).item() == 0
    p, q = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.3]), torch.tensor([0.0, 0.5, 0.0, 1.0, 1.0, 0.5, 0.7])
    torch.testing.assert_close(
        kl_divergence(ours.Bernoulli(p), ours.Bernoulli(q)),
        kl_divergence(theirs.Bernoulli(p), theirs.Bernoulli(q)),
        atol=1e-6,
        rtol=1e-5,
    )
    # torch's probs have become 0, and its KL infinite
    far = kl_divergence(ours.Bernoulli(logits=torch.zeros(2)), ours.Bernoulli(logits=torch.tensor([-200.0, 200.0])))
    torch.testing.assert_close(far, torch.full((2,), 100 - 0.6931472))
    with mpmath.workdps(60):
        for a, b in ((50.0, -30.0), (-1e3, 2.0), (300.0, 299.0)):
            mean = 1 / (1 - mpmath.exp(-mpmath.mpf(a))) - 1 / mpmath.mpf(a)
            exact = (a - b) * mean - mpmath.log(mpmath.expm1(a) / a) + mpmath.log(mpmath.expm1(b) / b)
            kl = kl_divergence(*(ours.ContinuousBernoulli(logits=torch.tensor(t)) for t in (a, b)))
            assert kl.item() == pytest.approx(float(exact), rel=1e-4, abs=1e-6)


def test_kl_of_other_pairs_is_torchs() -> None:
    for p, q in (("laplace", "normal"), ("bernoulli-logits", "poisson"), ("continuous_bernoulli-logits", "normal")):
        pair = [
            (getattr(FAMILIES[p], k)(**FAMILIES[p].parameters), getattr(FAMILIES[q], k)(**FAMILIES[q].parameters))
            for k in ("ours", "theirs")
        ]
        torch.testing.assert_close(kl_divergence(*pair[0]), kl_divergence(*pair[1]))
    with pytest.raises(NotImplementedError):
        kl_divergence(ours.StudentT(3.0), ours.StudentT(3.0))


# ---- transforms, compilation, subclasses ----


def methods(name: str) -> dict[str, Callable[..., Tensor]]:
    """Of the parameters by position, and last the value."""
    family = FAMILIES[name]
    names = list(family.parameters)

    def distribution(*arguments: Tensor) -> Any:
        return family.ours(**dict(zip(names, arguments)))

    found: dict[str, Callable[..., Tensor]] = {"log_prob": lambda *args: distribution(*args[:-1]).log_prob(args[-1])}
    if name in WITH_RSAMPLE:
        found["rsample"] = lambda *args: distribution(*args[:-1]).rsample((2,))
    if name in WITH_KL:
        found["kl"] = lambda *args: kl_divergence(distribution(*args[:-1]), distribution(*(0.9 * t for t in args[:-1])))
    return found


OF_METHODS = [(name, method) for name in FAMILIES for method in methods(name)]


@pytest.mark.parametrize(("name", "method"), OF_METHODS)
def test_compiled(name: str, method: str) -> None:
    function = methods(name)[method]
    parameters, value = FAMILIES[name].cast(torch.float32)
    arguments = [*leaves(parameters).values(), value]
    torch._dynamo.reset()
    results = []
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        torch.manual_seed(5)
        result = call(*arguments)
        results.append((result, torch.autograd.grad(result.sum(), arguments[:-1])))
    torch.testing.assert_close(*results)
    assert_alive(results[0][1])


def test_compiled_in_independent() -> None:
    """In a first call, too, for which torch has not yet looked for the KL."""
    theirs.kl._KL_MEMOIZE.clear()
    importlib.reload(ours.kl)

    def function(loc: Tensor, logvar: Tensor) -> Tensor:
        posterior = Independent(ours.Normal.from_logvar(loc, logvar), 1)
        return kl_divergence(posterior, Independent(ours.Normal(torch.zeros(3), 1.0), 1)) + posterior.rsample().sum(-1)

    torch._dynamo.reset()
    arguments = LOC.float(), LOGITS.float()
    torch.manual_seed(5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    torch.manual_seed(5)
    torch.testing.assert_close(compiled, function(*arguments))


@pytest.mark.parametrize(("name", "method"), [(n, m) for n, m in OF_METHODS if m != "rsample"])
def test_transforms(name: str, method: str) -> None:
    function = methods(name)[method]
    arguments = (*FAMILIES[name].parameters.values(), FAMILIES[name].value)
    expected = function(*arguments)
    torch.testing.assert_close(torch.func.vmap(function)(*arguments), expected)
    gradients = torch.func.vmap(torch.func.grad(lambda *args: function(*args).sum()))(*arguments)
    by_autograd = leaves(FAMILIES[name].parameters)
    (exact, *_) = torch.autograd.grad(function(*by_autograd.values(), arguments[-1]).sum(), list(by_autograd.values()))
    torch.testing.assert_close(gradients, exact)
    # made outside, where values are checked, and used inside
    distribution = FAMILIES[name].ours(**FAMILIES[name].parameters)
    torch.testing.assert_close(
        torch.func.vmap(distribution.log_prob)(arguments[-1].expand(2, 4, 3)),
        distribution.log_prob(arguments[-1]).expand(2, 4, 3),
    )


@pytest.mark.parametrize("name", WITH_RSAMPLE)
def test_samples_under_vmap(name: str) -> None:
    function = methods(name)["rsample"]
    arguments = (*FAMILIES[name].parameters.values(), FAMILIES[name].value)
    z = torch.func.vmap(function, randomness="different")(*(t[:1].expand(2, 3) for t in arguments))
    assert z.shape == (2, 2, 3) and z.unique().numel() == z.numel()


@pytest.mark.parametrize("wrap", [Wrapper, lambda t: t.as_subclass(Plain)])
@pytest.mark.parametrize(("name", "method"), OF_METHODS)
def test_subclasses_of_tensors(name: str, method: str, wrap: Callable[[Tensor], Tensor]) -> None:
    """All arguments, and each alone, forward and backward."""
    function = methods(name)[method]
    value = FAMILIES[name].value
    for alone in (None, *range(len(FAMILIES[name].parameters))):
        results = []
        for change in (wrap, lambda t: t):
            parameters = list(leaves(FAMILIES[name].parameters).values())
            torch.manual_seed(5)
            result = function(*(change(t) if alone in (None, k) else t for k, t in enumerate(parameters)), value)
            if change is wrap:
                assert type(result) is type(wrap(value))
            results.append(
                (unwrapped(result).as_subclass(Tensor), torch.autograd.grad(unwrapped(result).sum(), parameters))
            )
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert_alive(results[0][1])


# ---- diffusers' posterior ----


class OfDiffusers:
    """The formulas of its DiagonalGaussianDistribution."""

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(logvar, -30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def kl(self, other: "OfDiffusers | None" = None) -> Tensor:
        if other is None:
            return 0.5 * torch.sum(self.mean**2 + self.var - 1.0 - self.logvar, dim=[1, 2, 3])
        difference = (self.mean - other.mean) ** 2 / other.var
        return 0.5 * torch.sum(difference + self.var / other.var - 1.0 - self.logvar + other.logvar, dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: Any = (1, 2, 3)) -> Tensor:
        constant = torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        return 0.5 * torch.sum(constant + self.logvar + (sample - self.mean) ** 2 / self.var, dim=dims)


PACKED = numbers(-3, 3, 2, 8, 5, 4, seed=9)
PACKED[0, 4:6, 0], PACKED[1, 7, 1] = -40.0, 25.0  # beyond the clamp
LATENT = numbers(-1, 1, 2, 4, 5, 4, seed=10)


def test_diagonal_gaussian_is_diffusers() -> None:
    results = []
    for make in (ours.DiagonalGaussian, OfDiffusers):
        packed, other = PACKED.clone().requires_grad_(), PACKED.flip(0).clamp(-3, 3).requires_grad_()
        p, q = make(packed), make(other)
        found = [
            p.kl(),
            p.kl(q),
            p.nll(LATENT * 1e-6),
            p.nll(LATENT, dims=[3, 1]),
            p.nll(LATENT, dims=(-1,)),
            p.mean,
            p.logvar,
            p.std,
            p.var,
        ]
        total = sum(t.sum() for t in found[:2]) + q.nll(LATENT).sum() + q.nll(LATENT, dims=[1]).square().sum()
        results.append((found, torch.autograd.grad(total, [packed, other])))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert_alive(results[0][1])
    assert (results[0][1][0][0, 4:6, 0] == 0).all() and results[0][1][0][1, 7, 1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_diagonal_gaussian_dtypes(dtype: torch.dtype) -> None:
    packed = PACKED.clamp(-3, 3).to(dtype).requires_grad_()
    posterior, exact = ours.DiagonalGaussian(packed), OfDiffusers(packed.detach().double())
    assert posterior.mean.dtype is posterior.std.dtype is posterior.sample().dtype is dtype
    assert posterior.kl().dtype is torch.float32
    torch.testing.assert_close(posterior.kl().double(), exact.kl(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(posterior.kl().sum() + posterior.sample().sum(), packed)
    assert gradient.dtype is dtype
    assert_alive([gradient])


def test_diagonal_gaussian_samples() -> None:
    packed = PACKED.float().requires_grad_()
    posterior = ours.DiagonalGaussian(packed)
    z = posterior.sample(torch.Generator().manual_seed(1))
    assert z.shape == LATENT.shape and not torch.equal(z, posterior.sample())
    torch.testing.assert_close(z, posterior.sample(generator=torch.Generator().manual_seed(1)), rtol=0, atol=0)
    assert_alive(torch.autograd.grad(z.sum(), packed))
    expected = elbo_ext.rsample(posterior.mean, posterior.logvar, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    for seeds in ((1,), (1, 2)):
        of_list = posterior.sample([torch.Generator().manual_seed(seed) for seed in seeds])
        torch.testing.assert_close(of_list[0], z[0])
    many = ours.DiagonalGaussian(torch.tensor([0.5, -1.0]).expand(1, 2).repeat(DRAWS, 1)).sample().double()
    assert (
        scipy.stats.kstest(many[:, 0].numpy(), scipy.stats.norm(0.5, torch.tensor(-0.5).exp().item()).cdf).pvalue > 1e-3
    )
    torch.testing.assert_close(posterior.mode(), posterior.mean)
    # A generator of the CPU for parameters elsewhere, as diffusers' pipelines have it; the meta device stands for a GPU.
    elsewhere = ours.DiagonalGaussian(PACKED.to("meta")).sample(torch.Generator())
    assert elsewhere.is_meta and elsewhere.shape == LATENT.shape


def test_diagonal_gaussian_deterministic() -> None:
    posterior = ours.DiagonalGaussian(PACKED, deterministic=True)
    torch.testing.assert_close(posterior.sample(), posterior.mean, rtol=0, atol=0)
    assert posterior.mode() is posterior.mean and (posterior.std == 0).all() and (posterior.var == 0).all()
    for t in (posterior.kl(), posterior.kl(posterior), posterior.nll(LATENT)):
        torch.testing.assert_close(t, torch.Tensor([0.0]))
    assert (ours.DiagonalGaussian(PACKED).kl(posterior) == float("inf")).all()
    assert (OfDiffusers(PACKED).kl(OfDiffusers(PACKED.flip(0), True)) == float("inf")).all()


def test_diagonal_gaussian_copies_nothing() -> None:
    """Its mean is a view of the packed tensor, whose gradient is written once; KL and sample keep no array of its size."""
    packed = PACKED.float().requires_grad_()
    posterior = ours.DiagonalGaussian(packed)
    assert posterior.mean._base is packed and posterior.mean.data_ptr() == packed.data_ptr()
    assert "std" not in vars(posterior) and "var" not in vars(posterior)
    calls = []

    def counted(step: Callable[[], Any]) -> Any:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = step()
        calls.append({event.key: event.count for event in profile.key_averages()})
        return result

    total = counted(lambda: posterior.kl().sum() + posterior.sample().sum())
    counted(total.backward)
    assert calls[0].keys() & {"aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::exp"} == set()
    assert (
        calls[1]["aten::cat"] == 1 and calls[1].keys() & {"aten::clone", "aten::zeros", "aten::slice_backward"} == set()
    )


def test_diagonal_gaussian_in_every_way() -> None:
    def function(packed: Tensor) -> Tensor:
        posterior = ours.DiagonalGaussian(packed)
        return posterior.kl() + posterior.nll(posterior.sample()) + posterior.std.sum((1, 2, 3))

    packed = PACKED.clamp(-3, 3)
    results = []
    torch._dynamo.reset()
    for call in (
        function,
        torch.compile(function, fullgraph=True, backend="aot_eager"),
        lambda t: function(Wrapper(t))._t,
    ):
        leaf = packed.clone().requires_grad_()
        torch.manual_seed(4)
        value = call(leaf)
        results.append((value, torch.autograd.grad(value.sum(), leaf)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    posterior = ours.DiagonalGaussian(packed)
    for made in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        torch.testing.assert_close(made.kl(), posterior.kl())
    kl = torch.func.vmap(lambda t: ours.DiagonalGaussian(t[None]).kl()[0])(packed)
    torch.testing.assert_close(kl, posterior.kl())


def test_diagonal_gaussian_errors() -> None:
    with pytest.raises(
        ValueError, match=r"parameters must be mean and logvar side by side in an even dim 1, got shape \(2, 3\)"
    ):
        ours.DiagonalGaussian(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="parameters must be mean and logvar"):
        ours.DiagonalGaussian(torch.zeros(2))
    with pytest.raises(TypeError, match="parameters must be a torch.Tensor, got list"):
        ours.DiagonalGaussian([0.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameters must have dtype"):
        ours.DiagonalGaussian(torch.zeros(2, 4, dtype=torch.int64))
