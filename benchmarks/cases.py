"""What is measured: six works, the table of their shapes, and the bytes that each has to move.

A work is a function of leaf tensors; there is no network in it. The decoder's place is taken by a fixed upstream
gradient of z, the same for every contender.

    sampling     mu, logvar                              -> z
    kl           mu, logvar                              -> loss
    log_weights  mu, logvar                              -> loss, z     (the KL by one sample: ln q(z) - ln p(z))
    importance   mu, logvar                              -> loss, z     (K samples: -ln 1/K sum_k p(z_k) / q(z_k))
    likelihood   x, recon[, recon_logvar]                -> loss
    step         x, recon[, recon_logvar], mu, logvar    -> loss, z     (the whole step: all three together)

A loss is a sum over the elements and a mean over the examples, the first dimension. z may have K samples of each
example, on an axis in front.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"
RESULTS = {
    "sampling": ("z",),
    "kl": ("loss",),
    "log_weights": ("loss", "z"),
    "importance": ("loss", "z"),
    "likelihood": ("loss",),
    "step": ("loss", "z"),
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    variance: of the likelihood: "fixed" to 1, one learned "scalar", learned "per-channel" or "per-element", or none
        ("bernoulli").
    contenders: which ones take part; all, if empty.
    only_on: the type of device it is made for; any, if empty.
    samples: K, of "sampling" and "importance"; None for one z without an axis of samples.
    """

    name: str
    work: str
    data: Shape | None = None
    latent: Shape | None = None
    variance: str | None = None
    dtype: torch.dtype = torch.float32
    passes: tuple[str, ...] = (BOTH,)
    contenders: tuple[str, ...] = ()
    only_on: str = ""
    samples: int | None = None

    @property
    def bernoulli(self) -> bool:
        return self.variance == "bernoulli"

    @property
    def elements(self) -> int:
        """Of the work's largest array."""
        sampled = [self.z] if "z" in RESULTS[self.work] else []
        return max(math.prod(shape) for shape in [*self.operands().values(), *sampled])

    @property
    def array_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def z(self) -> Shape:
        return self.latent if self.samples is None else (self.samples, *self.latent)

    def operands(self) -> dict[str, Shape]:
        """The tensors that the work is a function of."""
        shapes: dict[str, Shape] = {}
        if self.data is not None:
            shapes |= {"x": self.data, "recon": self.data}
        if self.variance == "scalar":
            shapes["recon_logvar"] = ()
        elif self.variance == "per-channel":
            shapes["recon_logvar"] = (self.data[1], *[1] * (len(self.data) - 2))
        elif self.variance == "per-element":
            shapes["recon_logvar"] = self.data
        if self.latent is not None:
            shapes |= {"mu": self.latent, "logvar": self.latent}
        return shapes

    def learned(self) -> dict[str, Shape]:
        """Those of the operands that get a gradient."""
        return {name: shape for name, shape in self.operands().items() if name != "x"}


# ---- bytes ----


@dataclass(frozen=True)
class Traffic:
    """The arrays that a work cannot avoid to read and to write, by name."""

    read: dict[str, Shape]
    written: dict[str, Shape]

    def counts(self) -> dict[Shape, tuple[int, int]]:
        """How many arrays of each shape are read and how many are written."""
        read, written = Counter(self.read.values()), Counter(self.written.values())
        return {shape: (read[shape], written[shape]) for shape in read | written}

    def bytes(self, dtype: torch.dtype) -> int:
        return sum(math.prod(shape) for shape in [*self.read.values(), *self.written.values()]) * dtype.itemsize


def traffic(case: Case, direction: str) -> Traffic:
    """Every input read once, every result and every gradient written once.

    The losses, one number each, are not counted. Nor is it that a step has to read mu and logvar twice, once before
    the decoder and once after: the limit is what cannot be beaten.
    """
    read, written = dict(case.operands()), {}
    if "z" in RESULTS[case.work]:
        written["z"] = case.z
    if direction == BOTH:
        written |= {f"gradient of {name}": shape for name, shape in case.learned().items()}
        if "z" in RESULTS[case.work]:
            read["gradient of z"] = case.z
    return Traffic(read, written)


# ---- numbers ----


@dataclass
class Buffers:
    """One set of a case's tensors; leaves require grad where the work differentiates by them."""

    operands: dict[str, Tensor]
    grad_z: Tensor | None

    def clone(self) -> Buffers:
        return Buffers(
            {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in self.operands.items()},
            None if self.grad_z is None else self.grad_z.clone(),
        )

    def leaves(self) -> list[Tensor]:
        return [t for t in self.operands.values() if t.requires_grad]

    def drop_gradients(self) -> None:
        """As optimizers do with set_to_none."""
        for leaf in self.leaves():
            leaf.grad = None

    @property
    def bytes(self) -> int:
        tensors = [*self.operands.values(), *([] if self.grad_z is None else [self.grad_z])]
        return sum(t.numel() * t.element_size() for t in tensors)


