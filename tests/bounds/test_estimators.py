"""The estimators of the bound: what each is the expectation of, exactly, by quadrature over the noise, and by samples; and
how much its gradient varies."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from elbo_ext import bounds, gaussian_log_prob
from elbo_ext.bounds import (
    LinearGaussian,
    dreg,
    iwae,
    rsample_with_log_prob,
    score_function,
    sgvb_a,
    sgvb_b,
    sticking_the_landing,
)
from samples import FORMS, devices, from_logvar, seeds_of_the_cpu

DOUBLE = torch.float64
Estimator = Callable[..., Tensor]


def without_baseline(*args: Any, **options: Any) -> Tensor:
    return score_function(*args, baseline=None, **options)


# Those of the ELBO, and those of the bound of K samples.
OF_ELBO = {
    "sgvb_a": sgvb_a,
    "sgvb_b": sgvb_b,
    "sticking_the_landing": sticking_the_landing,
    "score_function": without_baseline,
    "leave-one-out": score_function,
}
OF_IWAE = {"iwae": iwae, "dreg": dreg}
EVERY = {**OF_ELBO, **OF_IWAE}


def each(estimators: dict[str, Estimator]) -> Any:
    return pytest.mark.parametrize("estimator", estimators.values(), ids=estimators.keys())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def tensors(**values: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=DOUBLE, requires_grad=True) for name, value in values.items()}


# ---- exactly: the expectation over the noise is an integral ----
#
# One latent dimension and two features, so that the expectation over the noise of K samples is an integral over K
# dimensions. Its nodes are the examples of one batch, which are given their noise: the gradient of the weighted sum of
# their bounds is the expectation of the gradient.

X = torch.tensor([0.9, -0.4], dtype=DOUBLE)


def parameters() -> dict[str, Tensor]:
    """Of q, of the prior, and of the decoder x = weight * z + bias + N(0, exp(noise))."""
    return tensors(
        mu=0.4, logvar=-0.9, prior_mu=-0.2, prior_logvar=0.3, weight=[0.8, -0.5], bias=[0.1, 0.2], noise=0.25
    )


def nodes(samples: int, count: int) -> tuple[Tensor, Tensor]:
    """Noise ``[K, count^K, 1]`` and weights ``[count^K]`` of Gauss-Hermite quadrature."""
    points, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(count))
    noise = torch.cartesian_prod(*[points] * samples).reshape(-1, samples)
    weight = torch.cartesian_prod(*[weights / math.sqrt(2 * math.pi)] * samples).reshape(-1, samples).prod(1)
    return noise.mT.unsqueeze(-1), weight


def expected(estimator: Estimator, parameters: dict[str, Tensor], samples: int, count: int, device: str) -> Tensor:
    """The mean over the noise of the estimator on the device, with the mean of its gradient."""
    p = {name: t.to(device) for name, t in parameters.items()}
    noise, weight = (t.to(device) for t in nodes(samples, count))
    x = X.to(device)
    bound = estimator(
        lambda z: gaussian_log_prob(x, p["weight"] * z + p["bias"], p["noise"], batch_dims=2),
        p["mu"].expand(len(weight), 1),
        p["logvar"],
        num_samples=samples,
        noise=noise,
        prior_mu=p["prior_mu"],
        prior_logvar=p["prior_logvar"],
    )
    return (bound @ weight).cpu()


def exact_elbo(p: dict[str, Tensor]) -> Tensor:
    """In closed form, as in a textbook."""
    decoder = Normal(p["weight"] * p["mu"] + p["bias"], (p["noise"] / 2).exp())
    spread = (p["weight"].square() * (p["logvar"] - p["noise"]).exp()).sum() / 2
    q, prior = Normal(p["mu"], (p["logvar"] / 2).exp()), Normal(p["prior_mu"], (p["prior_logvar"] / 2).exp())
    return decoder.log_prob(X).sum() - spread - torch.distributions.kl_divergence(q, prior)


def exact_iwae(p: dict[str, Tensor], samples: int, count: int) -> Tensor:
    """The mean of ln 1/K sum_k w_k over the noise, of log-weights as in a textbook."""
    noise, weight = nodes(samples, count)
    q, prior = Normal(p["mu"], (p["logvar"] / 2).exp()), Normal(p["prior_mu"], (p["prior_logvar"] / 2).exp())
    z = q.mean + q.stddev * noise
    likelihood = Normal(p["weight"] * z + p["bias"], (p["noise"] / 2).exp()).log_prob(X).sum(-1)
    log_weights = likelihood + (prior.log_prob(z) - q.log_prob(z)).squeeze(-1)
    return (log_weights.logsumexp(0) - math.log(samples)) @ weight


def assert_same_mean(estimator: Estimator, truth: Callable[..., Tensor], samples: int, count: int, device: str) -> None:
    p, q = parameters(), parameters()
    actual, exact = expected(estimator, p, samples, count, device), truth(q)
    torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(actual, list(p.values())), torch.autograd.grad(exact, list(q.values()))
    for name, gradient, truth_of_it in zip(p, *gradients, strict=True):
        assert truth_of_it.abs().min() > 1e-3, f"a gradient of 0 would prove nothing: {name}"
        torch.testing.assert_close(gradient, truth_of_it, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("device", devices())
@each({name: estimator for name, estimator in OF_ELBO.items() if name != "leave-one-out"})
def test_one_sample_has_the_mean_of_the_elbo(estimator: Estimator, device: str) -> None:
    """Value and gradient by q, prior and decoder; what the estimators integrate are polynomials, so 20 nodes are exact."""
    assert_same_mean(estimator, exact_elbo, 1, 20, device)


@pytest.mark.parametrize("device", devices())
@each(OF_ELBO)
@pytest.mark.parametrize("samples", [2, 3])
def test_several_samples_have_the_mean_of_the_elbo(estimator: Estimator, samples: int, device: str) -> None:
    assert_same_mean(estimator, exact_elbo, samples, 12, device)


@pytest.mark.parametrize("device", devices())
@each(OF_IWAE)
@pytest.mark.parametrize(("samples", "count"), [(1, 60), (2, 60), (3, 40)])
def test_gradients_of_the_importance_weighted_bound(
    estimator: Estimator, samples: int, count: int, device: str
) -> None:
    """Both have the gradient of the bound of K samples: the second reparameterization adds no bias."""
    assert_same_mean(estimator, lambda p: exact_iwae(p, samples, count), samples, count, device)


def test_one_importance_weight_is_the_elbo() -> None:
    p = parameters()
    torch.testing.assert_close(exact_iwae(p, 1, 20), exact_elbo(p), rtol=1e-12, atol=1e-12)


# ---- by samples, with the kernel's own noise, in three dimensions ----


def model_on(device: str) -> LinearGaussian:
    return LinearGaussian(*(t.to(device) for t in (numbers(5, 3), numbers(5, seed=1), 0.7 * numbers(5, seed=2))))


MODEL = model_on("cpu")
DATA = 2 * numbers(5, seed=3)
MEAN, COVARIANCE = MODEL.posterior(DATA)


def of_repetitions(
    estimator: Estimator, mu: Tensor, logvar: Tensor, *, samples: int, repetitions: int, model: LinearGaussian = MODEL
) -> tuple[Tensor, Tensor]:
    """Bounds ``[repetitions]`` and gradients by mu and logvar, ``[repetitions, 2 * L]``: repetitions are examples.
    Computed on the model's device, with the same noise on each."""
    torch.manual_seed(0)
    x, mu, logvar = (t.to(model.device) for t in (DATA, mu, logvar))
    mu, logvar = (t.expand(repetitions, -1).clone().requires_grad_() for t in (mu, logvar))
    with seeds_of_the_cpu():
        bound = estimator(lambda z: model.log_likelihood(x, z), mu, logvar, num_samples=samples)
    return bound.detach().cpu(), torch.cat(torch.autograd.grad(bound.sum(), (mu, logvar)), -1).cpu()


