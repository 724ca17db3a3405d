"""Before the clock starts: every contender computes what elbo_ext.reference computes in float64.

What is checked is the very function that is timed, its own noise included: the noise is read off the sample it returns,
and given to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elbo_ext import reference

from . import BenchmarkError
from .cases import BOTH, RESULTS, Buffers, Case

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of a loss, relative; of a gradient, the norm of the difference over the norm. Formulas written by hand round each
intermediate result to bfloat16; the bound is theirs."""
CHUNK = 1 << 22
"""So many elements go through the reference at a time: in float64 it holds dozens of arrays."""
STANDARD_ERRORS = 6.0
"""How far the noise's mean and variance may be from 0 and 1."""
OF_NOISE = ("log_weights", "importance")
"""Works whose loss depends on the noise."""


class Expected:
    """The reference's loss and its gradients for one set of buffers, computed once for all contenders."""

    def __init__(self, case: Case, direction: str, buffers: Buffers) -> None:
        self.case, self.direction, self.buffers = case, direction, buffers
        self.loss, self.gradients = 0.0, {}
        if "loss" in RESULTS[case.work] and case.work not in OF_NOISE:
            self._evaluate()

    def _evaluate(self) -> None:
        operands = self.buffers.operands
        batch = len(next(iter(operands.values())))
        parts: dict[str, list[Tensor]] = {}
        for rows in torch.arange(batch).split(max(1, CHUNK * batch // self.case.elements)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            doubles = {
                name: (t[part] if t.dim() else t).detach().double().requires_grad_(t.requires_grad)
                for name, t in operands.items()
            }
            loss = _loss(self.case, doubles) / batch
            self.loss += loss.item()
            if self.direction == BOTH:
                leaves = {name: t for name, t in doubles.items() if t.requires_grad}
                for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                    parts.setdefault(name, []).append(gradient.float())
        for name, chunks in parts.items():
            self.gradients[name] = torch.cat(chunks) if chunks[0].dim() else torch.stack(chunks).sum()

    def check(self, contender: str, results: Sequence[Tensor]) -> None:
        """Compares results, and the leaves' .grad, with the reference; raises BenchmarkError."""
        found = dict(zip(RESULTS[self.case.work], results, strict=True))
        gradients, loss = dict(self.gradients), self.loss
        limit = TOLERANCES[self.case.dtype]
        if "z" in found:
            of_sample, through_z = self._through_z(contender, found["z"].detach())
            loss += of_sample
            for name, gradient in through_z.items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        if "loss" in found:
            deviation = abs(found["loss"].item() - loss) / abs(loss)
            demand(contender, self.case.name, "loss", deviation, limit)
        if self.direction == BOTH:
            for name, expected in gradients.items():
                got = self.buffers.operands[name].grad
                if got is None:
                    raise BenchmarkError(f"{contender} gives no gradient of {name} in case {self.case.name}")
                deviation = norm(got.float() - expected.float()) / norm(expected)
                demand(contender, self.case.name, f"gradient of {name}", deviation, limit)

    def _through_z(self, contender: str, z: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Checks that z is a sample; returns what it adds to the loss, and to the gradients of mu and logvar."""
        leaves = {name: self.buffers.operands[name].detach().double().requires_grad_() for name in ("mu", "logvar")}
        with torch.no_grad():
            noise = (z.double() - leaves["mu"]) / (leaves["logvar"] / 2).exp()
        demand_noise(contender, self.case.name, noise)
        loss = 0.0
        sample = {**leaves, "noise": noise, "num_samples": self.case.samples}
        results, upstream = [reference.rsample(**sample)], [self.buffers.grad_z.double()]
        if self.case.work in OF_NOISE:
            _, log_q, log_p = reference.rsample_with_log_prob(**sample)
            if self.case.work == "log_weights":
                results.append((log_q - log_p).mean())
            else:
                results.append(math.log(self.case.samples) - (log_p - log_q).logsumexp(0).mean())
            upstream.append(torch.ones_like(results[1]))
            loss = results[1].item()
        if self.direction != BOTH:
            return loss, {}
        gradients = torch.autograd.grad(results, list(leaves.values()), upstream)
        return loss, dict(zip(leaves, gradients, strict=True))


def demand(contender: str, case: str, what: str, deviation: float, limit: float) -> None:
    if not deviation <= limit:  # nor NaN
        raise BenchmarkError(
            f"{contender} computes something else than the reference in case {case}: "
            f"its {what} differs by {deviation:.1e}, more than {limit:g}"
        )


def demand_noise(contender: str, case: str, noise: Tensor) -> None:
    """Mean and variance of standard normals, in float64."""
    n = noise.numel()
    errors = noise.mean() * math.sqrt(n), (noise.square().mean() - 1) * math.sqrt(n / 2)
    largest = max(abs(error.item()) for error in errors)
    # bfloat16 rounds z to 8 bits, which makes no difference in these sums that could be seen.
    demand(contender, case, "noise, in standard errors,", largest, STANDARD_ERRORS + 1e-5 * math.sqrt(n))


def _loss(case: Case, operands: dict[str, Tensor]) -> Tensor:
    """The reference's loss, summed over the examples."""
    if case.work == "kl":
        return reference.gaussian_kl(**operands, reduction="sum")
    x, recon, recon_logvar = (operands.get(name) for name in ("x", "recon", "recon_logvar"))
    if case.work == "likelihood":
        if case.bernoulli:
            return -reference.bernoulli_log_prob(x, recon, reduction="sum")
        return -reference.gaussian_log_prob(x, recon, 0.0 if recon_logvar is None else recon_logvar, reduction="sum")
    return reference.elbo_loss(
        recon,
        x,
        operands["mu"],
        operands["logvar"],
        likelihood="bernoulli" if case.bernoulli else "gaussian",
        recon_logvar=0.0 if recon_logvar is None else recon_logvar,
        reduction="sum",
    ).loss


def norm(t: Tensor) -> float:
    return torch.linalg.vector_norm(t, dtype=torch.float64).item()
