"""The model whose bound is known: its closed forms against SciPy, and the theorems about the bound on it."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from elbo_ext import elbo_loss, gaussian_log_prob, rsample
from elbo_ext.bounds import LinearGaussian, iwae_bound
from samples import FORMS, devices, from_logvar, seeds_of_the_cpu

DOUBLE = torch.float64
EXACT = 1e-10
FEATURES, LATENTS, EXAMPLES = 5, 3, 7


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


W, B, LOGVAR = numbers(FEATURES, LATENTS), numbers(FEATURES, seed=1), 0.7 * numbers(FEATURES, seed=2)
X = 2 * numbers(EXAMPLES, FEATURES, seed=3)
MODELS = {
    "factor analysis": LinearGaussian(W, B, LOGVAR),
    "probabilistic PCA": LinearGaussian(W, B, std=0.6),
    "little noise": LinearGaussian(W, B, std=1e-4),
    "more latents than features": LinearGaussian(numbers(2, 3, seed=4), B[:2], std=0.6),
}


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "-"))
def model(request: Any) -> LinearGaussian:
    return MODELS[request.param]


def data(model: LinearGaussian) -> Tensor:
    return X[:, : len(model.bias)]


def moved(model: LinearGaussian, device: str) -> LinearGaussian:
    return LinearGaussian(model.weight.to(device), model.bias.to(device), std=model.std.to(device))


def random_q(covariance: str, seed: int) -> dict[str, Tensor]:
    """A q for each example, with one covariance per example."""
    mu = numbers(EXAMPLES, LATENTS, seed=seed)
    if covariance == "diagonal":
        return dict(mu=mu, logvar=numbers(EXAMPLES, LATENTS, seed=seed + 1))
    root = numbers(EXAMPLES, LATENTS, LATENTS, seed=seed + 1)
    return dict(mu=mu, covariance=root @ root.mT + 0.05 * torch.eye(LATENTS, dtype=DOUBLE))


def full(q: dict[str, Tensor]) -> np.ndarray:
    return (q["covariance"] if "covariance" in q else torch.diag_embed(q["logvar"].exp())).numpy()


def assert_close(actual: Any, expected: Any, tolerance: float = EXACT) -> None:
    """Of results on any device."""
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=tolerance, atol=tolerance, check_device=False)


def cancelled(evidence: Tensor) -> float:
    """What a difference of two bounds may be off: with little noise they are of size 1e9."""
    return 1e-10 + 1e-14 * evidence.abs().max().item()


# Where textbook formulas, which invert the covariance of x, keep their digits.
TAME = [MODELS[name] for name in ("factor analysis", "probabilistic PCA", "more latents than features")]


def joint_covariance(model: LinearGaussian) -> tuple[np.ndarray, np.ndarray]:
    """Of z and x: the blocks Cov(z, x) and Var(x)."""
    weight = model.weight.numpy()
    return weight.T, weight @ weight.T + np.diag(model.std.numpy() ** 2)


def textbook_kl(mean: np.ndarray, covariance: np.ndarray, to_mean: np.ndarray, to_covariance: np.ndarray) -> float:
    """KL of two full Gaussians, by determinants and inverses."""
    inverse = np.linalg.inv(to_covariance)
    distance = to_mean - mean
    logdets = np.linalg.slogdet(to_covariance)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(inverse @ covariance) + distance @ inverse @ distance - len(mean) + logdets)


# ---- closed forms ----


def test_evidence(model: LinearGaussian) -> None:
    """N(b, W W^T + diag sigma^2), with 50 digits where sigma is small: the covariance then has a condition of 1e9."""
    weight, bias, std, x = (t.tolist() for t in (model.weight, model.bias, model.std, data(model)))
    with mpmath.workdps(50):
        w = mpmath.matrix(weight)
        covariance = w * w.T + mpmath.diag([mpmath.mpf(s) ** 2 for s in std])
        inverse, logdet = covariance**-1, mpmath.log(mpmath.det(covariance))
        exact = []
        for row in x:
            d = mpmath.matrix([mpmath.mpf(a) - mpmath.mpf(b) for a, b in zip(row, bias, strict=True)])
            exact.append(float(-((d.T * inverse * d)[0] + logdet + len(bias) * mpmath.log(2 * mpmath.pi)) / 2))
    torch.testing.assert_close(
        model.log_evidence(data(model)), torch.tensor(exact, dtype=DOUBLE), rtol=1e-10, atol=1e-10
    )


def test_evidence_by_scipy() -> None:
    for model in TAME:
        truth = scipy.stats.multivariate_normal(model.bias.numpy(), joint_covariance(model)[1]).logpdf(
            data(model).numpy()
        )
        assert_close(model.log_evidence(data(model)), truth)


def test_posterior() -> None:
    """By conditioning the joint Gaussian of z and x."""
    for model in TAME:
        cross, covariance = joint_covariance(model)
        gain = cross @ np.linalg.inv(covariance)
        mean, variance = model.posterior(data(model))
        assert_close(mean, (data(model) - model.bias).numpy() @ gain.T)
        assert_close(variance, np.eye(LATENTS) - gain @ cross.T)


def test_joint_by_scipy(model: LinearGaussian) -> None:
    z, x = numbers(4, EXAMPLES, LATENTS, seed=8), data(model).numpy()
    mean = z.numpy() @ model.weight.numpy().T + model.bias.numpy()
    truth = scipy.stats.norm.logpdf(x, mean, model.std.numpy()).sum(-1) + scipy.stats.norm.logpdf(z.numpy()).sum(-1)
    torch.testing.assert_close(model.log_joint(data(model), z), torch.from_numpy(truth), rtol=1e-12, atol=1e-10)


def test_bayes(model: LinearGaussian) -> None:
    """ln p(x, z) - ln p(z|x) is ln p(x) at every z."""
    mean, covariance = model.posterior(data(model))
    for seed in range(3):
        z = mean + numbers(EXAMPLES, LATENTS, seed=seed) @ torch.linalg.cholesky(covariance).mT
        rows = zip(z.numpy(), mean.numpy(), strict=True)
        log_posterior = [
            scipy.stats.multivariate_normal(m, covariance.numpy(), allow_singular=True).logpdf(v) for v, m in rows
        ]
        evidence = model.log_joint(data(model), z) - torch.tensor(log_posterior, dtype=DOUBLE)
        torch.testing.assert_close(evidence, model.log_evidence(data(model)), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_scales(form: str) -> None:
    q = random_q("diagonal", seed=20)
    model = LinearGaussian(W, B, **{form: from_logvar(LOGVAR, form)})
    scales = {form: from_logvar(q["logvar"], form)}
    assert_close(model.elbo(X, q["mu"], **scales), MODELS["factor analysis"].elbo(X, **q))
    assert_close(model.gap(X, q["mu"], **scales), MODELS["factor analysis"].gap(X, **q))


def test_numbers_stand_for_scales() -> None:
    model = LinearGaussian(W, 0.3, logvar=-0.5)
    truth = LinearGaussian(W, torch.full((FEATURES,), 0.3, dtype=DOUBLE), torch.full((FEATURES,), -0.5, dtype=DOUBLE))
    mu, logvar = numbers(LATENTS), torch.full((LATENTS,), 0.2, dtype=DOUBLE)
    for method in ("elbo", "gap"):
        assert_close(getattr(model, method)(X, mu, 0.2), getattr(truth, method)(X, mu, logvar))
        assert_close(getattr(model, method)(X[0], mu, 0.2), getattr(truth, method)(X, mu, logvar)[0])


def test_batches() -> None:
    """x [7, 5] against q of [4, 1] examples, and a single example."""
    model, q = MODELS["factor analysis"], random_q("full", seed=30)
    mu, covariance = q["mu"][:4].unsqueeze(1), q["covariance"][:4].unsqueeze(1)
    for method in (model.elbo, model.gap):
        both = method(X, mu, covariance=covariance)
        assert both.shape == (4, EXAMPLES)
        assert_close(both[2, 3], method(X[3], mu[2, 0], covariance=covariance[2, 0]))
    z = numbers(4, 1, LATENTS)
    assert_close(model.log_joint(X, z)[2, 3], model.log_joint(X[3], z[2, 0]))


def test_float32() -> None:
    q = {name: t.float() for name, t in random_q("full", seed=30).items()}
    model = LinearGaussian(W.float(), B.float(), LOGVAR.float())
    for value, truth in (
        (model.elbo(X.float(), **q), MODELS["factor analysis"].elbo(X, **{k: v.double() for k, v in q.items()})),
        (model.log_evidence(X), MODELS["factor analysis"].log_evidence(X)),  # computed in the model's dtype
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", devices())
def test_the_elbo_is_that_of_the_loss(device: str) -> None:
    """The mean of elbo_loss over samples, whose decoder is W z + b."""
    model, x, logvar = moved(MODELS["factor analysis"], device), X.to(device), LOGVAR.to(device)
    q = {name: t.to(device) for name, t in random_q("diagonal", seed=20).items()}
    with seeds_of_the_cpu():
        z = rsample(**q, num_samples=20_000, generator=torch.Generator().manual_seed(0))
    loss = elbo_loss(model.decode(z), x, **q, recon_logvar=logvar, batch_dims=2, reduction="none").loss
    error = loss.std(0) / len(loss) ** 0.5
    assert bool(((-loss.mean(0) - model.elbo(x, **q)).abs() < 4 * error).all())


# ---- the theorems ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_elbo_is_evidence_minus_the_kl_to_the_posterior(covariance: str, device: str) -> None:
    """Three formulas that share nothing: the bound, the evidence by SciPy, the KL by determinants and inverses."""
    for model in TAME:
        x = data(model)
        cross, variance = joint_covariance(model)
        gain = cross @ np.linalg.inv(variance)
        posterior = np.eye(LATENTS) - gain @ cross.T
        evidence = scipy.stats.multivariate_normal(model.bias.numpy(), variance).logpdf(x.numpy())
        on_device, x_there = moved(model, device), x.to(device)
        for seed in range(100, 110):
            q = random_q(covariance, seed)
            means = (x - model.bias).numpy() @ gain.T
            rows = zip(q["mu"].numpy(), full(q), means, strict=True)
            kl = np.array([textbook_kl(m, s, to, posterior) for m, s, to in rows])
            q = {name: t.to(device) for name, t in q.items()}
            assert_close(on_device.elbo(x_there, **q), evidence - kl)
            assert_close(on_device.gap(x_there, **q), kl)
            assert bool((on_device.elbo(x_there, **q) < on_device.log_evidence(x_there)).all())


def test_equality_at_the_posterior_alone(model: LinearGaussian) -> None:
    x = data(model)
    mean, covariance = model.posterior(x)
    evidence = model.log_evidence(x)
    torch.testing.assert_close(model.elbo(x, mean, covariance=covariance), evidence, rtol=1e-10, atol=1e-10)
    assert bool((model.gap(x, mean, covariance=covariance).abs() < 1e-12).all())
    root = torch.linalg.cholesky(covariance)
    tilt = torch.eye(LATENTS, dtype=DOUBLE)
    tilt[1, 0] = 0.1
    for elsewhere in (
        dict(mu=mean + 0.1 * root[:, 0], covariance=covariance),  # KL 0.005
        dict(mu=mean, covariance=1.1 * covariance),
        dict(mu=mean, covariance=covariance / 1.1),
        dict(mu=mean, covariance=root @ tilt @ tilt.mT @ root.mT),
    ):
        below = evidence - model.elbo(x, **elsewhere)
        assert bool((below > 2e-3).all())
        torch.testing.assert_close(below, model.gap(x, **elsewhere), rtol=1e-10, atol=cancelled(evidence))


def test_a_diagonal_q_is_loose_by_the_posteriors_correlation(model: LinearGaussian) -> None:
    """The best diagonal q has a gap of 1/2 ln(prod M_jj / det M), M the posterior's precision; none if W^T W is
    diagonal."""
    x = data(model)
    mu, logvar = model.best_diagonal(x)
    weight = model.weight.numpy() / model.std.numpy()[:, None]
    precision = np.eye(LATENTS) + weight.T @ weight
    loose = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    assert loose > 0.05
    evidence = model.log_evidence(x)
    expected = torch.full_like(evidence, loose)
    torch.testing.assert_close(evidence - model.elbo(x, mu, logvar), expected, rtol=1e-10, atol=cancelled(evidence))
    assert_close(model.gap(x, mu, logvar), expected)
    assert bool((logvar.exp() < model.posterior(x)[1].diagonal()).all())  # too sure of itself

    axes = torch.from_numpy(scipy.linalg.orth(W.numpy()))  # orthogonal columns: z are independent given x
    upright = LinearGaussian(axes * torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE), B, std=0.6)
    assert_close(upright.elbo(X, *upright.best_diagonal(X)), upright.log_evidence(X))


def maximize(objective: Any, leaves: list[Tensor]) -> None:
    options = dict(max_iter=2000, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-16)
    optimizer = torch.optim.LBFGS(leaves, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -objective()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_over_phi_the_bound_rises_as_the_kl_falls() -> None:
    """ln p(x) does not depend on phi, so that the gradients are opposite; the maximum is the best diagonal q."""
    model, q = MODELS["factor analysis"], random_q("diagonal", seed=40)
    leaves = [t.requires_grad_() for t in q.values()]
    of_elbo = torch.autograd.grad(model.elbo(X, *leaves).sum(), leaves)
    of_gap = torch.autograd.grad(model.gap(X, *leaves).sum(), leaves)
    for up, down in zip(of_elbo, of_gap, strict=True):
        assert up.abs().max() > 0.1
        assert_close(up, -down)
    maximize(lambda: model.elbo(X, *leaves).sum(), leaves)
    mu, logvar = model.best_diagonal(X)
    torch.testing.assert_close(leaves[0].detach(), mu, rtol=0, atol=1e-6)
    torch.testing.assert_close(leaves[1].detach(), logvar.expand_as(leaves[1]), rtol=0, atol=1e-6)
    assert_close(model.gap(X, *leaves).detach(), model.gap(X, mu, logvar))


def test_over_theta_the_bound_rises_to_that_of_probabilistic_pca() -> None:
    """With q = posterior at every step the bound is the likelihood, whose maximum has a closed form in the eigenvalues
    of the data's covariance (Tipping & Bishop 1999, equations 7 and 8)."""
    samples = numbers(60, 4, seed=50) @ numbers(4, 4, seed=51)
    theta = [numbers(4, 2, seed=52), samples.mean(0), torch.zeros((), dtype=DOUBLE)]
    leaves = [t.clone().requires_grad_() for t in theta]
    model = LinearGaussian(*leaves)  # made once: it follows its parameters

    def bound() -> Tensor:
        with torch.no_grad():
            mean, covariance = model.posterior(samples)
        return model.elbo(samples, mean, covariance=covariance).mean()

    start = bound().item()
    # At a fixed q already: a step in theta raises the bound at that q, and so the evidence, which is above it.
    mean, covariance = (t.detach() for t in model.posterior(samples))
    maximize(lambda: model.elbo(samples, mean, covariance=covariance).mean(), leaves)
    at_fixed_q = model.elbo(samples, mean, covariance=covariance).mean().item()
    assert start + 0.1 < at_fixed_q < model.log_evidence(samples).mean().item()
    maximize(bound, leaves)

    eigenvalues = np.linalg.eigvalsh(np.cov(samples.numpy().T, bias=True))[::-1]
    noise = eigenvalues[2:].mean()
    best = -0.5 * (4 * math.log(2 * math.pi) + np.log(eigenvalues[:2]).sum() + 2 * math.log(noise) + 4)
    assert bound().item() == pytest.approx(best, abs=1e-8)
    assert leaves[2].exp().item() == pytest.approx(noise, rel=1e-4)
    assert at_fixed_q < best