def make(case: Case, device: torch.device | str, seed: int = 0) -> Buffers:
    """Numbers of size 1, as late in a training: recon is close to x, the variances are between 1/e and e."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Shape, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=device)

    numbers = {}
    if case.data is not None:
        # Binary data for the Bernoulli: torch.distributions refuses any other.
        numbers["x"] = (normal(case.data) > 0).float() if case.bernoulli else normal(case.data)
        numbers["recon"] = numbers["x"] + normal(case.data, 0.5)
    for name, shape in case.operands().items():
        if name not in numbers:
            numbers[name] = normal(shape, 0.4 if name.endswith("logvar") else 1.0)
    operands = {name: numbers[name].to(case.dtype).requires_grad_(name in case.learned()) for name in case.operands()}
    grad_z = normal(case.z, 0.1).to(case.dtype) if "z" in RESULTS[case.work] else None
    return Buffers(operands, grad_z)


# ---- the table ----

BOTH_PASSES = (FORWARD, BOTH)
BF16 = torch.bfloat16
CURVES = ("ours", "eager", "eager-compiled", "copy")
"""Who takes part in the series over sizes and threads."""


def _step(name: str, data: Shape, latent: Shape, variance: str = "per-element", **options) -> Case:
    return Case(name, "step", data, latent, variance, **options)


def _sizes(exponent: int) -> Case:
    """The whole step of 16 examples with 2^exponent elements in all."""
    elements = 2**exponent // 16
    return _step(f"size-2^{exponent}", (16, elements), (16, max(4, elements // 64)), contenders=CURVES)


MLP, CONVOLUTION, IMAGE, WIDE = (
    {"data": (128, 784), "latent": (128, 20)},
    {"data": (64, 12288), "latent": (64, 128)},  # 64 images of 3 x 64 x 64
    {"data": (16, 3, 256, 256), "latent": (16, 4, 32, 32)},
    {"data": (4096, 784), "latent": (4096, 20)},
)

CASES: tuple[Case, ...] = (
    _step("tiny", (2, 16), (2, 4), passes=BOTH_PASSES),
    _step("mlp", **MLP, passes=BOTH_PASSES),
    _step("mlp-scalar", **MLP, variance="scalar"),
    _step("mlp-fixed", **MLP, variance="fixed"),
    _step("mlp-bernoulli", **MLP, variance="bernoulli"),
    _step("conv", **CONVOLUTION, passes=BOTH_PASSES),
    _step("conv-scalar", **CONVOLUTION, variance="scalar"),
    _step("conv-fixed", **CONVOLUTION, variance="fixed"),
    _step("conv-bernoulli", **CONVOLUTION, variance="bernoulli"),
    _step("conv-bf16", **CONVOLUTION, dtype=BF16),
    _step("image", **IMAGE, passes=BOTH_PASSES),
    _step("image-scalar", **IMAGE, variance="scalar"),
    _step("image-channel", **IMAGE, variance="per-channel"),
    _step("image-bf16", **IMAGE, dtype=BF16),
    _step("wide", **WIDE),
    _step("wide-bernoulli", **WIDE, variance="bernoulli"),
    Case("likelihood", "likelihood", (64, 12288), variance="per-element", passes=BOTH_PASSES),
    Case("kl-2560", "kl", latent=(128, 20), passes=BOTH_PASSES),
    Case("kl-1M", "kl", latent=(64, 16384), passes=BOTH_PASSES),
    Case("log_prob-2560", "log_weights", latent=(128, 20), passes=BOTH_PASSES),
    Case("log_prob-1M", "log_weights", latent=(64, 16384), passes=BOTH_PASSES),
    Case("importance-50x2560", "importance", latent=(128, 20), samples=50, passes=BOTH_PASSES),
    Case("importance-8x256k", "importance", latent=(64, 4096), samples=8, passes=BOTH_PASSES),
    # As ln p(x) is estimated: very many samples of few elements.
    Case("importance-5000x256", "importance", latent=(8, 32), samples=5000, passes=BOTH_PASSES),
    Case("sample-2560", "sampling", latent=(128, 20), passes=BOTH_PASSES),
    Case("sample-16k", "sampling", latent=(128, 128), passes=BOTH_PASSES),
    Case("sample-256k", "sampling", latent=(64, 4096), passes=BOTH_PASSES),
    Case("sample-16x256k", "sampling", latent=(64, 4096), samples=16, passes=BOTH_PASSES),
    Case("sample-16M", "sampling", latent=(256, 65536), passes=BOTH_PASSES),
    # Arrays of 1 GB.
    _step("huge", (4096, 65536), (4096, 1024), only_on="cuda"),
    _step("huge-bf16", (4096, 131072), (4096, 2048), dtype=BF16, only_on="cuda"),
    *(_sizes(exponent) for exponent in range(8, 27, 2)),
)

QUICK = ("tiny", "mlp", "conv", "sample-256k")
OVER_THREADS = ("mlp", "conv", "sample-256k")
"""Cases that are measured with fewer threads as well."""
