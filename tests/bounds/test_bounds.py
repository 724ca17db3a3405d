"""The importance-weighted bound, the free energy and the controls of the KL, against numbers made by hand, by SciPy and
by quadrature."""

import itertools
import math
import pickle
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from elbo_ext import bounds, elbo_loss, gaussian_kl, gaussian_log_prob, rsample
from elbo_ext.bounds import (
    CosineSchedule,
    CyclicalSchedule,
    LinearGaussian,
    LinearSchedule,
    LogisticSchedule,
    balanced_kl,
    capacity,
    free_bits,
    free_energy,
    iwae_bound,
)
from samples import FORMS, LAYOUTS, devices, from_logvar

DOUBLE = torch.float64
INF = math.inf


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Of results on any device."""
    if not isinstance(expected, (tuple, Tensor)):
        expected = torch.as_tensor(expected, dtype=DOUBLE)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False, check_device=False)


# ---- the importance-weighted bound ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_iwae_is_the_log_of_the_mean_weight_along_its_axis(dim: int, device: str) -> None:
    log_weights = 30 * numbers(2, 3, 5)
    axis = dim % 3
    shape = log_weights.shape[:axis] + log_weights.shape[axis + 1 :]
    rows = log_weights.movedim(axis, -1).reshape(-1, log_weights.shape[axis]).tolist()
    with mpmath.workdps(40):
        exact = [float(mpmath.log(sum(mpmath.exp(w) for w in row) / len(row))) for row in rows]
    assert_close(iwae_bound(log_weights.to(device), dim=dim), torch.tensor(exact, dtype=DOUBLE).reshape(shape))


@pytest.mark.parametrize("device", devices())
def test_iwae_by_hand(device: str) -> None:
    """Weights 1 and 3 have the mean 2, whatever they are multiplied with; one sample is its own bound."""
    weights = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=DOUBLE, device=device).log()
    for shift in (0.0, -1000.0, 1000.0):
        assert_close(iwae_bound(weights + shift), torch.full((2,), math.log(2) + shift, dtype=DOUBLE))
    assert torch.equal(iwae_bound(weights[:1]), weights[0])
    assert_close(iwae_bound(weights, reduction="sum"), 2 * math.log(2))
    assert_close(iwae_bound(weights, reduction="mean"), math.log(2))


@pytest.mark.parametrize("device", devices())
def test_iwae_of_samples_without_weight(device: str) -> None:
    log_weights = torch.tensor([[0.0, -INF, -INF], [-INF, -INF, 2.0], [-INF, -INF, -INF]], device=device)
    bound = iwae_bound(log_weights)
    assert_close(bound, torch.tensor([-math.log(3), -INF, 2 - math.log(3)]), 1e-6)  # a zero counts among the K
    assert iwae_bound(log_weights, reduction="mean") == -INF
    assert iwae_bound(torch.tensor([INF, 0.0], device=device)) == INF
    assert iwae_bound(torch.tensor([math.nan, 0.0], device=device)).isnan()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("mode", ["eager", "create_graph", "torch.func", "compiled"])
def test_an_example_without_weight_moves_nothing(mode: str, device: str) -> None:
    """Nor does it disturb the others: its gradient is 0, not 0 / 0."""
    log_weights = torch.tensor([[-INF, 0.0], [-INF, 1.0]], dtype=DOUBLE, device=device)

    def total(v: Tensor) -> Tensor:
        bound = iwae_bound(v)
        return torch.where(bound.isinf(), 0.0, bound).sum()

    if mode == "torch.func":
        gradient = torch.func.grad(total)(log_weights)
    else:
        function = torch.compile(total, backend="aot_eager", fullgraph=True) if mode == "compiled" else total
        leaf = log_weights.requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=mode == "create_graph")
        if mode == "create_graph":
            assert_close(torch.autograd.grad(gradient.square().sum(), leaf)[0][:, 0], torch.zeros(2, dtype=DOUBLE))
    weight = 1 / (1 + math.e)
    assert_close(gradient.detach(), torch.tensor([[0.0, weight], [0.0, 1 - weight]], dtype=DOUBLE))
    one = torch.full((5, 1), -INF, device=device, requires_grad=True)  # an example by itself is a kernel by itself
    assert_close(torch.autograd.grad(iwae_bound(one).sum(), one)[0], torch.zeros(5, 1))


def test_iwae_gradient_is_the_normalized_weights() -> None:
    log_weights = numbers(4, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(iwae_bound(log_weights).sum(), log_weights)
    assert_close(gradient, scipy.special.softmax(log_weights.detach().numpy(), axis=0))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("samples", [1, 2, 17, 300])
@pytest.mark.parametrize("examples", [1, 3, 15, 16, 17, 63, 64, 65, 130, 5000])
def test_iwae_of_every_number_of_examples(examples: int, samples: int, device: str) -> None:
    """Around the seams of the kernels' registers, blocks and threads, against SciPy in float64."""
    for dtype, tolerance in ((torch.float32, 1e-6), (DOUBLE, 1e-14)):
        log_weights = (20 * numbers(samples, examples)).to(dtype).to(device).requires_grad_()
        exact = log_weights.detach().cpu().double().numpy()
        bound = iwae_bound(log_weights)
        (weights,) = torch.autograd.grad(bound, log_weights, torch.full_like(bound, 2.0))
        value, softmax = (
            scipy.special.logsumexp(exact, axis=0) - math.log(samples),
            scipy.special.softmax(exact, axis=0),
        )
        # atol: log-weights are of size 80, and so are the roundings of a difference of two.
        np.testing.assert_allclose(bound.detach().cpu().numpy(), value, rtol=tolerance, atol=10 * tolerance)
        np.testing.assert_allclose(weights.cpu().numpy(), 2 * softmax, rtol=20 * tolerance, atol=tolerance)
        assert torch.equal(iwae_bound(log_weights.detach()), bound.detach())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("examples", [1, 2])
