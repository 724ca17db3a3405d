"""The noise: the kernels' against the reference's NumPy Philox and Box-Muller, its statistics, and where it goes."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import formulas, reference, rsample, rsample_kl
from samples import DTYPES, FORMS, LAYOUTS, NOISE_ERROR, Maker, devices

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -987654321987654321]


def kernel_noise(seed: int, count: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    seeds = torch.tensor([seed], device=device)
    return torch.ops.elbo_ext.normal_noise(seeds, count, dtype == torch.float64)[0]


def drawn_seed(torch_seed: int, device: str = "cpu") -> int:
    """The seed that the next sample would draw."""
    torch.manual_seed(torch_seed)
    return int(elbo_ext.ops.draw_seed(torch.device(device)))


def standard(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, float]:
    """mu = 0 and sigma = 1: the sample is the noise itself, to the bit. (rsample takes a std as a keyword.)"""
    return torch.zeros(shape, dtype=dtype, device=device), 1.0


# ---- against the reference ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_the_reference_noise(seed: int, dtype: torch.dtype, device: str) -> None:
    """Element by element, at lengths that end inside a Philox block (4), a vector of blocks (64), a tile (1024)."""
    for count in (0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 1151, 20_001):
        actual = kernel_noise(seed, count, dtype, device)
        assert actual.shape == (count,) and actual.dtype == dtype
        exact = reference.normal_noise(seed, count)
        assert np.abs(actual.cpu().double().numpy() - exact).max(initial=0.0) <= NOISE_ERROR[dtype], count


def test_noise_is_exact_relative_to_its_radius() -> None:
    """float32 noise is right to 2 ulp of its radius, in the tails and next to 0: log and sine keep their ends."""
    n = 2_000_000
    exact = reference.normal_noise(5, n)
    radius = np.hypot(exact[0::2], exact[1::2]).repeat(2)
    error = kernel_noise(5, n).double().numpy() - exact
    assert (np.abs(error) / radius).max() <= 2.5e-7
    assert abs((error / radius).mean()) <= 4.5 * 4e-8 / math.sqrt(n)  # and unbiased: 4e-8 is its standard deviation


@pytest.mark.parametrize("device", devices())
def test_each_seed_has_its_row(device: str) -> None:
    seeds = torch.tensor([SEEDS], device=device).t()
    noise = torch.ops.elbo_ext.normal_noise(seeds.contiguous(), 77, False)
    assert noise.shape == (len(SEEDS), 77)
    for row, seed in zip(noise, SEEDS, strict=True):
        assert torch.equal(row, kernel_noise(seed, 77, device=device))


@pytest.mark.parametrize("device", devices())
def test_noise_from_any_offset(device: str) -> None:
    """The noise of sample k begins at element k * 37 (or 1, 5, 64, ...), whatever that is modulo 4, 64 or 1024."""
    for size in (1, 5, 37, 64, 129, 1023, 1026, 8195):
        seed = drawn_seed(3, device)
        torch.manual_seed(3)
        mu, std = standard((size,), device=device)
        z = rsample(mu, std=std, num_samples=9)
        assert torch.equal(z.flatten(), kernel_noise(seed, 9 * size, device=device)), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counters_beyond_32_bits(dtype: torch.dtype) -> None:
    """Element 2^34 is the first of Philox counter 2^32, in the counter's second word."""
    mu = torch.zeros((), dtype=dtype)
    for first in (2**34 - 700, 2**40 + 3):
        count = 1500
        seeds = torch.tensor([11])
        actual = torch.ops.elbo_ext.normal_noise(seeds, count, dtype == torch.float64, first)[0]
        assert actual.dtype == mu.dtype
        exact = reference.normal_noise(11, count, offset=first)
        assert np.abs(actual.double().numpy() - exact).max() <= NOISE_ERROR[dtype]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_noise_is_the_reference_noise(dtype: torch.dtype, device: str) -> None:
    """Relative to its size, which is up to 22, and to 1."""
    for seed in SEEDS:
        for first, count in ((0, 20_001), (2, 5), (2**34 - 7, 300)):
            seeds = torch.tensor([seed], device=device)
            actual = (
                torch.ops.elbo_ext.gumbel_noise(seeds, count, dtype == torch.float64, first)[0].cpu().double().numpy()
            )
            exact = reference.gumbel_noise(seed, count, offset=first)
            tolerance = 1e-6 if dtype == torch.float32 else 4e-15
            assert np.abs((actual - exact) / np.maximum(np.abs(exact), 1)).max() <= tolerance