def assert_mean(values: Tensor, truth: Tensor) -> None:
    """Within 5 standard errors, of values ``[N]`` or ``[N, d]``."""
    error = values.std(0) / len(values) ** 0.5
    assert bool(((values.mean(0) - truth).abs() <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("device", devices())
@each(OF_ELBO)
def test_unbiased_within_the_standard_error(estimator: Estimator, device: str) -> None:
    q = [(MEAN + 0.5).requires_grad_(), (COVARIANCE.diagonal().log() + 0.4).requires_grad_()]
    truth = MODEL.elbo(DATA, *q)
    values, gradients = of_repetitions(
        estimator, *(t.detach() for t in q), samples=4, repetitions=20_000, model=model_on(device)
    )
    assert_mean(values, truth.detach())
    assert_mean(gradients, torch.cat(torch.autograd.grad(truth, q)))


@each(OF_IWAE)
def test_importance_weighted_values_rise_with_the_samples(estimator: Estimator) -> None:
    """ELBO < E[L_2] < E[L_8] < E[L_32] < ln p(x), each step by more than 4 standard errors."""
    last = MODEL.elbo(DATA, MEAN, COVARIANCE.diagonal().log() + 0.4).item()
    for samples in (2, 8, 32):
        values, _ = of_repetitions(
            estimator, MEAN, COVARIANCE.diagonal().log() + 0.4, samples=samples, repetitions=10_000
        )
        error = values.std().item() / 100
        assert values.mean().item() > last + 4 * error
        last = values.mean().item()
    assert last < MODEL.log_evidence(DATA).item() - 4 * error


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("form", FORMS)
@each(EVERY)
def test_forms_of_the_scale(estimator: Estimator, form: str, device: str) -> None:
    """The same q and prior in another form, on another device: the same bound."""

    def bound(form: str, device: str) -> Tensor:
        model, x = model_on(device), DATA.to(device)
        logvar, prior = numbers(1, 3, seed=5), numbers(3, seed=6)
        return estimator(
            lambda z: model.log_likelihood(x, z),
            MEAN.unsqueeze(0).to(device),
            **{form: from_logvar(logvar, form).to(device), "prior_" + form: from_logvar(prior, form).to(device)},
            prior_mu=0.2,
            num_samples=3,
            noise=numbers(3, 1, 3, seed=9).to(device),
        ).cpu()

    torch.testing.assert_close(bound(form, device), bound("logvar", "cpu"), rtol=1e-12, atol=1e-12)


# ---- at the posterior ----

# A decoder with orthogonal columns has a diagonal posterior, which q can be.
COLUMNS = torch.linalg.qr(numbers(5, 3))[0] * torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)
DIAGONAL = LinearGaussian(COLUMNS, std=0.6)


def at_the_posterior() -> tuple[Tensor, Tensor]:
    mean, covariance = DIAGONAL.posterior(DATA)
    torch.testing.assert_close(covariance, covariance.diagonal().diag_embed(), rtol=1e-12, atol=1e-12)
    return mean, covariance.diagonal().log()


@pytest.mark.parametrize("device", devices())
@each({"sticking_the_landing": sticking_the_landing, "dreg": dreg, "leave-one-out": score_function})
def test_gradients_that_vanish_at_the_posterior(estimator: Estimator, device: str) -> None:
    """With every draw, not on average."""
    model = LinearGaussian(COLUMNS.to(device), std=0.6)
    values, gradients = of_repetitions(estimator, *at_the_posterior(), samples=4, repetitions=100, model=model)
    assert gradients.abs().max() < 1e-12
    assert (values - DIAGONAL.log_evidence(DATA)).abs().max() < 1e-12


@each({"sgvb_a": sgvb_a, "sgvb_b": sgvb_b, "iwae": iwae, "score_function": without_baseline})
def test_gradients_that_do_not(estimator: Estimator) -> None:
    _, gradients = of_repetitions(estimator, *at_the_posterior(), samples=4, repetitions=1000, model=DIAGONAL)
    assert (gradients.std(0) > 0.05).all()


def test_sticking_the_landing_leaves_out_what_has_no_mean() -> None:
    """Its gradient is that of sgvb_a minus the score of q, with the same draws."""
    q = MEAN + 0.5, COVARIANCE.diagonal().log() + 0.4
    _, whole = of_repetitions(sgvb_a, *q, samples=1, repetitions=50)
    _, path = of_repetitions(sticking_the_landing, *q, samples=1, repetitions=50)
    torch.manual_seed(0)
    mu, logvar = (t.expand(50, -1).clone().requires_grad_() for t in q)
    z = rsample_with_log_prob(mu, logvar)[0].detach()
    score = torch.cat(torch.autograd.grad(Normal(mu, (logvar / 2).exp()).log_prob(z).sum(), (mu, logvar)), -1)
    torch.testing.assert_close(path - whole, score, rtol=1e-10, atol=1e-10)


# ---- variance ----


def variance(estimator: Estimator, mu: Tensor, logvar: Tensor, samples: int = 4, repetitions: int = 20_000) -> Tensor:
    return of_repetitions(estimator, mu, logvar, samples=samples, repetitions=repetitions, model=DIAGONAL)[1].var(0)


def test_order_of_the_variances() -> None:
    """A standard deviation away from the posterior: score function > with baseline > reparameterized, KL by samples > KL
    in closed form > sticking the landing."""
    mean, logvar = at_the_posterior()
    q = mean + (logvar / 2).exp(), logvar
    order = [without_baseline, score_function, sgvb_a, sgvb_b, sticking_the_landing]
    for noisier, calmer in itertools.pairwise(variance(estimator, *q).mean() for estimator in order):
        assert noisier > 1.2 * calmer


def test_the_baseline_lowers_the_variance_as_one_over_k_does_not() -> None:
    """Averaging K independent samples divides the variance by K; the baseline does better than that."""
    q = MEAN + 0.5, COVARIANCE.diagonal().log()
    one = of_repetitions(without_baseline, *q, samples=1, repetitions=20_000)[1].var(0)
    plain = of_repetitions(without_baseline, *q, samples=8, repetitions=20_000)[1].var(0)
    torch.testing.assert_close(plain, one / 8, rtol=0.15, atol=0)
    assert (of_repetitions(score_function, *q, samples=8, repetitions=20_000)[1].var(0) < plain / 2).all()


def test_where_the_values_vary() -> None:
    """At q = p(z) the two parts of the KL's estimate cancel, so that A and B are one; at the posterior, A is a constant."""
    prior = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    a, b = (of_repetitions(estimator, *prior, samples=2, repetitions=100)[0] for estimator in (sgvb_a, sgvb_b))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    a, b = (
        of_repetitions(estimator, *at_the_posterior(), samples=2, repetitions=1000, model=DIAGONAL)[0].var()
        for estimator in (sgvb_a, sgvb_b)
    )
    assert a < 1e-24 and b > 0.1


def test_signal_to_noise_over_the_number_of_samples() -> None:
    """Rainforth et al. 2018: as 1 / sqrt(K) for the reparameterized gradient; Tucker et al. 2019: as sqrt(K) for DReG."""
    mean, logvar = at_the_posterior()
    q = mean + 0.3 * (logvar / 2).exp(), logvar + 0.1

    def ratio(estimator: Estimator, samples: int) -> float:
        gradients = of_repetitions(estimator, *q, samples=samples, repetitions=20_000, model=DIAGONAL)[1]
        return (gradients.mean(0).norm() / gradients.var(0).sum().sqrt()).item()

    assert ratio(iwae, 64) < ratio(iwae, 4) / 2
    assert ratio(dreg, 64) > 2 * ratio(dreg, 4)


# ---- decoders that cannot be differentiated ----


def test_a_decoder_without_a_derivative() -> None:
    """ln p(x|z) = 3 if z > 0 else 0: E_q is 3 Phi(mu / sigma), its derivative by mu 3 phi(mu / sigma) / sigma. Every other
    estimator sees a derivative of zero."""
    mu, logvar = torch.full((40_000, 1), 0.4, dtype=DOUBLE).requires_grad_(), torch.tensor(-0.6, dtype=DOUBLE)
    sigma = (logvar / 2).exp()
    torch.manual_seed(0)
    bound = score_function(lambda z: 3.0 * (z > 0).double().squeeze(-1), mu, logvar, num_samples=4)
    kl = bounds.sgvb_b(lambda z: torch.zeros(z.shape[:-1], dtype=DOUBLE), mu[:1], logvar, num_samples=1)
    standard = Normal(torch.zeros((), dtype=DOUBLE), 1.0)
    assert_mean(bound.detach(), 3 * standard.cdf(0.4 / sigma) + kl.detach()[0])
    (gradient,) = torch.autograd.grad(bound.sum(), mu)
    truth = 3 * standard.log_prob(0.4 / sigma).exp() / sigma - 0.4
    assert truth.abs() > 0.3
    assert_mean(gradient[:, 0], truth)


# ---- numbers at the edges ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_log_q_of_a_very_small_sigma(dtype: torch.dtype, gradient: str, device: str) -> None:
    """z is mu to the last digit, so that (z - mu) / sigma has nothing left of the noise; log q has all of it."""

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    mu, logvar = tensor([[3.0, -5.0]]).requires_grad_(), tensor([[-80.0, -80.0]]).requires_grad_()
    eps = tensor([[[0.5, -2.0]]])
    z, log_q, _ = rsample_with_log_prob(mu, logvar, num_samples=1, noise=eps, gradient=gradient)
    assert torch.equal(z[0], mu)
    exact = -0.5 * (0.25 + 4.0 - 160.0 + 2 * math.log(2 * math.pi))
    torch.testing.assert_close(log_q, tensor([[exact]]))
    of_mu, of_logvar = torch.autograd.grad(log_q.sum(), (mu, logvar))
    over_sigma = math.exp(40.0)
    truth = {
        "pathwise": ([0.0, 0.0], [-0.5, -0.5]),
        "sticking_the_landing": ([-0.5 * over_sigma, 2.0 * over_sigma], [-0.125, -2.0]),
        "score": ([0.5 * over_sigma, -2.0 * over_sigma], [-0.375, 1.5]),
    }[gradient]
    torch.testing.assert_close(of_mu, tensor([truth[0]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(of_logvar, tensor([truth[1]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", devices())
@each({"iwae": iwae, "dreg": dreg, "score_function": without_baseline})
def test_samples_without_weight(estimator: Estimator, device: str) -> None:
    """ln p(x|z) = -inf everywhere: so is the bound, not NaN."""
    bound = estimator(
        lambda z: z.new_full(z.shape[:-1], -math.inf), torch.zeros(2, 3, device=device), 0.0, num_samples=4
    )
    assert bound.tolist() == [-math.inf] * 2


@pytest.mark.parametrize("device", devices())
def test_a_sample_without_weight_counts_among_the_others(device: str) -> None:
    """Half of the samples at weight zero: the other half has the gradient that it has alone, the bound ln 2 less."""
    model, x, eps = model_on(device), DATA.to(device), numbers(4, 1, 3, seed=5).to(device)
    mu, logvar = numbers(1, 3, seed=6).to(device).requires_grad_(), numbers(1, 3, seed=7).to(device)

    def likelihood(z: Tensor) -> Tensor:
        value = model.log_likelihood(x, z)
        return torch.cat([value[:2], torch.full_like(value[2:], -math.inf)])

    for estimator in (iwae, dreg):
        half = estimator(likelihood, mu, logvar, num_samples=4, noise=eps)
        whole = estimator(lambda z: model.log_likelihood(x, z), mu, logvar, num_samples=2, noise=eps[:2])
        torch.testing.assert_close(half, whole - math.log(2), rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(bound.sum(), mu)[0] for bound in (half, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", devices())
@each(EVERY)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_batches_and_reductions(estimator: Estimator, reduction: str, device: str) -> None:
    """Two batch dimensions and two latent ones, example by example."""
    shapes = (2, 3, 4, 1), (2, 3, 4, 1), (5, 2, 3, 4, 1)
    mu, logvar, eps = (numbers(*shape, seed=seed).to(device) for seed, shape in enumerate(shapes))

    def likelihood(z: Tensor) -> Tensor:
        return -z.square().sum((-2, -1))

    options: dict[str, Any] = dict(num_samples=5, batch_dims=2)
    actual = estimator(likelihood, mu, logvar, noise=eps, reduction=reduction, **options)
    single = [
        estimator(likelihood, mu[i : i + 1, j : j + 1], logvar[i : i + 1, j : j + 1],
                  noise=eps[:, i : i + 1, j : j + 1], **options).reshape(())
        for i in range(2)
        for j in range(3)
    ]  # fmt: skip
    truth = torch.stack(single).reshape(2, 3)
    truth = {"none": truth, "sum": truth.sum(), "mean": truth.mean()}[reduction]
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", devices())
@each(EVERY)
def test_a_bfloat16_decoder(estimator: Estimator, device: str) -> None:
    """log-weights are float32 whatever the decoder computes in."""
    layer = torch.nn.Linear(3, 5).bfloat16().to(device)
    x, mu, logvar = (t.float().to(device) for t in (numbers(7, 5), numbers(7, 3, seed=1), torch.zeros(7, 3)))
    mu = mu.bfloat16().requires_grad_()

    def likelihood(z: Tensor) -> Tensor:
        return gaussian_log_prob(x, layer(z.bfloat16()), batch_dims=2)

    bound = estimator(likelihood, mu, logvar.bfloat16(), num_samples=2)
    assert bound.dtype == torch.float32
    bound.sum().backward()
    assert mu.grad is not None and mu.grad.dtype == torch.bfloat16 and bool((mu.grad != 0).any())
    assert bool((layer.weight.grad != 0).any())


@pytest.mark.parametrize("device", devices())
@each(EVERY)
def test_other_ways_of_differentiating(estimator: Estimator, device: str) -> None:
    """torch.func.grad, and compiled in one graph: the gradient of eager autograd."""
    model, x = model_on(device), DATA.to(device)
    mu, logvar, eps = (numbers(*shape, seed=seed).to(device) for seed, shape in enumerate([(2, 3), (2, 3), (4, 2, 3)]))

    def bound(mu: Tensor) -> Tensor:
        return estimator(lambda z: model.log_likelihood(x, z), mu, logvar, num_samples=4, noise=eps, reduction="sum")

    leaf = mu.clone().requires_grad_()
    (truth,) = torch.autograd.grad(bound(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(bound)(mu), truth, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
    compiled = torch.compile(bound, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], truth, rtol=1e-12, atol=1e-12)


def test_dreg_has_no_forward_mode() -> None:
    with pytest.raises(RuntimeError, match="dreg is an estimator of gradients, and has no forward-mode derivative"):
        torch.func.jvp(lambda mu: dreg(lambda z: z.sum(-1), mu, 0.0, num_samples=2), (numbers(2, 3),), (numbers(2, 3),))


# ---- bad arguments ----

MU = torch.zeros(2, 3)


def likelihood(z: Tensor) -> Tensor:
    return z.sum(-1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
        (dict(num_samples=2.0), TypeError, "num_samples must be an int, got float"),
        (dict(log_likelihood=3), TypeError, "log_likelihood must be a function of z, got int"),
        (dict(log_likelihood=lambda z: 1.0), TypeError, r"log_likelihood\(z\) must be a torch.Tensor, got float"),
        (
            dict(log_likelihood=lambda z: z),
            ValueError,
            r"one number for each sample and example, shape \(4, 2\), got \(4, 2, 3\)",
        ),
        (dict(log_likelihood=lambda z: z.sum()), ValueError, r"shape \(4, 2\), got \(\)"),
        (dict(reduction="average"), ValueError, "reduction must be 'none', 'sum' or 'mean', got 'average'"),
        (dict(std=-1.0, logvar=None), ValueError, "std must be positive, got -1.0"),
        (dict(logvar=None), ValueError, "exactly one of logvar, log_std, std, var, rho must be given, got none"),
        (dict(batch_dims=3), ValueError, "batch_dims must be between 0 and 2"),
        (dict(mu=[0.0]), TypeError, "mu must be a torch.Tensor, got list"),
        (dict(beta=2.0), TypeError, "beta"),
    ],
)
def test_errors(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"log_likelihood": likelihood, "mu": MU, "logvar": MU, "num_samples": 4, **change}
    if "batch_dims" in change:
        given["log_likelihood"] = lambda z: z
    with pytest.raises(error, match=message):
        EVERY[name](**given)


def test_errors_of_the_baseline() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 2 with baseline='leave-one-out', got 1"):
        score_function(likelihood, MU, MU, num_samples=1)
    with pytest.raises(ValueError, match="baseline must be 'leave-one-out', got 'mean'"):
        score_function(likelihood, MU, MU, num_samples=2, baseline="mean")


@pytest.mark.parametrize("estimator", EVERY.values(), ids=EVERY.keys())
def test_a_masked_step_does_not_count(estimator: Estimator) -> None:
    """A latent that kl_weight leaves out, and that the decoder does not look at, changes neither the bound nor a gradient."""
    mask = torch.tensor([True, True, False])
    noise = numbers(4, 5, 3)

    def results(columns: int, **options: Any) -> tuple[Tensor, ...]:
        q = {"mu": numbers(5, 3, seed=1), "logvar": numbers(5, 3, seed=2), "prior_mu": numbers(3, seed=3)}
        q = {name: t[..., :columns].clone().requires_grad_() for name, t in q.items()}
        bound = estimator(
            lambda z: -(z[..., :2] - 1).square().sum(-1), **q, num_samples=4, noise=noise[..., :columns], **options
        )
        return bound, *(g[..., :2] for g in torch.autograd.grad(bound.sum(), list(q.values())))

    torch.testing.assert_close(results(3, kl_weight=mask), results(2), rtol=1e-12, atol=1e-12)