def test_iwae_of_very_many_samples(examples: int, device: str) -> None:
    """20 million equal weights: float32 stops counting at 2^24."""
    count = 20_000_000
    bound = iwae_bound(torch.full((count, 1), 0.25, device=device).expand(count, examples))
    assert_close(bound, torch.full((examples,), 0.25), 1e-6)


@pytest.mark.parametrize("device", devices())
def test_iwae_in_every_layout(device: str) -> None:
    log_weights = numbers(6, 4, 5, 2).to(device)
    for layout in LAYOUTS.values():
        laid_out = layout(log_weights)
        for dim in range(4):
            assert_close(iwae_bound(laid_out, dim=dim), laid_out.logsumexp(dim) - math.log(laid_out.shape[dim]))
    assert iwae_bound(torch.zeros(3, 0)).shape == (0,)


@pytest.mark.parametrize("device", devices())
def test_iwae_of_infinite_weights(device: str) -> None:
    log_weights = torch.tensor([[INF, 0.0, math.nan], [0.0, -INF, 0.0]], device=device)
    expected = torch.tensor([INF, -math.log(2), math.nan], device=device)
    torch.testing.assert_close(iwae_bound(log_weights), expected, equal_nan=True)


@pytest.mark.parametrize("device", devices())
def test_iwae_in_other_ways_of_differentiating(device: str) -> None:
    log_weights = (3 * numbers(4, 3)).to(device).requires_grad_()
    assert torch.autograd.gradcheck(iwae_bound, log_weights, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(iwae_bound, log_weights, check_batched_grad=True)
    hessian = torch.func.hessian(lambda v: iwae_bound(v, reduction="sum"))(log_weights.detach())
    assert_close(hessian, torch.autograd.functional.hessian(lambda v: iwae_bound(v).sum(), log_weights))
    compiled = torch.compile(iwae_bound, backend="aot_eager", fullgraph=True)
    assert_close(compiled(log_weights), iwae_bound(log_weights))
    mapped = numbers(4, 7, 3).to(device)
    assert_close(torch.func.vmap(iwae_bound, in_dims=1)(mapped), iwae_bound(mapped))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (DOUBLE, DOUBLE)]
)
def test_iwae_dtype(dtype: torch.dtype, result: torch.dtype, device: str) -> None:
    """Half precision is summed in float32: 1000 equal weights have the mean of each."""
    bound = iwae_bound(torch.full((1000,), -3.0, dtype=dtype, device=device))
    assert bound.dtype == result
    assert_close(bound, -3.0, 1e-6)


