"""Diagnostics, against models whose answer is known and numbers made by hand."""

import math
import weakref
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from elbo_ext import diagnostics, elbo_loss, gaussian_kl, gaussian_log_prob, rsample, rsample_kl
from elbo_ext.bounds import LinearGaussian, iwae_bound
from elbo_ext.diagnostics import (
    active_units,
    aggregate_posterior,
    amortization_gap,
    collapse_report,
    elbo_gap,
    kl_per_dimension,
    log_evidence,
)
from elbo_ext.ops import draw_seed
from samples import devices, seeds_of_the_cpu

DOUBLE = torch.float64
INF = math.inf


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Of results on any device."""
    expected = torch.as_tensor(expected, dtype=None if isinstance(expected, (Tensor, np.ndarray)) else DOUBLE)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, check_device=False)


MODEL = LinearGaussian(numbers(5, 3), numbers(5, seed=1), std=0.9)
X = MODEL.decode(numbers(6, 3, seed=2)) + 0.9 * numbers(6, 5, seed=3)
# The posterior's mean, and as wide as the posterior in its widest direction, so that weights have a variance.
MU = MODEL.posterior(X)[0]
LOGVAR = torch.linalg.eigvalsh(MODEL.posterior(X)[1]).max().log().expand(3)


def log_weights(samples: int, seed: int) -> Tensor:
    z = rsample(MU, LOGVAR, num_samples=samples, generator=torch.Generator().manual_seed(seed))
    return MODEL.log_joint(X, z) - gaussian_log_prob(z, MU, LOGVAR, batch_dims=2)


# ---- the evidence ----


@pytest.mark.parametrize("device", devices())
def test_log_evidence_by_hand(device: str) -> None:
    """Weights 1, 2, 3: mean 2, sample variance 1, (1 + 2 + 3)^2 / (1 + 4 + 9) effective samples; at any size."""
    for shift in (0.0, -1000.0, 1000.0):
        estimate = log_evidence(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE, device=device).log() + shift)
        assert_close(estimate.value, math.log(2) + shift)
        assert_close(estimate.standard_error, (1 / 3) ** 0.5 / 2)
        assert_close(estimate.effective_sample_size, 36 / 14)
        assert_close(estimate.elbo, math.log(6) / 3 + shift)
        assert estimate.num_samples == 3
        assert all(t.device.type == device for t in estimate[:4])


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(
    "sizes", [[5000], [1, 4999], [4999, 1], [1] * 40 + [4960], [700] * 7 + [100]], ids=lambda s: f"{len(s)}-{s[0]}"
)
def test_chunks(sizes: list[int], device: str) -> None:
    """The same numbers however the samples are cut, at scales that rise, fall and jump; by NumPy."""
    samples = 3 * numbers(5000, 4, seed=4)
    samples[:, 1] += torch.linspace(-2000, 0, 5000)
    samples[:, 2] -= torch.linspace(-2000, 0, 5000)
    samples[::7, 3] = -INF
    estimate = log_evidence(samples.to(device).split(sizes))
    log_sum = scipy.special.logsumexp(samples.numpy(), axis=0)
    effective = np.exp(2 * log_sum - scipy.special.logsumexp(2 * samples.numpy(), axis=0))
    weights = np.exp(samples.numpy() - log_sum)
    assert_close(estimate.value, log_sum - math.log(5000))
    assert_close(estimate.effective_sample_size, effective, 1e-9)
    assert_close(estimate.standard_error, weights.std(0, ddof=1) * 5000**0.5, 1e-9)
    assert_close(estimate.elbo, samples.mean(0), 1e-9)
    assert_close(estimate.value, iwae_bound(samples.to(device)))


def test_equal_weights_have_no_error() -> None:
    """At q = posterior all weights are p(x), up to a rounding of their logarithms."""
    noise = 1e-9 * numbers(1000)
    estimate = log_evidence((noise - 700.0).split(100))
    assert_close(estimate.standard_error, (noise - 700.0).std() / 1000**0.5, 1e-18)
    assert_close(estimate.effective_sample_size, 1000.0)
    assert elbo_gap(torch.full((10,), -3.0)) == 0


@pytest.mark.parametrize("device", devices())
def test_weights_of_zero(device: str) -> None:
    zero = torch.full((3, 2), -INF, device=device)
    nothing = log_evidence([zero, zero])
    assert_close(nothing.value, torch.full((2,), -INF, dtype=DOUBLE))
    assert_close(nothing.effective_sample_size, torch.zeros(2, dtype=DOUBLE))
    assert nothing.standard_error.isnan().all()
    one = torch.full((1, 2), -2000.0, device=device)
    for chunks in ([zero, one], [one, zero], [torch.cat([zero, one])]):
        estimate = log_evidence(chunks)
        assert_close(estimate.value, torch.full((2,), -2000 - math.log(4), dtype=DOUBLE))
        assert_close(estimate.effective_sample_size, torch.ones(2, dtype=DOUBLE))
        assert_close(estimate.standard_error, torch.ones(2, dtype=DOUBLE))  # weights 0, 0, 0, 1
        assert (elbo_gap(chunks) == INF).all()
    assert log_evidence([torch.zeros(2), torch.full((1,), INF)]).value == INF
    assert log_evidence([torch.full((1,), INF), torch.zeros(2)]).value == INF
    assert log_evidence(torch.zeros(1)).standard_error.isnan()


def test_the_mean_of_the_weights_is_unbiased() -> None:
    """Over 400 estimates of 50 samples: their mean is p(x) within its error, that of their logarithms is below, and
    they scatter as the standard errors say."""
    truth = MODEL.log_evidence(X)
    estimates = log_evidence(log_weights(50 * 400, seed=5).reshape(50, 400, len(X)))
    ratios = (estimates.value - truth).exp()
    error = ratios.std(0) / 400**0.5
    assert bool(((ratios.mean(0) - 1).abs() < 4 * error).all())
    assert bool((error < 0.05).all())
    assert bool((estimates.value.mean(0) < truth).all())
    assert_close(
        estimates.value.std(0) / estimates.standard_error.square().mean(0).sqrt(), torch.ones(6, dtype=DOUBLE), 0.3
    )
    bias, half_variance = truth - estimates.value.mean(0), estimates.standard_error.square().mean(0) / 2
    assert_close(bias.mean() / half_variance.mean(), 1.0, 0.5)


def test_log_evidence_meets_the_truth() -> None:
    estimate = log_evidence(log_weights(1000, seed) for seed in range(100))
    assert estimate.num_samples == 100_000
    assert bool((estimate.standard_error < 0.01).all())
    assert bool(((estimate.value - MODEL.log_evidence(X)).abs() < 4 * estimate.standard_error).all())
    elbo = MODEL.elbo(X, MU, LOGVAR)
    assert_close(estimate.elbo, elbo, 0.03)
    gap = elbo_gap(log_weights(1000, seed) for seed in range(100))
    assert torch.equal(gap, estimate.value - estimate.elbo)
    assert_close(gap, MODEL.gap(X, MU, LOGVAR), 0.04)
    assert_close(elbo_gap(log_weights(100_000, 0), elbo=elbo), MODEL.gap(X, MU, LOGVAR), 0.03)


def test_chunks_are_gone_before_the_next() -> None:
    """So that memory does not grow with K; nor do graphs, as a generator's chunks are made without gradients."""
    theta = torch.ones((), requires_grad=True)
    made: list[weakref.ref] = []

    def chunks() -> Any:
        for _ in range(5):
            assert all(chunk() is None for chunk in made)
            yield chunk()

    def chunk() -> Tensor:
        values = theta * numbers(10).float()
        assert not values.requires_grad
        made.append(weakref.ref(values))
        return values

    assert log_evidence(chunks()).num_samples == 50