@pytest.mark.parametrize("device", devices())
def test_gradients_by_theta(device: str) -> None:
    """Of everything, against finite differences."""
    q, x = random_q("full", seed=60), X[:2].to(device)
    mu, covariance = q["mu"][:2], q["covariance"][:2].to(device)

    def everything(weight: Tensor, bias: Tensor, logvar: Tensor, mu: Tensor) -> tuple[Tensor, ...]:
        model = LinearGaussian(weight, bias, logvar)
        q = dict(mu=mu, covariance=covariance)
        return model.elbo(x, **q), model.gap(x, **q), model.log_evidence(x), model.elbo(x, *model.best_diagonal(x))

    assert torch.autograd.gradcheck(
        everything, [t.clone().to(device).requires_grad_() for t in (W, B, LOGVAR, mu)], fast_mode=True
    )


def test_importance_weighting_tightens_the_bound() -> None:
    """Estimates in three dimensions, 4 errors apart from each other and from the evidence."""
    model, x = MODELS["factor analysis"], X[0]
    mean, covariance = model.posterior(x)
    q = dict(mu=mean, logvar=covariance.diagonal().log() + 0.3)
    z = rsample(**q, num_samples=64 * 4000, generator=torch.Generator().manual_seed(0))
    log_weights = model.log_joint(x, z) - gaussian_log_prob(z, *q.values(), batch_dims=1)
    last = model.elbo(x, **q).item()
    for samples in (2, 4, 16):
        bounds = iwae_bound(log_weights.reshape(samples, -1))
        error = (bounds.std() / len(bounds) ** 0.5).item()
        assert bounds.mean().item() > last + 4 * error
        last = bounds.mean().item()
    assert last < model.log_evidence(x).item() - 4 * error