# One latent dimension: q too wide and off its place, so that its weights have a finite variance.
ONE = LinearGaussian(torch.tensor([[0.8], [-0.5]], dtype=DOUBLE), torch.tensor([0.3, 0.1], dtype=DOUBLE), std=0.7)
X1, MU1, STD1 = torch.tensor([1.0, -0.4], dtype=DOUBLE), torch.tensor([0.2], dtype=DOUBLE), 0.9


def log_weights_of_one(noise: Tensor) -> Tensor:
    """ln w for noise of any shape."""
    z = rsample(MU1.expand(*noise.shape, 1), std=STD1, noise=noise.unsqueeze(-1))
    return ONE.log_joint(X1, z) - gaussian_log_prob(z, MU1, std=STD1, batch_dims=noise.dim())


def expected_iwae(samples: int, nodes: int = 60) -> float:
    """E[L_K] by Gauss-Hermite quadrature over the noise of all K samples."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    log_weights = log_weights_of_one(torch.from_numpy(points))
    grid = torch.stack(torch.meshgrid(*[log_weights] * samples, indexing="ij"))
    chances = torch.from_numpy(weights / weights.sum())
    value = iwae_bound(grid)
    for _ in range(samples):
        value = value @ chances
    return value.item()


def test_iwae_rises_from_the_elbo_towards_the_evidence() -> None:
    """Burda et al. 2016, theorem 1: by quadrature over K = 1 to 4 samples, so without any noise."""
    values = [expected_iwae(samples) for samples in (1, 2, 3)] + [expected_iwae(4, nodes=40)]
    assert values[0] == pytest.approx(ONE.elbo(X1, MU1, std=STD1).item(), abs=1e-10)
    for lower, higher in itertools.pairwise([*values, ONE.log_evidence(X1).item()]):
        assert higher > lower + 1e-3


def test_iwae_bias() -> None:
    """ln p(x) - E[L_K] = Var[w] / (2 K p(x)^2) up to terms in 1 / K^2 (Nowozin 2018)."""
    mean, covariance = ONE.posterior(X1)
    posterior, q = scipy.stats.norm(mean.item(), covariance.item() ** 0.5), scipy.stats.norm(MU1.item(), STD1)
    variance = scipy.integrate.quad(lambda z: posterior.pdf(z) ** 2 / q.pdf(z), -12, 12)[0] - 1
    samples = 200
    log_weights = log_weights_of_one(numbers(samples, 20_000)) - ONE.log_evidence(X1)
    # E[w / p(x)] = 1 is known; without the deviation from it the noise is a hundredth of the bias.
    bias = (iwae_bound(log_weights) - (log_weights.exp().mean(0) - 1)).mean().item()
    assert -2 * samples * bias == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(log_weights=[0.0]), TypeError, "log_weights must be a torch.Tensor, got list"),
        (dict(log_weights=torch.zeros(0, 3)), ValueError, "log_weights must have at least one sample along dim 0"),
        (
            dict(log_weights=torch.zeros(3), dim=1),
            ValueError,
            r"dim must be an axis of log_weights, which has shape \(3,\)",
        ),
        (dict(log_weights=torch.zeros(3), dim=-2), ValueError, "dim must be an axis of log_weights"),
        (
            dict(
                log_weights=torch.zeros(()),
            ),
            ValueError,
            "dim must be an axis of log_weights",
        ),
        (dict(log_weights=torch.zeros(3), dim=0.0), TypeError, "dim must be an int, got float"),
        (dict(log_weights=torch.zeros(3).long()), TypeError, "log_weights must have dtype float32"),
        (dict(log_weights=torch.zeros(3), reduction="max"), ValueError, "reduction must be"),
    ],
)
def test_iwae_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        iwae_bound(**arguments)


# ---- free energy ----

RECON, X, MU, LOGVAR = numbers(4, 5, 6)


def free_energy_by_hand() -> np.ndarray:
    """Energy - entropy per example, the energy -ln p(x|z) - ln p(z) averaged over q."""
    recon, x, mu, logvar = (t.numpy() for t in (RECON, X, MU, LOGVAR))
    std = np.exp(logvar / 2)
    energy = -scipy.stats.norm.logpdf(x, recon, 0.5) + (mu**2 + std**2 + np.log(2 * np.pi)) / 2
    return (energy - scipy.stats.norm.entropy(mu, std)).sum(1)


@pytest.mark.parametrize(("reduction", "reduce"), [("none", np.asarray), ("sum", np.sum), ("mean", np.mean)])
def test_free_energy_is_energy_minus_entropy(reduction: str, reduce: Any) -> None:
    actual = free_energy(RECON, X, MU, LOGVAR, recon_std=0.5, reduction=reduction)
    assert_close(actual, reduce(free_energy_by_hand()))


def test_free_energy_is_the_loss() -> None:
    leaves = [t.clone().requires_grad_() for t in (RECON, MU, LOGVAR)]
    recon, mu, logvar = leaves
    actual = torch.autograd.grad(free_energy(recon, X.sigmoid(), mu, logvar, likelihood="bernoulli"), leaves)
    loss = elbo_loss(recon, X.sigmoid(), mu, logvar, likelihood="bernoulli").loss
    for a, b in zip(actual, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


def test_free_energy_has_no_beta() -> None:
    with pytest.raises(ValueError, match="beta must not be given"):
        free_energy(RECON, X, MU, LOGVAR, beta=0.5)


# ---- the two estimators of the KL, and the KL that is minimized ----


def test_the_analytic_kl_has_no_variance() -> None:
    """Monte Carlo agrees within its error, which the analytic KL does not have. In the bound as a whole it need not
    win: at q = posterior every ln w is ln p(x), and reconstruction - KL still fluctuates (Roeder et al. 2017)."""
    mu, covariance = ONE.posterior(X1)
    for mean, std in ((MU1, STD1), (mu, covariance.sqrt().squeeze(-1))):
        z = rsample(mean, std=std, num_samples=20_000, generator=torch.Generator().manual_seed(1))
        samples = gaussian_log_prob(z, mean, std=std) - gaussian_log_prob(z, 0.0)
        error = samples.std() / len(z) ** 0.5
        kl = gaussian_kl(mean, std=std, batch_dims=0)
        assert error > 1e-3
        assert abs(samples.mean() - kl) < 4 * error
        log_weights = ONE.log_joint(X1, z) - gaussian_log_prob(z, mean, std=std)
        analytic = log_weights + samples - kl
        assert analytic.std() > 0.1
        assert abs(analytic.mean() - ONE.elbo(X1, mean, std=std)) < 4 * analytic.std() / len(z) ** 0.5
    assert log_weights.std() < 1e-12  # the last q is the posterior


@pytest.mark.parametrize("side", [-1, 1])
def test_the_exclusive_kl_seeks_a_mode(side: int) -> None:
    """Target 1/2 N(-3, 1/4) + 1/2 N(3, 1/4): from either side the ELBO rises to one component, at a KL of ln 2, and is
    lower at mean 0 and variance 9.25, which the inclusive KL would take. The expectation is a quadrature, with its
    nodes in the place of the noise."""
    points = torch.linspace(-8, 8, 2001, dtype=DOUBLE)
    chances = (-points.square() / 2).softmax(0)
    q = torch.tensor([1.5 * side, 0.0], dtype=DOUBLE, requires_grad=True)  # mu, logvar

    def elbo(q: Tensor) -> Tensor:
        z = rsample(q[:1], q[1:], num_samples=2001, noise=points.unsqueeze(-1))
        modes = [gaussian_log_prob(z, mean, std=0.5) for mean in (-3.0, 3.0)]
        return chances @ (iwae_bound(torch.stack(modes)) - gaussian_log_prob(z, q[:1], q[1:]))

    optimizer = torch.optim.LBFGS([q], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -elbo(q)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert q[0].item() == pytest.approx(3 * side, abs=1e-4)
    assert q[1].exp().item() == pytest.approx(0.25, abs=1e-4)
    assert elbo(q).item() == pytest.approx(-math.log(2), abs=1e-6)
    assert elbo(torch.tensor([0.0, math.log(9.25)], dtype=DOUBLE)).item() < -1.5


# ---- schedules ----


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        (LinearSchedule(100), {0: 0, 25: 0.25, 50: 0.5, 100: 1, 1000: 1}),
        (LinearSchedule(10, 4.0, 2.0), {0: 4, 5: 3, 10: 2, 11: 2}),
        (CosineSchedule(100), {0: 0, 25: 0.5 - 0.5**1.5, 50: 0.5, 75: 0.5 + 0.5**1.5, 100: 1, 200: 1}),
        (LogisticSchedule(2500, 0.0025), {0: 0.0019267346633274757, 2500: 0.5, 2900: 0.7310585786300049, 10**9: 1}),
        (LogisticSchedule(2, 1e9, 1.0, 3.0), {0: 1, 2: 2, 3: 3}),
        (CyclicalSchedule(LinearSchedule(5), 10), {0: 0, 1: 0.2, 5: 1, 9: 1, 10: 0, 13: 0.6, 27: 1}),
        (CyclicalSchedule(CosineSchedule(4, 0.0, 2.0), 6), {0: 0, 2: 1, 4: 2, 5: 2, 6: 0, 8: 1}),
    ],
    ids=str,
)
def test_schedule(schedule: Any, table: dict[int, float]) -> None:
    for step, value in table.items():
        assert schedule(step) == pytest.approx(value, rel=1e-12, abs=1e-15), step
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert type(schedule(3)) is float


def test_schedules_end_exactly() -> None:
    """0.2 + (0.9 - 0.2) is not 0.9."""
    for schedule in (LinearSchedule(3, 0.2, 0.9), CosineSchedule(3, 0.2, 0.9), LogisticSchedule(3, 100.0, 0.2, 0.9)):
        assert schedule(10) == 0.9


def test_a_schedule_is_a_beta() -> None:
    beta = LinearSchedule(4)
    for step, factor in ((0, 0.0), (1, 0.25), (9, 1.0)):
        loss, log_likelihood, kl = elbo_loss(RECON, X, MU, LOGVAR, beta=beta(step))
        assert_close(loss, factor * kl - log_likelihood)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearSchedule(0), ValueError, "steps must be a finite number above 0, got 0"),
        (lambda: CosineSchedule(-1), ValueError, "steps must be a finite number above 0, got -1"),
        (lambda: LinearSchedule(10, INF), ValueError, "start must be a finite number, got inf"),
        (lambda: LinearSchedule("10"), TypeError, "steps must be a number, got str"),
        (lambda: LogisticSchedule(10, 0.0), ValueError, "rate must be a finite number above 0"),
        (lambda: CyclicalSchedule(LinearSchedule(10), 0), ValueError, "period must be a finite number above 0"),
        (lambda: CyclicalSchedule(0.5, 10), TypeError, "schedule must be a function of the step, got float"),
        (lambda: LinearSchedule(10)(-1), ValueError, "step must be a finite number of at least 0, got -1"),
        (lambda: LogisticSchedule(10, 1.0)(math.nan), ValueError, "step must be a finite number"),
        (lambda: CyclicalSchedule(LinearSchedule(1), 2)(-1), ValueError, "step must be a finite number"),
    ],
)
def test_schedule_errors(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- free bits and capacity ----

# Means over the examples: 1, 2, 0.5.
KL = torch.tensor([[0.0, 1.0, 0.5], [2.0, 3.0, 0.5]], dtype=DOUBLE)


def with_gradient(function: Any, kl: Tensor) -> tuple[Tensor, Tensor]:
    kl = kl.clone().requires_grad_()
    value = function(kl)
    return value.detach(), torch.autograd.grad(value.sum(), kl)[0]


def test_free_bits_per_batch() -> None:
    """max(1.5, 1) + max(1.5, 2) + max(1.5, 0.5), and a gradient of the second dimension alone."""
    value, gradient = with_gradient(lambda kl: free_bits(kl, 1.5, per="batch"), KL)
    assert_close(value, 5.0)
    assert_close(gradient, torch.tensor([[0, 0.5, 0], [0, 0.5, 0]]))


def test_free_bits_per_example() -> None:
    value, gradient = with_gradient(lambda kl: free_bits(kl, 1.5, per="example"), KL)
    assert_close(value, torch.tensor([4.5, 6.5]))
    assert_close(gradient, torch.tensor([[0.0, 0, 0], [1, 1, 0]]))


def test_free_bits_of_groups() -> None:
    """Channels, and the whole latent vector; several batch dimensions; a floor for each group."""
    kl = numbers(2, 3, 4, 5).square()
    floor = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=DOUBLE).unsqueeze(-1)
    array, floors = kl.numpy(), floor.numpy()
    assert_close(free_bits(kl, floor, per="example", batch_dims=2), np.maximum(array, floors).sum((2, 3)))
    mean = array.mean((0, 1))
    assert_close(free_bits(kl, floor, per="batch", batch_dims=2), np.maximum(mean, floors).sum())
    assert_close(free_bits(kl[0, 0, 0], 1.0, per="example"), np.maximum(array[0, 0, 0], 1))
    assert_close(free_bits(kl[0, 0, 0], 1.0, per="batch"), max(array[0, 0, 0].mean(), 1))
    assert_close(free_bits(kl[0], 1.0, per="example", batch_dims=0), np.maximum(array[0], 1).sum())
    assert_close(free_bits(kl[0], 1.0, per="batch", batch_dims=0), np.maximum(array[0], 1).sum())


@pytest.mark.parametrize("per", ["example", "batch"])
def test_no_free_bits(per: str) -> None:
    """A floor of zero is the plain KL, with its gradient even where the KL is exactly zero."""
    value, gradient = with_gradient(lambda kl: free_bits(kl, 0.0, per=per).mean(), KL)
    assert_close(value, 3.5)
    assert_close(gradient, torch.full((2, 3), 0.5))


@pytest.mark.parametrize("device", devices())
def test_free_bits_of_a_posterior(device: str) -> None:
    """The KL of each dimension from one kernel, and the result in the loss."""
    recon, x, mu, logvar = (t.to(device) for t in (RECON, X, MU, LOGVAR))
    kl = gaussian_kl(mu, logvar, batch_dims=2)
    assert_close(kl.sum(1), gaussian_kl(MU, LOGVAR))
    for per in ("example", "batch"):
        loss, log_likelihood, controlled = elbo_loss(recon, x, kl=free_bits(kl, 0.3, per=per), beta=0.5)
        floored = kl.clamp(min=0.3).sum(1).mean() if per == "example" else kl.mean(0).clamp(min=0.3).sum()
        assert_close(controlled, floored)
        assert_close(loss, 0.5 * floored - log_likelihood)
    assert free_bits(kl, 0.3, per="example").mean() > free_bits(kl, 0.3, per="batch")  # Jensen's inequality


def test_capacity() -> None:
    kl = torch.tensor([1.0, 4.0, 10.0], dtype=DOUBLE)
    value, gradient = with_gradient(lambda kl: capacity(kl, 4.5, per="example"), kl)
    assert_close(value, torch.tensor([3.5, 0.5, 5.5]))
    assert_close(gradient, torch.tensor([-1.0, -1.0, 1.0]))
    value, gradient = with_gradient(lambda kl: capacity(kl, 4.5, per="batch"), kl)
    assert_close(value, 0.5)
    assert_close(gradient, torch.full((3,), 1 / 3, dtype=DOUBLE))
    assert_close(capacity(kl, torch.tensor([1.0, 2.0, 3.0]), per="example"), torch.tensor([0.0, 2.0, 7.0]))
    rising = LinearSchedule(100, 0.0, 8.0)
    assert_close(elbo_loss(RECON[:3], X[:3], kl=capacity(kl, rising(50), per="example")).kl, 3.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: free_bits(KL, 0.5, per="dimension"), ValueError, "per must be 'batch' or 'example', got 'dimension'"),
        (lambda: capacity(KL, 0.5, per=None), ValueError, "per must be 'batch' or 'example', got None"),
        (lambda: free_bits(KL, -0.5, per="batch"), ValueError, "nats must be a finite number of at least 0, got -0.5"),
        (
            lambda: capacity(KL, math.nan, per="batch"),
            ValueError,
            "nats must be a finite number of at least 0, got nan",
        ),
        (lambda: free_bits(KL, torch.zeros(2), per="batch"), ValueError, r"nats of shape \(2,\) does not broadcast"),
        (
            lambda: free_bits(KL, torch.zeros(2, 1), per="batch"),
            ValueError,
            r"nats of shape \(2, 1\) does not broadcast",
        ),
        (lambda: capacity(KL, torch.zeros(3), per="batch"), ValueError, r"nats of shape \(3,\) does not broadcast"),
        (
            lambda: free_bits(KL, torch.zeros(3, device="meta"), per="batch"),
            ValueError,
            "one device, got kl on cpu and nats on meta",
        ),
        (
            lambda: capacity(KL, torch.zeros((), device="meta"), per="batch"),
            ValueError,
            "one device, got kl on cpu and nats on meta",
        ),
        (lambda: free_bits(KL, 0.5, per="batch", batch_dims=3), ValueError, "batch_dims must be between 0 and 2"),
        (lambda: free_bits([0.5], 0.5, per="batch"), TypeError, "kl must be a torch.Tensor, got list"),
        (lambda: free_bits(KL, "1", per="batch"), TypeError, "nats must be a torch.Tensor or a number, got str"),
    ],
)
def test_control_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- balance ----

POSTERIOR, PRIOR = (numbers(2, 5, 6, seed=seed) for seed in (3, 4))
WEIGHTS = {"posterior_weight": 0.2, "prior_weight": 0.8}


def two_kls(q: list[Tensor], p: list[Tensor], form: str = "logvar", **options: Any) -> Tensor:
    """Dreamer's own way: two KLs, each with a stop-gradient."""

    def kl(q: list[Tensor], p: list[Tensor]) -> Tensor:
        scales = {form: q[1], "prior_" + form: p[1]}
        return gaussian_kl(q[0], prior_mu=p[0], **scales, **options)

    return 0.8 * kl([t.detach() for t in q], p) + 0.2 * kl(q, [t.detach() for t in p])


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("form", FORMS)
def test_balanced_kl(form: str, reduction: str, device: str) -> None:
    q, p = ([mu.clone().to(device), from_logvar(logvar, form).to(device)] for mu, logvar in (POSTERIOR, PRIOR))
    leaves = [t.requires_grad_() for t in (*q, *p)]
    options = {"reduction": reduction, "weight": numbers(6, seed=5).abs().to(device)}
    scales = {form: q[1], "prior_" + form: p[1]}
    value = balanced_kl(q[0], prior_mu=p[0], **scales, **WEIGHTS, **options)
    assert torch.equal(value, gaussian_kl(q[0], prior_mu=p[0], **scales, **options))
    upstream = numbers(*value.shape, seed=6).to(device)
    actual = torch.autograd.grad(value, leaves, upstream)
    expected = torch.autograd.grad(two_kls(q, p, form, **options), leaves, upstream)
    assert all(g.abs().min() > 0 for g in expected)
    assert_close(actual, expected)


