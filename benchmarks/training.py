"""Whole training steps: networks that others ship, and the same networks with elbo_ext inside of them.

A step is forward, backward and Adam. A case has a model of models.py and a size. Who takes part:

    shipped           the module and its loss as its library has them (of the demo's VAE: as written by hand)
    shipped-compiled  the same with the loss alone under torch.compile, the networks as they are
    ours              the same networks, sample, KL and likelihood by elbo_ext
    no-loss           the limit: the same networks and Adam without sample, KL and likelihood; the gradients that the
                      loss would send back are fixed tensors
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import BenchmarkError, models
from .cases import BOTH, Shape
from .check import demand, demand_noise, norm
from .contenders import NO_LOSS, TRAINING

LEARNING_RATE = 1e-7
"""So small that the last step is at the same point of the training as the first."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-3
"""As in check.py. scVI adds 1e-8 inside of its logarithms, and float32 networks lie between loss and gradients."""
SMALL_GRADIENT = 1e-2
"""A parameter's gradient is compared with this share of the whole gradient's norm where its own is smaller: that of a
bias before a batch normalization is 0, and what is found is rounding."""
WORK = "training"


@dataclass(frozen=True)
class Training:
    """One line of the table.

    model: a name in models.MODELS.
    likelihood: of the data, as the model names it.
    hidden: the width of the model's hidden layers; what it ships with, if None.
    """

    name: str
    model: str
    data: Shape
    likelihood: str
    latent: Shape | None = None
    hidden: int | None = None

    # As a row has them.
    work = WORK
    dtype = torch.float32
    passes = (BOTH,)
    contenders = TRAINING
    only_on = "cpu"  # on a GPU it has not been tried
    samples = None

    @property
    def variance(self) -> str:
        return self.likelihood

    @property
    def elements(self) -> int:
        """Of the largest array: the data, or one layer's weights."""
        hidden = self.hidden or models.SCVI_HIDDEN
        return max(math.prod(self.data), max(self.data[1], hidden) * hidden)

    @property
    def array_bytes(self) -> int:
        return self.elements * self.dtype.itemsize


def _scvi(name: str, genes: int, likelihood: str) -> Training:
    return Training(name, "scvi", (128, genes), likelihood, latent=(128, 10))


def _bnn(hidden: int) -> Training:
    return Training(f"bnn-{hidden}", "bnn", (128, 784), "categorical", hidden=hidden)


CASES: tuple[Training, ...] = (
    _scvi("scvi-zinb-2k", 2000, "zinb"),
    _scvi("scvi-zinb-10k", 10000, "zinb"),
    _scvi("scvi-nb-2k", 2000, "nb"),
    _scvi("scvi-nb-10k", 10000, "nb"),
    _bnn(400),
    _bnn(1200),
    Training("vae-mnist", "vae", (128, 784), "bernoulli", latent=(128, 20), hidden=400),
    Training("vae-images", "vae", (64, 12288), "gaussian", latent=(64, 128), hidden=256),
)


class Contest:
    """One case, for all contenders: each has a copy of the same network, and an Adam of its own."""

    sets = 1
    """Of inputs: the parameters, their gradients and Adam's state are most of what a step touches."""

    def __init__(self, case: Training, direction: str, device: torch.device) -> None:
        self.case = case
        self.first = models.make(case, device)
        self.rotation = itertools.repeat(0)
        self._models: dict[str, models.Model] = {}

    @property
    def input_bytes(self) -> int:
        return self.first.bytes

    @property
    def kept_bytes(self) -> int:
        """Of the gradients, where all parameters have one."""
        return sum(p.numel() * p.element_size() for p in self.first.module.parameters())

    def bind(self, contender: str) -> tuple[list[Callable[[], models.Result]], list[models.Model]]:
        """The step that the clock sees, and what its gradients are to be dropped from."""
        model = self._models[contender] = copy.deepcopy(self.first)
        # One kernel for all parameters: the plain one takes several passes over them, the same for every contender.
        optimizer = torch.optim.Adam(model.module.parameters(), lr=LEARNING_RATE, fused=True)
        if contender == NO_LOSS:
            upstream: list[Tensor] = []

            def backward() -> models.Result:
                outputs = model.outputs()
                if not upstream:
                    upstream.extend(1e-3 * torch.randn_like(output) for output in outputs)
                torch.autograd.backward(outputs, upstream)
                return models.Result(outputs[0])
        else:
            forward = model.forward(contender)

            def backward() -> models.Result:
                result = forward()
                result.loss.backward()
                return result

        def step() -> models.Result:
            result = backward()
            optimizer.step()
            return result

        return [step], [model]

    def call_and_check(self, contender: str, call: Callable[[], models.Result]) -> None:
        """One step without dropout, compared with the reference in float64 under the same noise."""
        model = self._models[contender]
        if contender == NO_LOSS:
            call()
            return
        dropouts = [part for part in model.module.modules() if isinstance(part, nn.Dropout)]
        for dropout in dropouts:
            dropout.eval()
        exact = model.double()
        try:
            result = call()
        finally:
            for dropout in dropouts:
                dropout.train()
        check(self.case.name, contender, model, result, exact)


def check(case: str, contender: str, model: models.Model, result: models.Result, exact: models.Model) -> None:
    """Compares a step's loss and its parameters' .grad with those of `exact`, the model before the step in float64."""

    replay = models.Replay(result)
    loss = exact.fused(replay).loss
    demand_noise(contender, case, torch.cat([part.flatten() for part in replay.noise]))
    demand(contender, case, "loss", abs(result.loss.item() - loss.item()) / abs(loss.item()), LOSS_TOLERANCE)
    learned = dict(exact.module.named_parameters())
    gradients = torch.autograd.grad(loss, list(learned.values()), materialize_grads=True)
    smallest = SMALL_GRADIENT * math.hypot(*map(norm, gradients))
    got = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    for name, expected in zip(learned, gradients, strict=True):
        if got[name] is None and expected.any():
            raise BenchmarkError(f"{contender} gives no gradient of {name} in case {case}")
        deviation = norm(expected if got[name] is None else got[name] - expected) / max(norm(expected), smallest)
        demand(contender, case, f"gradient of {name}", deviation, GRADIENT_TOLERANCE)


def unfit(contender: str, case: Training) -> str | None:
    """Why a contender has no part in a case, or None."""
    return models.missing(case.model)
