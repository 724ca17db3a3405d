"""What the experiments of python -m elbo_ext.demo bound are made of: two models, and estimates with their errors.

A linear Gaussian model, where ln p(x), the posterior and every bound have closed forms, and a VAE on binarized digits,
where ln p(x) is estimated from many samples. All in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import elbo_ext

from ... import bounds, diagnostics
from ..vae import VAE, log_likelihood_of, progress_bar, seeded, train

SIGMAS = 4.5
"""A correct run fails one of its hundred or so comparisons with probability below 0.001."""
ZERO_VARIANCE = 1e-20
"""What float64's rounding leaves of a variance that is zero, of gradients near 1."""
ROWS = 2**16
"""So many rows at once go through a decoder."""


@dataclass(frozen=True)
class Size:
    """How much work the experiments do."""

    largest_count: int  # K
    repetitions: int  # of each gradient
    rows: int  # samples of the linear model per K
    steps: int  # of the ascents by Adam
    epochs: int
    images: int  # of the training and of the test set, in the measurements
    evidence_samples: int
    betas: tuple[float, ...]

    @property
    def counts(self) -> list[int]:
        return [2**n for n in range(self.largest_count.bit_length())]


FULL = Size(256, 16000, 2**20, 500, 80, 128, 8000, (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0))
QUICK = Size(32, 4000, 2**17, 300, 6, 32, 1000, (0.1, 1.0, 30.0))


@dataclass(frozen=True)
class Check:
    """A statement, the numbers that were measured, and whether they agree with it."""

    statement: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Finding:
    """An experiment's result; `numbers` and the names of `checks` go to bound.json."""

    numbers: dict[str, Any]
    checks: dict[str, Check] = field(default_factory=dict)