def test_balance_of_a_learned_weight_and_of_numbers() -> None:
    """A weight of the elements has the gradient it always had; numbers need none."""
    weight, mu = numbers(6, seed=5).abs().requires_grad_(), MU.clone().requires_grad_()
    value = balanced_kl(mu, 0.3, 0.5, 0.1, weight=weight, **WEIGHTS).sum()
    plain = gaussian_kl(mu, 0.3, 0.5, 0.1, weight=weight).sum()
    (of_mu, of_weight), (plain_mu, plain_weight) = (torch.autograd.grad(v, [mu, weight]) for v in (value, plain))
    assert torch.equal(of_weight, plain_weight)
    assert_close(of_mu, 0.2 * plain_mu)


def test_balance_takes_one_kernel_each_way() -> None:
    leaves = [t.clone().requires_grad_() for t in (*POSTERIOR, *PRIOR)]
    for reduction, kernels in (("none", ["term_sum", "term_sum_backward"]), ("mean", ["term_sum_with_gradients"])):
        with profile(activities=[ProfilerActivity.CPU]) as record:
            balanced_kl(*leaves, **WEIGHTS, reduction=reduction).sum().backward()
        names = [
            event.name.removeprefix("elbo_ext::")
            for event in record.events()
            if event.name.startswith("elbo_ext::term")
        ]
        assert names == kernels


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_balance_in_other_ways_of_differentiating() -> None:
    """grad of grad, forward mode, vmap, compiled: a gradient is that of the KL times 0.2, or 0.8."""
    mu, logvar = POSTERIOR
    prior_mu, prior_logvar = PRIOR

    def kl(mu: Tensor, prior_mu: Tensor, logvar: Tensor = logvar[0], prior_logvar: Tensor = prior_logvar[0]) -> Tensor:
        return balanced_kl(mu, logvar, prior_mu, prior_logvar, batch_dims=0, **WEIGHTS)

    difference = ((mu - prior_mu) / prior_logvar[0].exp()).squeeze()
    gradients = torch.func.vmap(torch.func.grad(kl, argnums=(0, 1)))(mu, prior_mu)
    assert_close(gradients, (0.2 * difference, -0.8 * difference))
    tangent = numbers(6, seed=7)
    _, along = torch.func.jvp(lambda m: kl(m, prior_mu[0]), (mu[0],), (tangent,))
    assert_close(along, 0.2 * difference[0] @ tangent)
    leaf = mu[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl(leaf, prior_mu[0]), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), leaf)
    assert_close(second, 0.2 * 0.2 / prior_logvar[0].exp())  # the gradient depends on mu through the same weight
    compiled = torch.compile(kl, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(leaf, prior_mu[0]), leaf)
    assert_close(gradient, 0.2 * difference[0])


