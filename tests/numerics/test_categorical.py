"""Terms over classes where float32 formulas lose their digits, against mpmath; draws against their probabilities; the steps of
DreamerV3 written out."""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import elbo_ext
from elbo_ext import bounds, categorical_kl, categorical_log_prob, categorical_rsample_kl, multinomial_log_prob
from samples import devices

mpmath.mp.dps = 60
ON_DEVICES = pytest.mark.parametrize("device", devices())
EPS = {torch.float32: 2**-24, torch.float64: 2**-53}


def exact_probabilities(logits: Tensor, unimix: float = 0.0) -> list[mpmath.mpf]:
    e = [mpmath.exp(mpmath.mpf(float(number))) for number in logits]
    total, share = mpmath.fsum(e), mpmath.mpf(unimix)
    return [(1 - share) * number / total + share / len(e) for number in e]


def exact_kl(logits: Tensor, prior: Tensor, unimix: float = 0.0) -> mpmath.mpf:
    p, q = exact_probabilities(logits, unimix), exact_probabilities(prior, unimix)
    return mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_kl_of_a_collapsed_posterior(unimix: float, dtype: torch.dtype, device: str) -> None:
    """From a posterior that differs by 1e-1 to one that differs by 1e-5: relative to the KL itself, of size 1e-2 to 1e-10,
    where sum p (ln p - ln q) in float32 has no digit left. The gradient likewise, of the size of the difference."""
    for size in (1e-1, 1e-2, 1e-3, 1e-5):
        prior = (2 * numbers(33)).to(dtype)
        logits = (prior.double() + size * numbers(33, seed=1)).to(dtype)
        leaf = logits.to(device, copy=True).requires_grad_()
        kl = categorical_kl(leaf, prior.to(device), unimix=unimix, batch_dims=0)
        exact = exact_kl(logits, prior, unimix)
        assert abs(mpmath.mpf(float(kl)) - exact) <= 60 * EPS[dtype] * exact, size
        (gradient,) = torch.autograd.grad(kl, leaf)
        p, q = exact_probabilities(logits, unimix), exact_probabilities(prior, unimix)
        s = exact_probabilities(logits)
        ratios = [mpmath.log(a / b) for a, b in zip(p, q, strict=True)]
        mean = mpmath.fsum(a * b for a, b in zip(s, ratios, strict=True))
        expected = [(1 - mpmath.mpf(unimix)) * a * (r - mean) for a, r in zip(s, ratios, strict=True)]
        largest = max(map(abs, expected))
        for actual, one in zip(gradient.tolist(), expected, strict=True):
            assert abs(actual - one) <= 60 * EPS[dtype] * largest, size
    same = (3 * numbers(5, 7)).to(dtype).to(device).requires_grad_()
    kl = categorical_kl(same, same.detach(), unimix=unimix)
    assert bool((kl == 0).all())
    assert bool((torch.autograd.grad(kl.sum(), same)[0] == 0).all())


@ON_DEVICES
def test_kl_far_apart(device: str) -> None:
    """Logits of size 100, and against mpmath: no term is lost, none overflows."""
    for spread in (1.0, 10.0, 100.0):
        logits, prior = (spread * numbers(4, 9)).float(), (spread * numbers(4, 9, seed=7)).float()
        for unimix in (0.0, 0.01):
            actual = categorical_kl(logits.to(device), prior.to(device), unimix=unimix).cpu()
            for row, one, other in zip(actual.tolist(), logits, prior, strict=True):
                exact = exact_kl(one, other, unimix)
                assert abs(row - exact) <= 1e-6 * exact


