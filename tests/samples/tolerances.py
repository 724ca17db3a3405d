"""How far a result may be from the truth."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """What a result may deviate from the float64 truth at the same (rounded) inputs.

    A sum of n terms may be off by ``value_rtol * sum |term| + value_atol * n``, before it is rounded to the dtype it is
    stored in, which :func:`rounding` allows for. Gradients: the same, with the term's derivatives for the terms.
    """

    value_rtol: float
    value_atol: float
    gradient_rtol: float
    gradient_atol: float


# float32, bfloat16 and float16 inputs are all computed in float32, where an ulp is 1.2e-7: an element costs at most
# about ten roundings, most of which cancel, and a sum in lanes of float32 that ends after 1024 elements is as accurate
# as an element. atol is for what cancels inside an element (z^2 - 1, ln sigma^2 + ln 2 pi), whose parts are of size 1.
# In float64, where an ulp is 2.2e-16, the truth is rounded too, and the gradient of a broadcast operand is a running
# sum in float64 as well, whose roundings all point one way if its numbers are equal.
_SINGLE = Tolerance(value_rtol=5e-7, value_atol=2.5e-7, gradient_rtol=5e-7, gradient_atol=5e-7)
TOLERANCES = {
    torch.float32: _SINGLE,
    torch.float64: Tolerance(value_rtol=1.5e-15, value_atol=5e-16, gradient_rtol=6e-15, gradient_atol=1.5e-15),
    torch.bfloat16: _SINGLE,
    torch.float16: _SINGLE,
}


# By function, what cancels inside of an element where it is not of size 1: the row of the function in table.py says it.
SIZE_OF_PARTS: dict[str, float] = {}


def tolerance_of(function: str, dtype: torch.dtype) -> Tolerance:
    """Of a public function computed in float32 or float64."""
    size, tolerance = SIZE_OF_PARTS.get(function, 1.0), TOLERANCES[dtype]
    return replace(tolerance, value_atol=size * tolerance.value_atol, gradient_atol=size * tolerance.gradient_atol)


# The noise itself, of size up to 6.66, by the dtype it is computed in. In float64 it is the reference that is less
# exact: it rounds the angle of Box-Muller to 4e-16.
NOISE_ERROR = {torch.float32: 1.5e-6, torch.float64: 6e-15}


def computed_in(arguments: dict[str, Any]) -> torch.dtype:
    """float64 if any operand is, else float32: the dtype of values, and the accuracy of everything. A tensor without
    dimensions does not promote those that have some."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point()]
    tensors = [t for t in tensors if t.dim() > 0] or tensors
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of the values once they are stored as ``dtype``."""
    info = torch.finfo(dtype)
    return value.abs().clamp(min=info.tiny) * (info.eps / 2)