def test_balance_of_one_side() -> None:
    leaves = [t.clone().requires_grad_() for t in (*POSTERIOR, *PRIOR)]
    value = balanced_kl(*leaves, posterior_weight=0.0, prior_weight=1.0).sum()
    of_posterior, of_prior = (torch.autograd.grad(v, leaves) for v in (value, gaussian_kl(*leaves).sum()))
    assert all(bool((g == 0).all()) for g in of_posterior[:2])
    assert_close(of_posterior[2:], of_prior[2:])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(posterior_weight=-0.1), ValueError, "posterior_weight must be a finite number of at least 0, got -0.1"),
        (dict(prior_weight=INF), ValueError, "prior_weight must be a finite number of at least 0, got inf"),
        (dict(prior_weight="1"), TypeError, "prior_weight must be a number, got str"),
        (dict(prior_std=1.0), ValueError, "exactly one of prior_logvar, prior_log_std, prior_std, prior_var"),
        (dict(mu=1.0), TypeError, "mu must be a torch.Tensor, got float"),
    ],
)
def test_balance_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    valid = dict(mu=MU, logvar=LOGVAR, prior_mu=0.0, prior_logvar=0.0, **WEIGHTS)
    with pytest.raises(error, match=message):
        balanced_kl(**{**valid, **changes})


def test_public_names() -> None:
    assert sorted(bounds.__all__) == bounds.__all__
    assert all(getattr(bounds, name).__doc__ for name in bounds.__all__)
    own = [name for name in bounds.__all__ if name != "rsample_with_log_prob"]
    assert {getattr(bounds, name).__module__ for name in own} == {"elbo_ext.bounds"}
    assert b"elbo_ext.bounds" in (pickled := pickle.dumps(LinearSchedule(10))) and b"kl_controls" not in pickled