class Estimate(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float

    def __sub__(self, other: Any) -> Estimate:
        other = other if isinstance(other, Estimate) else Estimate(other, 0.0)
        return Estimate(self.value - other.value, math.hypot(self.error, other.error))

    @property
    def not_negative(self) -> bool:
        return self.value >= -SIGMAS * self.error

    @property
    def zero(self) -> bool:
        return abs(self.value) <= SIGMAS * self.error


def estimate(repetitions: Tensor) -> Estimate:
    """Mean over the repetitions on axis 0 of the mean over the examples on the other axes."""
    values = repetitions.double().flatten(1).mean(1) if repetitions.dim() > 1 else repetitions.double()
    return Estimate(values.mean().item(), (values.std() / math.sqrt(len(values))).item())


def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """The items, with a bar if there is a terminal."""
    bar: Iterable[Any] = progress_bar(items, desc=f"{label:<28}", disable=None)
    return bar


# --- the models ---------------------------------------------------------------------------------------------


def linear_gaussian(
    features: int, latent: int, seed: int, device: Any = "cpu", *, orthogonal: bool = False
) -> bounds.LinearGaussian:
    """LinearGaussian in float64: random loadings, or orthogonal ones, with which the posterior is diagonal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(features, latent, generator=generator, dtype=torch.float64)
    if orthogonal:
        weight = torch.linalg.qr(weight).Q * torch.linspace(0.5, 2, latent, dtype=torch.float64)
    else:
        weight = weight / math.sqrt(latent)
    return bounds.LinearGaussian(weight.to(device), std=1.0)


def data_of(model: bounds.LinearGaussian, count: int) -> Tensor:
    """x [count, D] from p(x)."""
    features, latent = model.weight.shape
    recon = model.decode(torch.randn(count, latent, dtype=model.dtype, device=model.device))
    return recon + model.std * torch.randn(count, features, dtype=model.dtype, device=model.device)


@torch.no_grad()
def repeated(bound: Callable[..., Tensor], mu: Tensor, logvar: Tensor, num_samples: int, repetitions: int) -> Tensor:
    """[repetitions, *batch] values of an estimator of the bound, as many at once as ROWS allows."""
    most = max(1, ROWS // (num_samples * mu.shape[:-1].numel()))
    parts = []
    for first in range(0, repetitions, most):
        shape = (min(most, repetitions - first), *mu.shape)
        parts.append(bound(mu.expand(shape), logvar.expand(shape), num_samples=num_samples, batch_dims=mu.dim()))
    return torch.cat(parts)


def log_weights(
    log_likelihood: Callable[[Tensor], Tensor], mu: Tensor, logvar: Tensor, num_samples: int
) -> Iterator[Tensor]:
    """ln w [K, *batch] in chunks, for elbo_ext.diagnostics."""
    chunk = max(1, ROWS // len(mu))
    for first in range(0, num_samples, chunk):
        count = min(chunk, num_samples - first)
        z, log_q, log_p = elbo_ext.rsample_with_log_prob(mu, logvar, num_samples=count)
        yield log_likelihood(z) + log_p - log_q


def evidence(log_weights: Iterable[Tensor]) -> Estimate:
    """The mean of ln p(x) over the examples."""
    per_example = diagnostics.log_evidence(log_weights)
    error = per_example.standard_error.square().sum().sqrt() / len(per_example.value)
    return Estimate(per_example.value.mean().item(), error.item())


class Digits(NamedTuple):
    """A VAE trained on binary images, and what was measured on its way."""

    model: VAE
    train: Tensor
    test: Tensor
    training: dict[str, list[float]]


def train_vae(data: Tensor, size: Size, seed: int, *, beta: float = 1.0, bar: Any = None, **more: Any) -> VAE:
    """A small VAE, trained with beta-VAE's loss, which is minus the ELBO at beta = 1."""
    with seeded(data.device, seed):
        model = VAE(data.cpu(), hidden=128, latent=10, likelihood="bernoulli").to(data.device)
    if more:
        more = {"after_epoch": partial(more["after_epoch"], model)}
        more["after_epoch"]({"epoch": 0})
    loss = SimpleNamespace(rsample_kl=elbo_ext.rsample_kl, elbo_loss=partial(elbo_ext.elbo_loss, beta=beta))
    train(model, data, loss, epochs=size.epochs, batch_size=64, learning_rate=1e-3, seed=seed, bar=bar, **more)
    return model


def train_digits(train_data: Tensor, test_data: Tensor, size: Size, seed: int) -> Digits:
    """The VAE of statements (a), (c) and (d), with ELBO, ln p(x) and their gap on test images along the way."""
    x = test_data[: size.images]
    epochs = sorted({round(size.epochs ** (n / 10)) for n in range(11)} | {0})
    training: dict[str, list[float]] = {
        name: [] for name in ("epoch", "elbo", "elbo_error", "log_px", "log_px_error", "gap", "gap_error")
    }

    def measure(model: VAE, record: dict[str, float]) -> None:
        if record["epoch"] not in epochs:
            return
        with seeded(x.device, seed), torch.no_grad():
            mu, logvar = model.encode(x)
            likelihood = log_likelihood_of(model, x, elbo_ext)
            weights = list(log_weights(likelihood, mu, logvar, size.evidence_samples))
            log_px = evidence(weights)
            # With draws of its own and the KL in closed form: the difference may come out negative.
            draws = repeated(partial(bounds.sgvb_b, likelihood), mu, logvar, 1, size.evidence_samples // 8)
            elbo = estimate(draws)
            gap = diagnostics.elbo_gap(weights, elbo=draws.double().mean(0)).mean().item()
        new = (record["epoch"], *elbo, *log_px, gap, math.hypot(elbo.error, log_px.error))
        for values, value in zip(training.values(), new, strict=True):
            values.append(value)

    total = size.epochs * (len(train_data) // 64)
    with progress_bar(total=total, desc=f"{'VAE on digits':<28}", disable=None) as bar:
        model = train_vae(train_data, size, seed, bar=bar, after_epoch=measure)
    return Digits(model, train_data, test_data, training)