def test_gumbel_noise_is_gumbel() -> None:
    noise = reference.gumbel_noise(3, 200_000)
    assert scipy.stats.kstest(noise, scipy.stats.gumbel_r.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.01


# ---- the same draws, however they are asked for ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_draws_for_every_layout(name: str, device: str) -> None:
    """Element i in row-major order gets normal number i, wherever it lies in memory."""
    m = Maker(torch.float32, device, 0)
    mu, logvar = LAYOUTS[name](m.normal(3, 4, 5, 17)), LAYOUTS[name](m.scale("logvar", 3, 4, 5, 17))
    for options in ({}, {"num_samples": 3}):
        results = []
        for a, b in ((mu, logvar), (mu.contiguous(), logvar), (mu, logvar.contiguous()), (mu.clone(), logvar.clone())):
            torch.manual_seed(7)
            results.append(rsample(a, b, **options))
            torch.manual_seed(7)
            results.append(rsample_kl(a, b, **options)[0])
        for z in results[1:]:
            assert torch.equal(z, results[0])


@pytest.mark.parametrize("device", devices())
def test_same_draws_for_every_shape_and_function(device: str) -> None:
    """The stream does not depend on the shape, the sample axis, the prior, batch_dims or broadcasting."""
    seed = drawn_seed(7, device)
    noise = kernel_noise(seed, 360, device=device)

    def draw(function, *args, **options) -> Tensor:
        torch.manual_seed(7)
        result = function(*args, **options)
        return (result[0] if isinstance(result, tuple) else result).flatten()

    for shape in ((360,), (3, 120), (120, 3), (6, 5, 4, 3), (1, 360, 1)):
        mu, std = standard(shape, device=device)
        assert torch.equal(draw(rsample, mu, std=std), noise)
        assert torch.equal(draw(rsample_kl, mu, std=std, batch_dims=0, reduction="mean"), noise)
        assert torch.equal(draw(rsample_kl, mu, std=std, prior_std=2.0, batch_dims=len(shape)), noise)
    mu, std = standard((6, 1, 4), device=device)
    assert torch.equal(draw(rsample, mu, std=torch.ones(15, 1, device=device)), noise)
    for k in (1, 2, 3, 90):
        mu, std = standard((360 // k,), device=device)
        assert torch.equal(draw(rsample, mu, std=std, num_samples=k), noise)
        assert torch.equal(draw(rsample_kl, mu, std=std, num_samples=k), noise)


@pytest.mark.parametrize("device", devices())
def test_same_draws_in_every_dtype(device: str) -> None:
    noise = reference.normal_noise(drawn_seed(7, device), 3000)
    for dtype in DTYPES:
        mu, std = standard((3000,), dtype, device)
        torch.manual_seed(7)
        z = rsample(mu, std=std)
        assert z.dtype == dtype
        # float32 rounds its noise once; half precision rounds that once more.
        info = torch.finfo(dtype)
        allowed = NOISE_ERROR[torch.float64 if dtype == torch.float64 else torch.float32]
        allowed = allowed + np.maximum(np.abs(noise), info.tiny) * info.eps / 2
        assert (np.abs(z.cpu().double().numpy() - noise) <= allowed).all()


@pytest.mark.parametrize("device", devices())
def test_generators(device: str) -> None:
    """manual_seed and generator= mean what they mean for torch.randn, and each call draws once."""
    mu, std = standard((50,), device=device)

    def generator(seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    g = generator(5)
    first, second = rsample(mu, std=std, generator=g), rsample(mu, std=std, generator=g)
    assert not torch.equal(first, second)
    again = generator(5)
    assert torch.equal(rsample_kl(mu, std=std, generator=again)[0], first)
    assert torch.equal(rsample(mu, std=std, generator=again), second)
    assert not torch.equal(rsample(mu, std=std, generator=generator(6)), first)

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    from_default = rsample(mu.cpu(), std=std)
    torch.random.set_rng_state(state)
    assert torch.equal(rsample(mu.cpu(), std=std), from_default)
    if device == "cpu":
        assert torch.equal(from_default, first)  # the default generator with the same seed
    # A generator of its own leaves the default one alone, and so does given noise.
    before = torch.random.get_rng_state()
    rsample(mu, std=std, generator=generator(1))
    rsample(mu, std=std, noise=torch.zeros_like(mu))
    elbo_ext.gaussian_kl(mu, std=std)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_are_drawn_from_all_64_bits() -> None:
    """Seeds of 32 bits, or never negative ones, would repeat far too soon."""
    torch.manual_seed(0)
    bits = np.array([int(elbo_ext.ops.draw_seed(torch.device("cpu"))) for _ in range(2000)], dtype=np.int64)
    ones = [(bits >> k & 1).mean() for k in range(64)]
    assert max(abs(p - 0.5) for p in ones) < 4.5 * 0.5 / math.sqrt(2000)


# ---- z is mu + sigma * noise ----


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("form", FORMS)
def test_sample_is_mean_plus_sigma_times_noise(form: str, device: str) -> None:
    """One multiplication and one addition per element, rounded or fused; sigma itself to 2 ulp."""
    for dtype in (torch.float32, torch.float64):
        m = Maker(dtype, device, 0)
        mu, scale = m.normal(3, 1100), m.scale(form, 3, 1100)
        seed = drawn_seed(9, device)
        torch.manual_seed(9)
        z = rsample(mu, **{form: scale}, num_samples=2)
        noise = kernel_noise(seed, z.numel(), dtype, device).reshape(z.shape).double()
        sigma = formulas.standard_deviation(scale.double(), form)
        exact = mu.double() + sigma * noise
        eps = torch.finfo(dtype).eps
        assert bool(((z.double() - exact).abs() <= eps * (exact.abs() + 3 * (sigma * noise).abs())).all())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("samples", [None, 4])
def test_backward_makes_the_same_noise_again(samples: int | None, device: str) -> None:
    """dz/dstd = eps: the gradient is the noise of the forward pass, not another one; also the second time."""
    for dtype in (torch.float32, torch.float64):
        mu = torch.zeros(3, 1100, dtype=dtype, device=device, requires_grad=True)
        std = torch.ones_like(mu, requires_grad=True)
        z = rsample(mu, std=std, num_samples=samples)
        rsample(mu, std=std)  # a draw in between must not matter
        torch.manual_seed(123)
        upstream = torch.zeros_like(z)
        upstream[(slice(None),) * (z.dim() - 1) + (slice(0, None, 3),)] = 1.0
        for _ in range(2):
            (dstd,) = torch.autograd.grad(z, std, upstream, retain_graph=True)
            exact = (z.detach() * upstream).double()
            exact = exact if samples is None else exact.sum(0)
            eps = torch.finfo(dtype).eps
            assert bool(((dstd.double() - exact).abs() <= (samples or 0) * 4 * eps).all())


# ---- statistics ----

N = 1_000_000


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("seed", [0, -123456789012345])
def test_noise_is_standard_normal(seed: int, device: str) -> None:
    """Moments, distribution and tails of a million numbers. Bounds are 4.5 standard errors at fixed seeds."""
    eps = kernel_noise(seed, N, device=device).cpu().double().numpy()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)]:
        assert abs((eps**power).mean() - moment) < 4.5 * math.sqrt(variance / N)
    assert scipy.stats.kstest(eps, "norm").pvalue > 1e-3
    for position in range(4):  # each place in a Philox block by itself, its tails too
        part = eps[position::4]
        assert scipy.stats.kstest(part, "norm").pvalue > 1e-3
        expected = part.size * 2 * scipy.stats.norm.sf(3.5)
        assert abs((abs(part) > 3.5).sum() - expected) < 4.5 * math.sqrt(expected)
    assert len(np.unique(eps)) > 0.9 * N  # float32 has room for that many


@pytest.mark.parametrize("device", devices())
def test_noise_is_uncorrelated(device: str) -> None:
    """Between neighbours, vector lanes, tiles, samples of one call, seeds; of the numbers and of their squares."""
    eps = kernel_noise(3, N, device=device).cpu().double().numpy()
    bound = 4.5 / math.sqrt(N)
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 1024, 4096, 8192):
        for a in (eps, eps**2):  # the two values of one Box-Muller pair share their radius
            r = np.corrcoef(a[lag:], a[:-lag])[0, 1]
            assert abs(r) < bound * math.sqrt(N / (N - lag)), lag
    for other in (4, -3, 3 + 2**32, 3 - 2**63):  # neighbouring seeds, and seeds that differ in one half alone
        stream = kernel_noise(other, N, device=device).cpu().double().numpy()
        assert abs(np.corrcoef(eps, stream)[0, 1]) < bound
        assert abs(np.corrcoef(eps**2, stream**2)[0, 1]) < bound
        assert not np.isin(stream[:1000], eps[:1000]).all()


@pytest.mark.parametrize("device", devices())
def test_samples_have_the_moments_of_their_distribution(device: str) -> None:
    """End to end, by public functions alone: mean, variance, and no correlation between samples, dimensions, calls."""
    torch.manual_seed(0)
    mu, std = torch.tensor([0.5, -2.0, 10.0], device=device), torch.tensor([0.1, 1.0, 3.0], device=device)
    k = 300_000
    first, second = (rsample(mu, std=std, num_samples=k).cpu().double() for _ in range(2))
    unit = (first - mu.cpu()) / std.cpu()
    assert bool((unit.mean(0).abs() < 4.5 / math.sqrt(k)).all())
    assert bool(((unit**2).mean(0) - 1).abs().max() < 4.5 * math.sqrt(2 / k))
    other = (second - mu.cpu()) / std.cpu()
    for a, b in (
        (unit[:, 0], unit[:, 1]),
        (unit[:, 1], unit[:, 2]),
        (unit[1:, 0], unit[:-1, 2]),
        (unit[:, 0], other[:, 0]),
    ):
        assert abs((a * b).mean()) < 4.5 / math.sqrt(len(a))


# ---- a generator for each example ----


def generators(count: int, device: str) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(100 + i) for i in range(count)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("num_samples", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_generator_for_each_example(dtype: torch.dtype, num_samples: int | None, device: str) -> None:
    """Each example draws what it would draw alone, whatever the batch around it."""
    m = Maker(dtype, device, 0)
    q = {"mu": m.normal(4, 3, 5), "std": m.scale("std", 5), "prior_mu": m.normal(4, 1, 1)}
    for name in ("rsample", "rsample_kl", "rsample_with_log_prob"):
        given = {key: t for key, t in q.items() if name != "rsample" or key != "prior_mu"}
        function, in_python = getattr(elbo_ext, name), getattr(reference, name)
        results = function(**given, num_samples=num_samples, generator=generators(4, device))
        results = [results] if isinstance(results, Tensor) else list(results)
        for i, generator in enumerate(generators(4, device)):
            alone = {key: t[i : i + 1] if t.dim() == 3 else t for key, t in given.items()}
            expected = function(**alone, num_samples=num_samples, generator=generator)
            expected = [expected] if isinstance(expected, Tensor) else list(expected)
            for k, (got, one) in enumerate(zip(results, expected, strict=True)):
                axis = 0 if num_samples is None or (name == "rsample_kl" and k == 1) else 1
                torch.testing.assert_close(got.narrow(axis, i, 1), one, rtol=1e-6, atol=1e-6)
                if k == 0:
                    assert torch.equal(got.narrow(axis, i, 1), one)
        wide = {key: t.double() for key, t in given.items()}  # on its device, which is that of the generators
        truth = in_python(**wide, num_samples=num_samples, generator=generators(4, device))
        truth = truth if isinstance(truth, Tensor) else truth[0]
        torch.testing.assert_close(
            results[0].double(), truth, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2
        )


def test_a_generator_for_each_example_has_the_gradients_of_its_noise() -> None:
    m = Maker(torch.float64, "cpu", 0)
    mu, std = m.normal(3, 4).requires_grad_(), m.scale("std", 3, 4).requires_grad_()
    z, kl = elbo_ext.rsample_kl(mu, std=std, generator=generators(3, "cpu"))
    noise = ((z - mu) / std).detach()
    torch.testing.assert_close(*(
        torch.autograd.grad((z * z).sum() + (kl * kl).sum(), (mu, std))
        for z, kl in ((z, kl), elbo_ext.rsample_kl(mu, std=std, noise=noise))
    ))  # fmt: skip


def test_no_examples_and_no_generators() -> None:
    assert elbo_ext.rsample(torch.zeros(0, 3), 0.0, num_samples=2, generator=[]).shape == (2, 0, 3)
