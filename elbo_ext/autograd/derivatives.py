"""Derivatives of functions of torch operations, along some of their arguments."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Operands = Sequence[Tensor | None]
Formula = Callable[..., Any]
_torch_vjp: Any = torch.func.vjp  # whose annotation has the third result of has_aux as well


def joint_shape(operands: Operands) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(*(t.shape for t in operands if t is not None))
    return shape


def sum_of_elements(values: Tensor, batch_dims: int) -> Tensor:
    return values.flatten(batch_dims).sum(-1) if values.dim() > batch_dims else values


def fill_missing_with_none(gradients: Iterable[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """A gradient or None per operand; ``gradients`` has only those that are needed."""
    rest = iter(gradients)
    return [next(rest) if need else None for need in needs]


def without_none(gradients: Operands) -> tuple[Tensor, ...]:
    return tuple(g for g in gradients if g is not None)


def _vjp_of_picked(function: Formula, operands: Operands, picked: Sequence[int]) -> tuple[Any, Callable[..., Any]]:
    """torch.func.vjp of the function at the operands, by those whose positions are ``picked``."""

    def of_picked(*values: Tensor) -> Any:
        full = list(operands)
        for i, value in zip(picked, values, strict=True):
            full[i] = value
        return function(*full)

    output, pull_back = _torch_vjp(of_picked, *(operands[i] for i in picked))
    return output, pull_back


def vjp(function: Formula, operands: Operands, needs: Sequence[bool], upstream: Any) -> list[Tensor | None]:
    """Gradients of function(*operands) by the needed operands, by torch; None for the others."""
    _, pull_back = _vjp_of_picked(function, operands, [i for i, need in enumerate(needs) if need])
    return fill_missing_with_none(pull_back(upstream), needs)


def jvp(function: Formula, operands: Operands, tangents: Operands) -> Any:
    """The derivative of function(*operands) along the tangents: the transpose of the transpose, because torch.func.jvp
    cannot be nested inside torch.autograd.forward_ad."""
    picked = [i for i, tangent in enumerate(tangents) if tangent is not None]
    output, pull_back = _vjp_of_picked(function, operands, picked)
    zeros = torch.zeros_like(output) if isinstance(output, Tensor) else tuple(map(torch.zeros_like, output))
    _, push_forward = _torch_vjp(pull_back, zeros)
    return push_forward(tuple(tangents[i] for i in picked))[0]