@ON_DEVICES
def test_impossible_classes(device: str) -> None:
    """A logit of -inf is a probability of 0, as of an action that is not allowed."""
    inf = math.inf
    logits = torch.tensor([[0.5, -inf, 1.0, -inf]], device=device, requires_grad=True)
    prior = torch.tensor([[0.1, 0.2, 0.7, -inf]], device=device)
    kl = categorical_kl(logits, prior)
    p, q = torch.tensor([0.5, 1.0]).softmax(0), torch.tensor([0.1, 0.2, 0.7]).softmax(0)[[0, 2]]
    torch.testing.assert_close(kl.cpu(), (p * (p / q).log()).sum().reshape(1))
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    expected = p * ((p / q).log() - kl.detach().cpu())
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[expected[0], 0.0, expected[1], 0.0]]))
    assert categorical_kl(prior, logits.detach()).item() == inf
    x = torch.tensor([[3, 0, 2, 0]], device=device)
    value = multinomial_log_prob(x, logits)
    torch.testing.assert_close(value.cpu(), (3 * p[0].log() + 2 * p[1].log()).reshape(1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[3 - 5 * p[0], 0.0, 2 - 5 * p[1], 0.0]]))
    assert categorical_log_prob(torch.tensor([1], device=device), logits).item() == -inf
    for _ in range(20):
        z, _ = categorical_rsample_kl(logits.detach(), prior)
        assert z[0, 1] == z[0, 3] == 0 and z.sum() == 1


@ON_DEVICES
def test_a_model_that_is_sure(device: str) -> None:
    """ln p and its derivative where p = 1 - 1e-10: softmax - one_hot is 0 there, and log_softmax too."""
    logits = torch.tensor([[25.0, 0.0, -1.0]], device=device, requires_grad=True)
    x = torch.tensor([0], device=device)
    value = categorical_log_prob(x, logits)
    others = mpmath.exp(-25) + mpmath.exp(-26)
    assert abs(value.item() + mpmath.log1p(others)) <= 1e-6 * others
    (gradient,) = torch.autograd.grad(value, logits)
    expected = [others / (1 + others), -mpmath.exp(-25) / (1 + others), -mpmath.exp(-26) / (1 + others)]
    for actual, exact in zip(gradient[0].tolist(), expected, strict=True):
        assert abs(actual - exact) <= 1e-6 * abs(exact)
    assert cross_entropy(logits.detach(), x).item() == 0.0  # what torch's own has there


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels(dtype: torch.dtype, device: str) -> None:
    """Of any integer dtype, -inf with gradient 0 where they are no class, left out where they are ignored; what remains is
    the cross-entropy of torch."""
    logits = numbers(5, 7).float().to(device).requires_grad_()
    x = torch.tensor([0, 6, 7, 3, 100], dtype=dtype, device=device)
    value = categorical_log_prob(x, logits, ignore_index=100)
    expected = -cross_entropy(logits[[0, 1, 3]], x[[0, 1, 3]].long(), reduction="none")
    torch.testing.assert_close(value[[0, 1, 3]], expected)
    assert value[2] == -math.inf and value[4] == 0
    (gradient,) = torch.autograd.grad(value[[0, 1, 3, 4]].sum() + 0 * logits.sum(), logits)
    (of_torch,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, of_torch)
    total = categorical_log_prob(
        x, logits, ignore_index=100, weight=torch.tensor([1, 1, 0, 1, 1], device=device), reduction="sum"
    )
    torch.testing.assert_close(total, expected.sum())
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, of_torch)


@ON_DEVICES
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_weight_of_zero_leaves_a_row_out(poison: float, device: str) -> None:
    """Whatever stands in it: its gradients are 0, and nothing of it reaches the sum. Without a weight it comes through."""
    clean = numbers(5, 7).float().to(device)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], device=device)
    hole = (mask == 0).unsqueeze(1)
    x = torch.randint(4, (5, 7), device=device).float()
    for function, victim, given in (
        (multinomial_log_prob, "logits", {"x": x, "logits": clean}),
        (multinomial_log_prob, "x", {"x": x, "logits": clean}),
        (categorical_kl, "logits", {"logits": clean, "prior_logits": x}),
        (categorical_kl, "prior_logits", {"logits": clean, "prior_logits": x}),
        (categorical_log_prob, "logits", {"x": x[:, 0].long(), "logits": clean}),
    ):
        results = []
        for dirty in (False, True):
            arguments = {**given, victim: torch.where(hole, poison, given[victim])} if dirty else given
            leaves = {k: t.clone().requires_grad_() for k, t in arguments.items() if t.is_floating_point()}
            weight = mask.clone().requires_grad_()
            value = function(**{**arguments, **leaves}, weight=weight, reduction="sum")
            gradients = torch.autograd.grad(value, [*leaves.values(), weight])
            assert all(bool((g[hole[:, 0]] == 0).all()) for g in gradients[:-1])
            assert bool(gradients[-1].isfinite().all())
            results.append((value, *gradients[:-1], gradients[-1] * mask))
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)
        if math.isnan(poison):
            assert function(**arguments).isnan().tolist() == (mask == 0).tolist()