# ---- bad arguments ----


MODEL = MODELS["factor analysis"]
MU, COVARIANCE = torch.zeros(LATENTS, dtype=DOUBLE), torch.eye(LATENTS, dtype=DOUBLE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LinearGaussian(W[0], std=1.0), ValueError, r"weight must have shape \[D, L\], got \(3,\)"),
        (lambda: LinearGaussian(W.tolist(), std=1.0), TypeError, "weight must be a torch.Tensor, got list"),
        (lambda: LinearGaussian(W), ValueError, "exactly one of logvar, log_std, std, var, rho must be given"),
        (lambda: LinearGaussian(W, std=0.0), ValueError, "std must be positive, got 0"),
        (lambda: LinearGaussian(W, var=-LOGVAR.exp()), ValueError, "var must stand for a sigma above zero"),
        (lambda: LinearGaussian(W, std=torch.zeros(())), ValueError, "std must stand for a sigma above zero"),
        (
            lambda: LinearGaussian(W, B[:3], std=1.0),
            ValueError,
            r"bias of shape \(3,\) does not broadcast to the number of",
        ),
        (lambda: LinearGaussian(W, B, W), ValueError, r"logvar of shape \(5, 3\) does not broadcast to the number of"),
        (lambda: MODEL.elbo(X[:, :4], MU, 0.0), ValueError, r"x must have shape \[..., 5\], got \(7, 4\)"),
        (lambda: MODEL.gap(X[:, :4], MU, 0.0), ValueError, r"x must have shape \[..., 5\], got \(7, 4\)"),
        (lambda: MODEL.log_evidence(torch.zeros(())), ValueError, r"x must have shape \[..., 5\], got \(\)"),
        (lambda: MODEL.log_evidence(X.long()), TypeError, "x must have dtype float32"),
        (lambda: MODEL.decode(X), ValueError, r"z must have shape \[..., 3\], got \(7, 5\)"),
        (lambda: MODEL.log_joint(X, X), ValueError, r"z must have shape \[..., 3\], got \(7, 5\)"),
        (lambda: MODEL.elbo(X, MU[:2], 0.0), ValueError, r"mu must have shape \[..., 3\], got \(2,\)"),
        (lambda: MODEL.elbo(X, MU), ValueError, "exactly one of logvar, log_std, std, var, rho must be given"),
        (lambda: MODEL.elbo(X, MU, X), ValueError, "shapes do not broadcast: mu"),
        (lambda: MODEL.elbo(X, MU, std=1.0, covariance=COVARIANCE), ValueError, "std has no use beside covariance"),
        (
            lambda: MODEL.gap(X, MU, std=-torch.ones(3)),
            ValueError,
            "std must stand for a sigma above zero in every dim",
        ),
        (
            lambda: MODEL.elbo(X, MU, var=torch.zeros(3)),
            ValueError,
            "var must stand for a sigma above zero in every dim",
        ),
        (
            lambda: LinearGaussian(W * math.nan, std=1.0).log_evidence(X),
            ValueError,
            "precision .* is not positive definite in float64: weight and scale must be finite",
        ),
        (
            lambda: MODEL.elbo(X, MU, covariance=1e-9 * (COVARIANCE + 0.5 * COVARIANCE.roll(1, 1).triu(1))),
            ValueError,
            "covariance must be symmetric positive definite",
        ),
        (lambda: MODEL.gap(X, MU, covariance=MU), ValueError, r"covariance must have shape \[..., 3, 3\], got \(3,\)"),
        (
            lambda: MODEL.elbo(X, MU, covariance=-COVARIANCE),
            ValueError,
            "covariance must be symmetric positive definite",
        ),
        (
            lambda: MODEL.gap(X, MU, covariance=COVARIANCE.tril() + W[:3].tril(-1)),
            ValueError,
            "covariance must be symmetric",
        ),
        (lambda: MODEL.log_evidence(X.to("meta")), ValueError, "x must be on the model's device, cpu, got meta"),
        (lambda: LinearGaussian(W, B.to("meta"), 0.0), ValueError, "bias must be on the model's device, cpu, got meta"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
