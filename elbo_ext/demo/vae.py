"""The demo's variational autoencoder: model, training, evaluation, and the timing of a step.

Every function takes `ops`, where the ELBO comes from: the package itself (fused kernels),
`elbo_ext.reference`, or `EAGER`, the formulas as users write them by hand.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROGRESS_SECONDS = 0.2 if sys.stderr.isatty() else 5.0
"""How often a progress bar is drawn: in a log file every line stays."""


class DemoError(Exception):
    """What the user asked for cannot be done; the message is one sentence."""


def progress_bar(*args: Any, **options: Any) -> Any:
    """A tqdm bar that suits a terminal and a log file."""
    import tqdm

    bar: Any = tqdm.tqdm  # its overloads ask for more than Any
    return bar(*args, dynamic_ncols=True, mininterval=PROGRESS_SECONDS, **options)


# --- the model ----------------------------------------------------------------------------------------------


class VAE(nn.Module):
    """MLP encoder and decoder, two hidden layers each; x [B, D], z [..., L].

    Inputs are centred and scaled by the training data's mean and standard deviation, and a Gaussian decoder's
    mean is scaled back, so that data of any range train alike. The Gaussian's log-variance is one learned
    number.
    """

    def __init__(self, train: Tensor, hidden: int, latent: int, likelihood: str) -> None:
        super().__init__()
        pixels = train.shape[1]
        self.likelihood = likelihood
        self.encoder = nn.Sequential(
            nn.Linear(pixels, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, pixels),
        )
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", train.mean())
        self.register_buffer("scale", train.std(unbiased=False))
        if likelihood == "gaussian":
            self.recon_logvar = nn.Parameter(2 * self.scale.log())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, D] -> mu, logvar [B, L] of q(z|x)."""
        mu, logvar = self.encoder((x - self.center) / self.scale).chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """z [..., L] -> recon [..., D]: the Gaussian's mean, or the Bernoulli's logits."""
        out: Tensor = self.decoder(z)
        return self.center + self.scale * out if self.likelihood == "gaussian" else out

    def pixels(self, z: Tensor) -> Tensor:
        """z [..., L] -> E[x|z] [..., D]."""
        return self.decode(z) if self.likelihood == "gaussian" else self.decode(z).sigmoid()

    def likelihood_options(self) -> dict[str, Any]:
        """The keyword arguments of `elbo_loss` that describe p(x|z)."""
        if self.likelihood == "gaussian":
            return {"likelihood": "gaussian", "recon_logvar": self.recon_logvar}
        return {"likelihood": "bernoulli"}

    def likelihood_parameters(self) -> list[nn.Parameter]:
        """Those of p(x|z) that no network gives."""
        return [self.recon_logvar] if self.likelihood == "gaussian" else []

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Adam; the likelihood's own parameters, few numbers with far to go, have ten times the weights' rate."""
        groups: list[dict[str, Any]] = [{"params": [*self.encoder.parameters(), *self.decoder.parameters()]}]
        if own := self.likelihood_parameters():
            groups.append({"params": own, "lr": 10 * learning_rate})
        return torch.optim.Adam(groups, lr=learning_rate, fused=True)


def elbo(model: VAE, x: Tensor, ops: Any) -> Any:
    """ELBO(loss, log_likelihood, kl), means over the batch x [B, D], with the functions of `ops`.

    `ops`: see the top of this module.
    """
    mu, logvar = model.encode(x)
    z, kl = ops.rsample_kl(mu, logvar)
    return ops.elbo_loss(model.decode(z), x, kl=kl, **model.likelihood_options())


def log_likelihood_of(model: VAE, x: Tensor, ops: Any) -> Callable[[Tensor], Tensor]:
    """ln p(x|z) in nats of the examples x [B, D], as a function of z [..., B, L] -> [..., B]."""
    options = model.likelihood_options()

    def log_likelihood(z: Tensor) -> Tensor:
        of_samples = {"batch_dims": z.dim() - 1, "reduction": "none"}
        value: Tensor = ops.elbo_loss(model.decode(z), x, kl=x.new_zeros(()), **options, **of_samples).log_likelihood
        return value

    return log_likelihood


class EagerELBO(NamedTuple):
    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor


def eager_rsample_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """z and KL as they stand in most VAE code."""
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)
    return z, kl


def eager_elbo_loss(recon: Tensor, x: Tensor, *, kl: Tensor, likelihood: str, recon_logvar: Any = 0.0) -> EagerELBO:
    """Minus the ELBO as it stands in most VAE code."""
    if likelihood == "bernoulli":
        log_likelihood = -F.binary_cross_entropy_with_logits(recon, x, reduction="none").sum(dim=1)
    else:
        error = (x - recon).pow(2) * torch.exp(-recon_logvar)
        log_likelihood = -0.5 * (error + recon_logvar + math.log(2 * math.pi)).sum(dim=1)
    return EagerELBO((kl - log_likelihood).mean(), log_likelihood.mean(), kl.mean())


EAGER = SimpleNamespace(rsample_kl=eager_rsample_kl, elbo_loss=eager_elbo_loss)
"""What users write by hand in PyTorch, under the package's names: what the kernels are timed against."""