@ON_DEVICES
def test_a_vocabulary(device: str) -> None:
    """50,257 classes, in each dtype: against torch in float64."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logits = (4 * numbers(6, 50_257)).to(dtype).to(device).requires_grad_()
        x = torch.arange(6, device=device) * 10_000
        value = categorical_log_prob(x, logits, reduction="sum")
        (gradient,) = torch.autograd.grad(value, logits)
        wide = logits.detach().double().requires_grad_()
        exact = -cross_entropy(wide, x, reduction="sum")
        (expected,) = torch.autograd.grad(exact, wide)
        torch.testing.assert_close(value.double(), exact, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=0)
        torch.testing.assert_close(
            gradient, expected.to(dtype), atol=1e-7 if dtype != torch.float16 else 6e-8, rtol=1e-2
        )


# ---- draws ----


@ON_DEVICES
@pytest.mark.parametrize("unimix", [0.0, 0.25])
def test_draws_have_their_probabilities(unimix: float, device: str) -> None:
    logits = torch.tensor([2.0, -1.0, 0.0, 0.5, -3.0], device=device)
    torch.manual_seed(5)
    z, _ = categorical_rsample_kl(logits.expand(1000, 5), num_samples=200, unimix=unimix)
    assert bool(((z == 0) | (z == 1)).all()) and bool((z.sum(-1) == 1).all())
    p = (1 - unimix) * logits.double().softmax(0) + unimix / 5
    counts = z.sum((0, 1)).cpu().numpy()
    assert scipy.stats.chisquare(counts, p.cpu().numpy() * 200_000).pvalue > 1e-3
    pairs = z[:, :-1].argmax(-1).flatten() * 5 + z[:, 1:].argmax(-1).flatten()
    together = torch.bincount(pairs, minlength=25).cpu().numpy()
    expected = np.outer(counts, counts).flatten() / counts.sum() ** 2 * together.sum()
    assert scipy.stats.chisquare(together, expected).pvalue > 1e-4  # neighbours are independent


@ON_DEVICES
def test_the_same_draws_for_any_layout_and_dtype(device: str) -> None:
    logits = numbers(30, 4, 17).float().to(device)

    def drawn(logits: Tensor, dim: int = -1) -> Tensor:
        torch.manual_seed(9)
        return categorical_rsample_kl(logits, dim=dim)[0].movedim(dim, -1).argmax(-1)

    expected = drawn(logits)
    assert torch.equal(drawn(logits.movedim(-1, 1).contiguous(), dim=1), expected)
    assert torch.equal(drawn(logits.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    assert torch.equal(drawn(logits.double()), expected)
    torch.manual_seed(9)
    z, _ = categorical_rsample_kl(logits, num_samples=1)
    assert torch.equal(z[0].argmax(-1), expected)


@ON_DEVICES
def test_given_noise_and_generators(device: str) -> None:
    logits = numbers(6, 5).float().to(device)
    noise = torch.zeros(6, 5, device=device)
    assert torch.equal(categorical_rsample_kl(logits, noise=noise)[0], one_hot(logits.argmax(-1), 5).float())
    noise[:, 2] = 100.0
    assert bool((categorical_rsample_kl(logits, noise=noise)[0][:, 2] == 1).all())
    generator = torch.Generator(device).manual_seed(3)
    first = categorical_rsample_kl(logits, generator=generator, num_samples=50)[0]
    second = categorical_rsample_kl(logits, generator=generator, num_samples=50)[0]
    assert not torch.equal(first, second)
    again = categorical_rsample_kl(logits, generator=torch.Generator(device).manual_seed(3), num_samples=50)[0]
    assert torch.equal(first, again)


@ON_DEVICES
def test_the_gradient_passes_straight_through(device: str) -> None:
    """As of z + p - p.detach(), with the KL's added."""
    logits, prior = (numbers(6, 5, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    upstream = numbers(3, 6, 5, seed=2).to(device)
    torch.manual_seed(1)
    z, kl = categorical_rsample_kl(logits, prior, unimix=0.1, num_samples=3)
    actual = torch.autograd.grad((z * upstream).sum() + (kl * upstream[0, :, 0]).sum(), (logits, prior))
    p, q = (0.9 * t.softmax(-1) + 0.02 for t in (logits, prior))
    exact = (p * (p.log() - q.log())).sum(-1)
    total = (p * upstream).sum() + (exact * upstream[0, :, 0]).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(total, (logits, prior)), rtol=1e-12, atol=1e-12)


# ---- DreamerV3 ----


@ON_DEVICES
def test_the_step_of_dreamer_v3(device: str) -> None:
    """32 variables of 32 classes, unimix 1 %, free nats 1 of the sum over variables, and the KL to each side with the other
    held fixed, 1.0 and 0.1 (Hafner et al. 2023, equations 4 and 5): values and gradients of the formulas written out."""
    post, prior = (2 * numbers(8, 32, 32, seed=seed).to(device) for seed in (0, 1))
    post, prior = post.requires_grad_(), prior.requires_grad_()

    def probabilities(logits: Tensor) -> Tensor:
        return 0.99 * logits.softmax(-1) + 0.01 / 32

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p.log() - q.log())).sum((-2, -1))

    p, q = probabilities(post), probabilities(prior)
    dynamics, representation = kl(p.detach(), q).clamp(min=1.0), kl(p, q.detach()).clamp(min=1.0)
    expected = (dynamics + 0.1 * representation).mean()
    expected_gradients = torch.autograd.grad(expected, (post, prior))

    torch.manual_seed(2)
    z, _ = categorical_rsample_kl(post, unimix=0.01)
    of_prior = categorical_kl(post.detach(), prior, unimix=0.01)
    of_post = categorical_kl(post, prior.detach(), unimix=0.01)
    free = [bounds.free_bits(kl, 1.0, per="example") for kl in (of_prior, of_post)]
    loss = (free[0] + 0.1 * free[1]).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (post, prior)), expected_gradients)
    assert z.shape == (8, 32, 32) and bool((z.sum(-1) == 1).all())