def test_the_gap_is_never_negative() -> None:
    for seed in range(20):
        assert bool((elbo_gap(numbers(3, 100, seed=seed)) >= 0).all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: log_evidence([]), ValueError, "log_weights must have at least one sample, got no chunks"),
        (lambda: log_evidence(torch.zeros(0, 3)), ValueError, "log_weights must have at least one sample along dim 0"),
        (lambda: log_evidence(torch.zeros(())), ValueError, "dim must be an axis of log_weights"),
        (lambda: log_evidence(3.0), TypeError, "log_weights must be a torch.Tensor or an iterable of them, got float"),
        (lambda: log_evidence([1.0]), TypeError, "log_weights must be a torch.Tensor, got float"),
        (
            lambda: log_evidence([torch.zeros(2, 3), torch.zeros(2)]),
            ValueError,
            r"one batch shape .* got \(3,\) and \(\)",
        ),
        (lambda: elbo_gap([]), ValueError, "log_weights must have at least one sample"),
        (
            lambda: elbo_gap(torch.zeros(2, 3), elbo=torch.zeros(2)),
            ValueError,
            r"elbo of shape \(2,\) does not broadcast",
        ),
        (
            lambda: elbo_gap(torch.zeros(2, 3), elbo=torch.zeros(3, device="meta")),
            ValueError,
            "one device, got log_weights on cpu and elbo on meta",
        ),
    ],
)
def test_log_weight_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- what the latent dimensions carry ----


