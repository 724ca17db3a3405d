"""Who is measured: the same works as users write them, as torch offers them, and with elbo_ext.

`likelihood` and `kl` return what is minimized: minus the log-likelihood and the KL, summed over elements and averaged
over examples. `recon_logvar` is None where the variance is fixed to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

import elbo_ext

from .cases import FORWARD, RESULTS, Buffers, Case, traffic

LOG_2PI = math.log(2 * math.pi)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Eager:
    """Written by hand: sample and KL of pytorch/examples (vae/main.py), Gaussian of diffusers and latent-diffusion."""

    def sampling(self, mu: Tensor, logvar: Tensor, samples: int | None = None) -> Tensor:
        std = torch.exp(0.5 * logvar)
        return mu + self.noise(std, samples) * std

    def noise(self, std: Tensor, samples: int | None) -> Tensor:
        if samples is None:
            return torch.randn_like(std)
        return torch.randn(samples, *std.shape, dtype=std.dtype, device=std.device)

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(mu)

    def sampling_kl(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return self.sampling(mu, logvar), self.kl(mu, logvar)

    def log_weights(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        std = torch.exp(0.5 * logvar)
        z = mu + torch.randn_like(std) * std
        log_q = -0.5 * (((z - mu) / std).pow(2) + logvar + LOG_2PI)
        log_p = -0.5 * (z.pow(2) + LOG_2PI)
        return torch.sum(log_q - log_p) / len(mu), z

    def importance(self, mu: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        std = torch.exp(0.5 * logvar)
        z = mu + self.noise(std, samples) * std
        log_q = -0.5 * torch.sum(((z - mu) / std).pow(2) + logvar + LOG_2PI, -1)
        log_p = -0.5 * torch.sum(z.pow(2) + LOG_2PI, -1)
        return -torch.mean(torch.logsumexp(log_p - log_q, 0) - math.log(samples)), z

    def likelihood(
        self, x: Tensor, recon: Tensor, recon_logvar: Tensor | None = None, likelihood: str = "gaussian"
    ) -> Tensor:
        if likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(recon, x, reduction="sum") / len(x)
        return self.gaussian(x, recon, recon_logvar) / len(x)

    def gaussian(self, x: Tensor, recon: Tensor, recon_logvar: Tensor | None) -> Tensor:
        if recon_logvar is None:
            return 0.5 * (F.mse_loss(recon, x, reduction="sum") + x.numel() * LOG_2PI)
        return 0.5 * torch.sum((x - recon).pow(2) / torch.exp(recon_logvar) + recon_logvar + LOG_2PI)

    def step(
        self,
        x: Tensor,
        recon: Tensor,
        mu: Tensor,
        logvar: Tensor,
        recon_logvar: Tensor | None = None,
        likelihood: str = "gaussian",
    ) -> tuple[Tensor, Tensor]:
        z, kl = self.sampling_kl(mu, logvar)
        return self.likelihood(x, recon, recon_logvar, likelihood) + kl, z


class Distributions(Eager):
    """torch.distributions with its default argument checks."""

    def sampling(self, mu: Tensor, logvar: Tensor, samples: int | None = None) -> Tensor:
        return Normal(mu, torch.exp(0.5 * logvar)).rsample(() if samples is None else (samples,))

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum() / len(mu)

    def sampling_kl(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        posterior = Normal(mu, torch.exp(0.5 * logvar))
        return posterior.rsample(), kl_divergence(posterior, Normal(0.0, 1.0)).sum() / len(mu)

    def log_weights(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        posterior = Normal(mu, torch.exp(0.5 * logvar))
        z = posterior.rsample()
        return (posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum() / len(mu), z

    def importance(self, mu: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        posterior = Normal(mu, torch.exp(0.5 * logvar))
        z = posterior.rsample((samples,))
        log_weights = (Normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z)).sum(-1)
        return -(log_weights.logsumexp(0) - math.log(samples)).mean(), z

    def likelihood(
        self, x: Tensor, recon: Tensor, recon_logvar: Tensor | None = None, likelihood: str = "gaussian"
    ) -> Tensor:
        if likelihood == "bernoulli":
            decoded = Bernoulli(logits=recon)
        else:
            decoded = Normal(recon, 1.0 if recon_logvar is None else torch.exp(0.5 * recon_logvar))
        return -decoded.log_prob(x).sum() / len(x)


class GaussianNLLLoss(Eager):
    """F.gaussian_nll_loss for the likelihood, the rest by hand."""

    def gaussian(self, x: Tensor, recon: Tensor, recon_logvar: Tensor | None) -> Tensor:
        variance = 1.0 if recon_logvar is None else torch.exp(recon_logvar)
        return F.gaussian_nll_loss(recon, x, variance, full=True, reduction="sum")


class Ours:
    """elbo_ext, as README says to use it."""

    def sampling(self, mu: Tensor, logvar: Tensor, samples: int | None = None) -> Tensor:
        return elbo_ext.rsample(mu, logvar, num_samples=samples)

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return elbo_ext.gaussian_kl(mu, logvar, reduction="mean")

    def log_weights(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z, log_q, log_p = elbo_ext.rsample_with_log_prob(mu, logvar)
        return (log_q - log_p).mean(), z

    def importance(self, mu: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        z, log_q, log_p = elbo_ext.rsample_with_log_prob(mu, logvar, num_samples=samples)
        return -elbo_ext.bounds.iwae_bound(log_p - log_q, reduction="mean"), z

    def likelihood(
        self, x: Tensor, recon: Tensor, recon_logvar: Tensor | None = None, likelihood: str = "gaussian"
    ) -> Tensor:
        if likelihood == "bernoulli":
            return -elbo_ext.bernoulli_log_prob(x, recon, reduction="mean")
        return -elbo_ext.gaussian_log_prob(x, recon, recon_logvar, reduction="mean")

    def step(
        self,
        x: Tensor,
        recon: Tensor,
        mu: Tensor,
        logvar: Tensor,
        recon_logvar: Tensor | None = None,
        likelihood: str = "gaussian",
    ) -> tuple[Tensor, Tensor]:
        z, kl = elbo_ext.rsample_kl(mu, logvar)
        return elbo_ext.elbo_loss(recon, x, kl=kl, likelihood=likelihood, recon_logvar=recon_logvar).loss, z


FORMULAS = {
    "ours": Ours,
    "ours-compiled": Ours,
    "eager": Eager,
    "eager-compiled": Eager,
    "distributions": Distributions,
    "nll-loss": GaussianNLLLoss,
}
COPY, EMPTY = "copy", "empty"
WORKS = (*FORMULAS, COPY, EMPTY)
"""Who takes part in works, and who in whole training steps (training.py)."""
SHIPPED, SHIPPED_COMPILED, NO_LOSS = "shipped", "shipped-compiled", "no-loss"
TRAINING = ("ours", SHIPPED, SHIPPED_COMPILED, NO_LOSS)
CONTENDERS = tuple(dict.fromkeys((*WORKS, *TRAINING)))
LIMITS = (COPY, EMPTY, NO_LOSS)
"""They compute nothing: what the memory, the calls alone and the networks alone cannot do without."""


def unfit(contender: str, case: Case) -> str | None:
    """Why a contender has no part in a case, or None."""
    if contender == "nll-loss":
        if case.data is None:
            return f"F.gaussian_nll_loss has no part in {case.work}"
        if case.bernoulli:
            return "F.gaussian_nll_loss is for Gaussians"
        if case.variance in ("scalar", "per-channel"):
            return "F.gaussian_nll_loss takes no variance that many elements share"
    return None


Run = Callable[[], Sequence[Tensor]]


def prepare(contender: str, case: Case, direction: str) -> Callable[[Buffers], Run]:
    """What makes, from a set of buffers, the call that the clock sees. It returns the results, for the caller to hold.

    A compiled contender compiles in its first calls.
    """
    if contender == COPY:
        return lambda buffers: _copy(case, direction, buffers)
    if contender == EMPTY:
        return partial(_empty, case)
    function = getattr(FORMULAS[contender](), case.work)
    if contender.endswith("-compiled"):
        function = torch.compile(function, fullgraph=True, dynamic=False)
    options = {"likelihood": "bernoulli"} if case.bernoulli else {}
    if case.samples is not None:
        options["samples"] = case.samples
    single = len(RESULTS[case.work]) == 1

    def bind(buffers: Buffers) -> Run:
        arguments = {**buffers.operands, **options}
        upstream = [buffers.grad_z if name == "z" else None for name in RESULTS[case.work]]

        def forward() -> Sequence[Tensor]:
            results = function(**arguments)
            return (results,) if single else results

        def both() -> Sequence[Tensor]:
            results = forward()
            torch.autograd.backward(results, upstream)
            return results

        return forward if direction == FORWARD else both

    return bind


def _copy(case: Case, direction: str, buffers: Buffers) -> Run:
    """The limit: as many arrays of each shape read, and as many written to fresh memory, as the work cannot do without.

    Where an array is read for each one written, that is a copy; a second array to read makes it a sum of two; what is
    left to read goes into a maximum, and where nothing of its shape is read an array is filled with a number. All as
    integers of the elements' size, so that a sum costs no more than a copy.
    """
    integers: dict[tuple[int, ...], list[Tensor]] = {}
    for t in [
        *buffers.operands.values(),
        *([buffers.grad_z] if direction != FORWARD and buffers.grad_z is not None else []),
    ]:
        integers.setdefault(tuple(t.shape), []).append(t.detach().view(INTEGERS[t.element_size()]))
    first = next(iter(buffers.operands.values()))
    fill = partial(torch.full, dtype=INTEGERS[first.element_size()], device=first.device)
    parts: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []
    for shape, (_, written) in traffic(case, direction).counts().items():
        arrays = integers.get(shape, [])
        surplus = arrays[written:]
        for array in arrays[:written]:
            parts.append((torch.add, (array, surplus.pop())) if surplus else (torch.clone, (array,)))
        parts += [(torch.amax, (array,)) for array in surplus]
        parts += [(fill, (shape, 1))] * (written - len(arrays))

    return lambda: [function(*arrays) for function, arrays in parts]


class _Allocation(torch.autograd.Function):
    """Allocates results of the given shapes in the forward pass, and the gradients of its operands in the backward."""

    @staticmethod
    def forward(ctx: Any, shapes: Sequence[tuple[int, ...]], *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)
        return tuple(operands[0].new_empty(shape) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(operand) if needed else None for operand, needed in wanted)


def _empty(case: Case, buffers: Buffers) -> Run:
    """The limit of small works, forward and backward: the autograd functions that a work is made of, and the draw of a
    seed where it has noise, with nothing computed. Two of them, one after the other, for a step and for an
    importance-weighted bound, else one."""
    operands = buffers.operands
    latent = [operands[name] for name in ("mu", "logvar") if name in operands]
    data = [operands[name] for name in ("x", "recon", "recon_logvar") if name in operands]
    upstream = [buffers.grad_z if name == "z" else None for name in RESULTS[case.work]]
    noisy = "z" in RESULTS[case.work]

    def run() -> Sequence[Tensor]:
        if noisy:
            torch.randint(-(2**63), 2**63 - 1, (1,), device=latent[0].device)
        if case.work == "sampling":
            results = _Allocation.apply((case.z,), *latent)
        elif case.work == "log_weights":
            results = _Allocation.apply(((), case.z), *latent)
        elif noisy:
            of_examples = case.z[:1] if case.samples is None else case.z[:2]
            z, of_example = _Allocation.apply((case.z, of_examples), *latent)
            results = *_Allocation.apply(((),), *data, of_example), z
        else:
            results = _Allocation.apply(((),), *latent, *data)
        torch.autograd.backward(results, upstream)
        return results

    return run