# --- training -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class History:
    """One training: the loss of every step, and per epoch the means of the training batches."""

    losses: list[float] = dataclasses.field(default_factory=list)
    epochs: list[dict[str, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def train(
    model: VAE,
    data: Tensor,
    ops: Any,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    compiled: bool = False,
    after_epoch: Callable[[dict[str, float]], None] | None = None,
    label: str = "",
    bar: Any = None,
) -> History:
    """Adam on shuffled batches (an epoch's remainder is dropped); order and noise depend on `seed` alone.

    after_epoch may add to the epoch's record and must leave torch's default generator alone. torch's global
    random state is the same afterwards as before. bar: counts the steps in place of a bar of this training's
    own. Raises DemoError when the loss stops being finite.
    """
    history = History()
    optimizer = model.optimizer(learning_rate)
    order = torch.Generator().manual_seed(seed)

    def forward(x: Tensor) -> Any:
        return elbo(model, x, ops)

    if compiled:
        forward = torch.compile(forward, fullgraph=True, dynamic=False)
    steps = len(data) // batch_size
    own = progress_bar(total=epochs * steps, desc=label, unit="step") if bar is None else None
    start, paused = time.perf_counter(), 0.0
    with seeded(data.device, seed), contextlib.nullcontext(bar) if own is None else own as shown:
        for epoch in range(1, epochs + 1):
            values = []
            indices = torch.randperm(len(data), generator=order)[: steps * batch_size].to(data.device)
            for batch in indices.split(batch_size):
                result = forward(data[batch])
                optimizer.zero_grad(set_to_none=True)
                result.loss.backward()
                optimizer.step()
                values.append(torch.stack([field.detach() for field in result]))
                shown.update()
            table = torch.stack(values).double().cpu()  # the epoch's only synchronization
            if not torch.isfinite(table).all():
                raise DemoError(
                    f"the training diverged in epoch {epoch}: its loss is no longer finite; "
                    f"try a smaller --learning-rate"
                )
            loss, log_likelihood, kl = table.mean(dim=0).tolist()
            history.losses += table[:, 0].tolist()
            history.epochs.append({"epoch": epoch, "elbo": -loss, "log_likelihood": log_likelihood, "kl": kl})
            shown.set_postfix_str(
                f"epoch {epoch}, loss {loss:.2f}, log-likelihood {log_likelihood:.2f}, KL {kl:.2f}",
                refresh=False,
            )
            if after_epoch:
                pause = time.perf_counter()
                after_epoch(history.epochs[-1])
                paused += time.perf_counter() - pause
    history.seconds = time.perf_counter() - start - paused
    return history


def relative_differences(losses: Sequence[float], expected: Sequence[float]) -> np.ndarray:
    """|a - b| / max(|b|, 1 nat) per step: a log-density may cross zero, where a plain ratio says nothing."""
    a, b = np.asarray(losses), np.asarray(expected)
    count = min(len(a), len(b))
    a, b = a[:count], b[:count]
    differences: np.ndarray = np.abs(a - b) / np.maximum(np.abs(b), 1)
    return differences


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """torch.manual_seed(seed) inside, the caller's random state again afterwards."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


# --- evaluation ---------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: VAE,
    x: Tensor,
    ops: Any,
    *,
    num_samples: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Means over the images x [N, D], K = num_samples draws of z each, in nats.

    Returns log_likelihood, kl (analytic) and elbo = log_likelihood - kl; log_px, the importance-weighted
    estimate mean_x log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) (Burda, Grosse & Salakhutdinov, ICLR 2016), a
    lower bound of log p(x) that is at least as high as the ELBO; and kl_monte_carlo from the same draws, with
    its standard error. No array has more than 8,192 rows, so any K and N fit in memory. progress is told how
    many (image, sample) pairs were done.
    """
    generator = torch.Generator(device=x.device).manual_seed(seed)
    rows = 8192
    totals = torch.zeros(5, dtype=torch.float64, device=x.device)
    for block in x.split(256):
        mu, logvar = model.encode(block)
        zeros = torch.zeros_like(mu)
        log_likelihood_of_block = log_likelihood_of(model, block, ops)
        log_sum = torch.full((len(block),), -torch.inf, dtype=torch.float64, device=x.device)
        likelihood_sum, ratio_sum, square_sum = (torch.zeros_like(log_sum) for _ in range(3))
        left, step = num_samples, max(1, rows // len(block))
        while left:
            count = min(step, left)
            z, kl = ops.rsample_kl(mu, logvar, num_samples=count, generator=generator)
            log_likelihood = log_likelihood_of_block(z).double()
            log_ratio = (
                ops.gaussian_log_prob(z, mu, logvar, batch_dims=2) - ops.gaussian_log_prob(z, zeros, batch_dims=2)
            ).double()  # log q(z|x) - log p(z)
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_likelihood - log_ratio, dim=0))
            likelihood_sum += log_likelihood.sum(dim=0)
            ratio_sum += log_ratio.sum(dim=0)
            square_sum += log_ratio.square().sum(dim=0)
            left -= count
            if progress:
                progress(count * len(block))
        variance = (square_sum / num_samples - (ratio_sum / num_samples).square()).clamp(min=0) / num_samples
        totals += torch.stack(
            [
                likelihood_sum.sum() / num_samples,
                kl.double().sum(),
                (log_sum - math.log(num_samples)).sum(),
                ratio_sum.sum() / num_samples,
                variance.sum(),
            ]
        )
    log_likelihood, kl, log_px, kl_monte_carlo, variance = totals.tolist()
    log_likelihood, kl = log_likelihood / len(x), kl / len(x)
    return {
        "elbo": log_likelihood - kl,
        "log_likelihood": log_likelihood,
        "kl": kl,
        "log_px": log_px / len(x),
        "kl_monte_carlo": kl_monte_carlo / len(x),
        "kl_monte_carlo_error": math.sqrt(variance) / len(x),
        "num_samples": num_samples,
    }


# --- timing -------------------------------------------------------------------------------------------------


def interleaved_medians(
    work: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 40,
    seconds_a_round: float = 0.004,
) -> dict[str, dict[str, float]]:
    """Microseconds per call of functions that take turns: median, 10th and 90th percentile of rounds."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def time_calls(function: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    calls = {}
    for name, function in work.items():
        time_calls(function, 5)  # warm up
        calls[name] = max(1, round(seconds_a_round / time_calls(function, 3)))
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            times[name].append(1e6 * time_calls(function, calls[name]))
    return {
        name: dict(zip(("p10_us", "median_us", "p90_us"), np.percentile(values, (10, 50, 90)).tolist(), strict=True))
        for name, values in times.items()
    }


def time_loss_part(
    model: VAE, x: Tensor, ops: dict[str, Any], *, compiled: Sequence[str] = (), slow: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Sample + KL + likelihood, forward and backward, on fixed tensors of a training step's shapes.

    There is no network: the gradient that the decoder would send back to z is a fixed tensor. The entries of
    `ops` take turns; those named in `compiled` also do under torch.compile, as "<name>_compiled"; those in
    `slow` are timed by themselves.
    """
    with torch.no_grad():
        mu, logvar = model.encode(x)
        recon = model.decode(mu)
    z_gradient = torch.full_like(mu, 1 / len(x))
    inputs = [tensor.clone().requires_grad_() for tensor in (mu, logvar, recon)]
    options = model.likelihood_options()
    if "recon_logvar" in options:
        options["recon_logvar"] = options["recon_logvar"].detach().clone().requires_grad_()
        inputs.append(options["recon_logvar"])

    def variant(functions: Any, compile_it: bool = False) -> Callable[[], object]:
        def forward(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            z, kl = functions.rsample_kl(mu, logvar)
            return functions.elbo_loss(recon, x, kl=kl, **options).loss, z

        if compile_it:
            forward = torch.compile(forward, fullgraph=True, dynamic=False)

        def step() -> object:
            loss, z = forward(inputs[0], inputs[1], inputs[2], x)
            return torch.autograd.grad([loss, z], inputs, [None, z_gradient])

        return step

    work = {name: variant(functions) for name, functions in ops.items() if name not in slow}
    work |= {f"{name}_compiled": variant(ops[name], True) for name in compiled}
    with seeded(x.device, 0):
        times = interleaved_medians(work, x.device)
        for name in slow:
            times |= interleaved_medians({name: variant(ops[name])}, x.device, rounds=5)
    return times


def time_whole_step(model: VAE, x: Tensor, ops: dict[str, Any], learning_rate: float) -> dict[str, dict[str, float]]:
    """The same comparison for a whole training step: encoder, decoder and Adam included, nothing compiled."""

    def variant(functions: Any) -> Callable[[], object]:
        network = copy.deepcopy(model)
        optimizer = network.optimizer(learning_rate)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            elbo(network, x, functions).loss.backward()
            optimizer.step()

        return step

    with seeded(x.device, 0):
        work = {name: variant(functions) for name, functions in ops.items()}
        return interleaved_medians(work, x.device, seconds_a_round=0.01)