@pytest.mark.parametrize("device", devices())
def test_kl_per_dimension(device: str) -> None:
    mu, logvar, prior_mu = numbers(4, 2, 3), numbers(4, 2, 3, seed=1), numbers(3, seed=2)
    std = (logvar / 2).exp().numpy()
    expected = -np.log(std) + (std**2 + (mu - prior_mu).numpy() ** 2 - 1) / 2
    mu, logvar, prior_mu = (t.to(device) for t in (mu, logvar, prior_mu))
    assert_close(kl_per_dimension(mu, logvar, prior_mu=prior_mu), expected.mean(0))
    assert_close(kl_per_dimension(mu, log_std=logvar / 2, prior_mu=prior_mu, batch_dims=2), expected.mean((0, 1)))
    assert_close(kl_per_dimension(mu, 0.3).sum(), gaussian_kl(mu, 0.3, reduction="mean"))
    assert not kl_per_dimension(mu.requires_grad_(), logvar).requires_grad


@pytest.mark.parametrize("device", devices())
def test_active_units(device: str) -> None:
    """Variances of the means 4/3, 0 and just above or below the threshold; an offset does not matter."""
    mu = torch.tensor([[1.0, 5.0, 0.1], [-1.0, 5.0, -0.1], [1.0, 5.0, 0.1], [-1.0, 5.0, -0.1]], device=device)
    assert active_units(mu).tolist() == [True, False, True]  # 0.04 / 3 > 0.01
    assert active_units(mu, threshold=0.0134).tolist() == [True, False, False]
    assert active_units(mu, threshold=0.0133).tolist() == [True, False, True]
    assert active_units(mu + 1000, threshold=0.0).tolist() == [True, False, True]
    assert active_units(mu.reshape(2, 2, 3), batch_dims=2).tolist() == [True, False, True]
    assert active_units(mu.reshape(2, 2, 3)).shape == (2, 3)


@pytest.mark.parametrize("device", devices())
def test_collapse_report(device: str) -> None:
    """Dimensions: used; collapsed; used by 2 examples of 100; not moved, but narrower than the prior."""
    mu = torch.zeros(100, 4, dtype=DOUBLE)
    logvar = torch.zeros(100, 4, dtype=DOUBLE)
    mu[:, 0] = torch.linspace(-2, 2, 100)
    logvar[:, 0] = -2.0
    mu[:2, 2] = torch.tensor([3.0, -3.0])
    logvar[:, 3] = -1.0
    variance = mu.numpy().var(0, ddof=1)
    mu, logvar = mu.to(device), logvar.to(device)
    report = collapse_report(mu, logvar)
    assert_close(report.kl, gaussian_kl(mu, logvar, batch_dims=2).mean(0))
    assert_close(report.kl[2:], torch.tensor([0.02 * 4.5, 0.5 * (math.exp(-1) - 1 + 1)], dtype=DOUBLE))
    assert_close(report.silent, torch.tensor([0.0, 1.0, 0.98, 0.0], dtype=DOUBLE))
    assert report.collapsed.tolist() == [False, True, False, False]
    assert report.active.tolist() == [True, False, True, False]
    assert_close(report.variance_of_means, variance)
    assert collapse_report(mu, logvar, delta=0.02).collapsed.tolist() == [False, True, True, False]
    assert collapse_report(mu, logvar, epsilon=0.2).collapsed.tolist() == [False, True, False, True]
    assert collapse_report(mu, logvar, threshold=0.5).active.tolist() == [True, False, False, False]
    lines = str(report).splitlines()
    assert [int(line.split()[0]) for line in lines[1:5]] == [0, 3, 2, 1]  # by falling KL
    assert [line.endswith("collapsed  not active") for line in lines[1:5]] == [False, False, False, True]
    assert lines[5].startswith("1 of 4 dimensions collapsed, 2 active")