# ---- in the loss ----


@ON_DEVICES
def test_elbo_loss(device: str) -> None:
    recon, x = numbers(4, 6, 5).to(device).requires_grad_(), torch.randint(5, (4, 6), device=device)
    mu = numbers(4, 3).to(device).requires_grad_()
    for likelihood, images in (("categorical", recon), (elbo_ext.likelihoods.Categorical(dim=1), recon.movedim(-1, 1))):
        elbo = elbo_ext.elbo_loss(images, x, mu=mu, logvar=0.0, likelihood=likelihood)
        log_p = categorical_log_prob(x, recon)
        kl = elbo_ext.gaussian_kl(mu, 0.0)
        torch.testing.assert_close(elbo.loss, (kl - log_p).mean())
        torch.testing.assert_close(
            torch.autograd.grad(elbo.loss, (recon, mu)), torch.autograd.grad((kl - log_p).mean(), (recon, mu))
        )
    samples = torch.stack([recon, -recon])  # K = 2
    elbo = elbo_ext.elbo_loss(samples, x, mu=mu, logvar=0.0, likelihood="categorical", batch_dims=2, reduction="none")
    torch.testing.assert_close(elbo.log_likelihood, categorical_log_prob(x, samples, batch_dims=2))
    assert elbo.kl.shape == (2, 4)
    counts = torch.randint(4, (4, 6, 5), device=device)
    likelihood = elbo_ext.likelihoods.Multinomial(coefficient=True)
    elbo = elbo_ext.elbo_loss(recon, counts, kl=0.0, likelihood=likelihood, reduction="none")
    exact = torch.distributions.Multinomial(1, logits=recon, validate_args=False)  # whose total only checks
    torch.testing.assert_close(elbo.log_likelihood, exact.log_prob(counts.double()).sum(-1))
