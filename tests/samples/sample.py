"""One sample: the arguments of one call, and how the call is made on any device."""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import reference

from .maker import Maker

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")


def devices() -> list[Any]:
    """The devices to test on, as parameters for pytest; what is missing is named in its skip mark."""
    return ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@dataclass(frozen=True)
class Sample:
    id: str
    function: str  # its name in elbo_ext and in elbo_ext.reference
    build: Callable[[Maker], dict[str, Any]]
    note: str  # what it exercises
    core: bool = False

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The named arguments. Every sample has numbers of its own, the same (but for rounding) in every dtype."""
        return self.build(Maker(dtype, device, zlib.crc32(self.id.encode()) + seed))


def differentiable(arguments: dict[str, Any]) -> list[str]:
    """The names of the arguments that have gradients: every floating-point tensor."""
    return [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]


SEED = 20_240_229  # for what draws noise


def on_cuda(arguments: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in arguments.values())


@contextlib.contextmanager
def seeds_of_the_cpu() -> Iterator[None]:
    """The same seed makes the same noise on every device, but torch's generators of two devices draw different seeds."""
    draw = elbo_ext.ops.draw_seeds

    def draw_on_cpu(device: torch.device, generator: torch.Generator | None, count: int = 1) -> Tensor:
        return draw(torch.device("cpu"), generator, count).to(device)

    with mock.patch.object(elbo_ext.functional.latent_call, "draw_seeds", draw_on_cpu):
        yield


def run(sample: Sample, arguments: dict[str, Any], module: Any = elbo_ext) -> dict[str, Tensor]:
    """The results of the sample's function by name, with the same noise in every call, on every device."""
    torch.manual_seed(SEED)
    with seeds_of_the_cpu() if on_cuda(arguments) else contextlib.nullcontext():
        result = getattr(module, sample.function)(**arguments)
    if isinstance(result, reference.ELBO):
        return result._asdict()
    names = {
        "rsample": ("z",),
        "rsample_kl": ("z", "kl"),
        "rsample_with_log_prob": ("z", "log_q", "log_p"),
        "categorical_rsample_kl": ("z", "kl"),
    }.get(sample.function, ("value",))
    return dict(zip(names, result if isinstance(result, tuple) else (result,), strict=True))


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, as they are after rounding to their dtypes, on the CPU; masks stay masks."""
    return {
        name: value.detach().cpu().to(torch.float64 if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def joint_shape(arguments: dict[str, Any]) -> torch.Size:
    return torch.broadcast_shapes(*(value.shape for value in arguments.values() if isinstance(value, Tensor)))