def test_collapse_needs_float32_digits() -> None:
    """KLs of 1e-9, which the textbook formula makes 0: not below an epsilon of 1e-10."""
    logvar = torch.full((10, 1), 1e-4)
    assert collapse_report(torch.zeros(10, 1), logvar, epsilon=1e-10).collapsed.tolist() == [False]
    assert collapse_report(torch.zeros(10, 1), logvar, epsilon=1e-8).collapsed.tolist() == [True]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("offsets", [[0.0, 0.0], [0.0, 40.0], [0.0, 1.5], [-1.0, 0.2, 2.5]], ids=str)
def test_aggregate_posterior(offsets: list[float], device: str) -> None:
    """One dimension: the mutual information of a mixture's index by quadrature. Equal posteriors have none, disjoint
    ones ln N, all of which the KL of the aggregate is relieved of."""
    stds = np.linspace(0.5, 0.8, len(offsets)) if offsets[1] else np.full(len(offsets), 0.5)
    z = np.linspace(-6, 46, 100_001)
    log_densities = scipy.stats.norm.logpdf(z, np.array(offsets)[:, None], stds[:, None])
    log_aggregate = scipy.special.logsumexp(log_densities, axis=0) - math.log(len(offsets))
    truth = (np.exp(log_densities) * (log_densities - log_aggregate)).mean(0).sum() * (z[1] - z[0])
    mu, std = (torch.from_numpy(t).to(device).unsqueeze(1) for t in (np.array(offsets), stds))
    generator = torch.Generator().manual_seed(0)
    with seeds_of_the_cpu():
        result = aggregate_posterior(mu, std=std, num_samples=1500, generator=generator, prior_std=2.0)
    assert result.mutual_information.item() == pytest.approx(truth, abs=0.03)
    if offsets[1] in (0.0, 40.0):
        assert result.mutual_information.item() == pytest.approx(math.log(2) if offsets[1] else 0, abs=1e-9)
    assert_close(result.kl, gaussian_kl(mu, std=std, prior_std=2.0).mean())
    assert_close(result.mutual_information + result.marginal_kl, result.kl)


def test_aggregate_posterior_of_the_exact_model() -> None:
    """x from the model and q its posterior: the aggregate is the prior, and I is the mean KL; minibatches are below it,
    the smaller the lower, and below ln N."""
    upright = LinearGaussian(torch.linalg.qr(MODEL.weight)[0] * 1.5, MODEL.bias, std=0.9)  # a diagonal posterior
    mean, covariance = upright.posterior(upright.decode(numbers(1024, 3, seed=6)) + 0.9 * numbers(1024, 5, seed=7))
    logvar = covariance.diagonal().log()
    torch.manual_seed(0)
    whole = aggregate_posterior(mean, logvar)
    truth = 1.5 * math.log(1 + 1.5**2 / 0.81)  # 1/2 ln det(I + W^T W / sigma^2)
    assert whole.kl.item() == pytest.approx(truth, abs=0.15)
    assert whole.mutual_information.item() == pytest.approx(truth, abs=0.15)
    assert abs(whole.marginal_kl) < 0.1
    means = [
        torch.stack([aggregate_posterior(part, logvar).mutual_information for part in mean.split(size)]).mean().item()
        for size in (2, 8, 64)
    ]
    assert means[0] < math.log(2)
    assert means == sorted(means)
    assert means[1] + 0.1 < means[2] < whole.mutual_information.item()


@pytest.mark.parametrize("device", devices())
def test_aggregate_posterior_in_blocks(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Latents of two dimensions, a scale of one number, blocks of one row and a half: the same draws, the same
    result."""
    mu = numbers(7, 2, 3).to(device)
    results = []
    for block in (2**21, 10):
        monkeypatch.setattr(diagnostics, "_BLOCK", block)
        torch.manual_seed(0)
        results.append(aggregate_posterior(mu, std=0.5, num_samples=3))
    assert_close(torch.stack(results[0]), torch.stack(results[1]))
    torch.manual_seed(0)
    per_element = aggregate_posterior(mu, std=mu.new_full((7, 1, 1), 0.5), num_samples=3)
    assert_close(torch.stack(per_element), torch.stack(results[0]))
    assert aggregate_posterior(mu[:1], std=0.5).mutual_information == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kl_per_dimension(torch.zeros(0, 3), 0.0), ValueError, "mu must have at least 1 example, got shape"),
        (lambda: kl_per_dimension(torch.zeros(3), 0.0, batch_dims=0), ValueError, "batch_dims must be at least 1"),
        (
            lambda: kl_per_dimension(torch.zeros(2, 3), 0.0, reduction="sum"),
            TypeError,
            "reduction is not an argument here",
        ),
        (lambda: kl_per_dimension(torch.zeros(2, 3)), ValueError, "exactly one of logvar, log_std, std, var, rho"),
        (lambda: active_units(torch.zeros(1, 3)), ValueError, "mu must have at least 2 examples, got shape"),
        (lambda: active_units(torch.zeros(4, 3), batch_dims=3), ValueError, "batch_dims must be between 0 and 2"),
        (
            lambda: active_units(torch.zeros(4, 3), threshold=-1.0),
            ValueError,
            "threshold must be a finite number of at least",
        ),
        (lambda: active_units([0.0]), TypeError, "mu must be a torch.Tensor, got list"),
        (
            lambda: collapse_report(torch.zeros(4, 3), 0.0, epsilon=0.0),
            ValueError,
            "epsilon must be a finite number above 0",
        ),
        (
            lambda: collapse_report(torch.zeros(4, 3), 0.0, delta=1.5),
            ValueError,
            "delta must be a fraction between 0 and 1",
        ),
        (lambda: collapse_report(torch.zeros(4, 3), std=0.0), ValueError, "std must be positive, got 0"),
        (lambda: collapse_report(torch.zeros(1, 3), 0.0), ValueError, "mu must have at least 2 examples"),
        (lambda: aggregate_posterior(torch.zeros(0, 3), 0.0), ValueError, "mu must have at least 1 example"),
        (
            lambda: aggregate_posterior(torch.zeros(4, 3), 0.0, num_samples=0),
            ValueError,
            "num_samples must be at least 1",
        ),
        (lambda: aggregate_posterior(torch.zeros(4, 3), torch.zeros(2, 4, 3)), ValueError, "logvar of shape"),
        (
            lambda: aggregate_posterior(torch.zeros(4, 3), 0.0, batch_dims=2),
            TypeError,
            "batch_dims is not an argument here",
        ),
        (
            lambda: aggregate_posterior(torch.zeros(4, 3), 0.0, prior_mu=torch.zeros(4, 3)),
            ValueError,
            r"prior_mu of shape \(4, 3\) does not broadcast to the shape of one z, \(1, 3\)",
        ),
    ],
)
def test_errors_of_the_latent_dimensions(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- amortization ----


@pytest.mark.parametrize("device", devices())
def test_amortization_gap_of_the_exact_model(device: str) -> None:
    """From a q that ignores x: what is gained is the KL to the posterior, but for that of the best diagonal q."""
    mu, logvar = torch.zeros(6, 3, dtype=DOUBLE), torch.zeros(6, 3, dtype=DOUBLE)
    model, x = LinearGaussian(MODEL.weight.to(device), MODEL.bias.to(device), std=0.9), X.to(device)
    result = amortization_gap(
        lambda mu, logvar: model.elbo(x, mu, logvar), mu.to(device), logvar.to(device), steps=1000, learning_rate=0.05
    )
    best_mu, best_logvar = MODEL.best_diagonal(X)
    assert_close(result.gap, MODEL.gap(X, mu, logvar) - MODEL.gap(X, best_mu, best_logvar), 1e-6)
    assert_close(result.amortized, MODEL.elbo(X, mu, logvar))
    assert_close(result.refined, MODEL.elbo(X, best_mu, best_logvar), 1e-6)
    assert_close(result.mu, best_mu, 1e-3)
    assert_close(result.logvar, best_logvar.expand(6, 3), 1e-3)
    again = amortization_gap(
        lambda mu, logvar: MODEL.elbo(X, mu, logvar), best_mu, best_logvar.expand(6, 3), steps=50, learning_rate=1e-3
    )
    assert_close(again.gap, torch.zeros(6, dtype=DOUBLE), 1e-6)  # nothing is left to gain


def test_amortization_gap_in_inference_mode() -> None:
    """Where its results are used: it differentiates all the same."""
    elbo = lambda mu, logvar: MODEL.elbo(X, mu, logvar)
    expected = amortization_gap(elbo, MU, LOGVAR.expand(6, 3), steps=20)
    with torch.inference_mode():
        result = amortization_gap(elbo, MU.clone(), LOGVAR.expand(6, 3).clone(), steps=20)
    assert_close(result.gap, expected.gap)


@pytest.mark.parametrize("device", devices())
def test_amortization_gap_takes_one_draw(device: str) -> None:
    """For the noise that the bounds before and after share; torch's generators go on from there, those of GPUs as if
    nothing had been."""

    def state() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]

    torch.manual_seed(0)
    leaf = numbers(6, 3).to(device)
    amortization_gap(lambda mu, logvar: -mu.square().sum(1) - logvar.square().sum(1), leaf, leaf, steps=1)
    after = state()
    torch.manual_seed(0)
    draw_seed(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(state(), after, strict=True))


@pytest.mark.parametrize("device", devices())
def test_amortization_gap_leaves_everything_else_alone(device: str) -> None:
    """The encoder's output, the decoder's parameters and their gradients; the result depends on torch's seed."""
    decoder = torch.nn.Linear(3, 5, dtype=DOUBLE, device=device)
    decoder.weight.grad = torch.ones_like(decoder.weight)
    mu, logvar = (t.to(device).requires_grad_() for t in (numbers(6, 3), numbers(6, 3, seed=1)))
    x = X.to(device)
    before = [t.detach().clone() for t in (mu, logvar, *decoder.parameters())]
    calls = []

    def elbo(mu: Tensor, logvar: Tensor) -> Tensor:
        z, kl = rsample_kl(mu, logvar, num_samples=4)
        calls.append(z.detach())
        return -elbo_loss(decoder(z), x, kl=kl, batch_dims=2, reduction="none").loss.mean(0)

    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(amortization_gap(elbo, mu, logvar, steps=60, learning_rate=0.05))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    after = [mu, logvar, *decoder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(decoder.weight.grad, torch.ones_like(decoder.weight))
    assert decoder.bias.grad is None and mu.grad is None
    assert not any(t.requires_grad for t in results[0])
    assert bool((results[0].gap > 0).all())
    # The first and the last bound were computed with one noise, those in between with others.
    noise = [(z - m) / (v / 2).exp() for z, (m, v) in ((calls[0], (mu, logvar)), (calls[61], results[0][3:]))]
    assert_close(noise[0], noise[1], 1e-9)
    assert (calls[1] - calls[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(elbo=0.5), TypeError, "elbo must be a function of mu and logvar, got float"),
        (
            dict(elbo=lambda mu, logvar: torch.zeros(6)),
            ValueError,
            "elbo must return a tensor that depends on mu and logvar",
        ),
        (
            dict(elbo=lambda mu, logvar: MODEL.elbo(X, mu, logvar).sum()),
            ValueError,
            r"elbo must return one bound for each example of mu, of shape \(6, 3\), got shape \(\)",
        ),
        (dict(elbo=lambda mu, logvar: MODEL.elbo(X, mu, logvar)[:2]), ValueError, r"got shape \(2,\)"),
        (dict(elbo=lambda mu, logvar: 1.0), TypeError, r"elbo\(mu, logvar\) must be a torch.Tensor, got float"),
        (dict(logvar=torch.zeros(3)), ValueError, r"logvar must have the shape of mu, \(6, 3\), got \(3,\)"),
        (dict(mu=None), TypeError, "mu must be a torch.Tensor, got NoneType"),
        (dict(steps=0), ValueError, "steps must be at least 1, got 0"),
        (dict(learning_rate=0.0), ValueError, "learning_rate must be a finite number above 0, got 0"),
    ],
)
def test_amortization_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    valid = dict(elbo=lambda mu, logvar: MODEL.elbo(X, mu, logvar), mu=torch.zeros(6, 3), logvar=torch.zeros(6, 3))
    with pytest.raises(error, match=message):
        amortization_gap(**{**valid, **changes})


def test_public_names() -> None:
    assert sorted(diagnostics.__all__) == diagnostics.__all__
    assert all(getattr(diagnostics, name).__doc__ for name in diagnostics.__all__)
