"""Values whose gradient is not their own, for estimators of gradients (elbo_ext.bounds)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .modes import Differentiable, apply_under_transforms, in_every_mode
from .torch_internals import in_trace, in_transform


@in_every_mode
class WeightedGradient(Differentiable):
    """``apply(weight, t)``: t itself; its gradient is multiplied by the number ``weight``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: float, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.weight = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad * ctx.weight

    @classmethod
    def eager_jvp(cls, ctx: Any, *tangents: Any) -> Any:
        return tangents[1] * ctx.weight


@in_every_mode
class GradientOf(Differentiable):
    """``apply(value, surrogate)``: the value, with the gradient of the surrogate, of the same shape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad

    @classmethod
    def eager_jvp(cls, ctx: Any, *tangents: Any) -> Any:
        return tangents[1]


class WeightedOnceMore(Function):
    """``apply(z, log_weights)``: z itself, and zeros [K, ...] in the shape of the log-weights.

    Whatever gradient comes back to z is multiplied by the normalized weights v [K, ...] of its samples. They are known
    only after z has been used, and so are handed to the backward pass as the gradient of the zeros: a result that adds
    v * zeros gives them, times its own upstream gradient, which the sum over samples is, as the weights add up to 1.
    (A hook on z would do, but Dynamo of torch 2.11 loses one that knows of later results.) There is no forward mode: its
    caller raises an error.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        return z.view_as(z), torch.zeros_like(log_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_zeros: Tensor) -> Any:
        upstream = grad_zeros.sum(0)
        v = torch.where(upstream == 0, 0.0, grad_zeros / upstream)
        return grad_z * v.reshape(*v.shape, *(1,) * (grad_z.dim() - v.dim())).to(grad_z.dtype), None


def _in_torch() -> bool:
    """Where a Function will not do: torch.func inside of compiled code goes past its rules, and a trace cannot save it."""
    return in_trace() or (torch.compiler.is_compiling() and in_transform())


def _nothing_with_gradient_of(t: Tensor) -> Tensor:
    return torch.where(t.isfinite(), t - t.detach(), 0.0)


def weighted_gradient(weight: float, t: Tensor) -> Tensor:
    if _in_torch():
        return t.detach() + weight * _nothing_with_gradient_of(t)
    result: Tensor = apply_under_transforms(WeightedGradient)(weight, t)
    return result


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    if _in_torch():
        return value.detach() + _nothing_with_gradient_of(surrogate)
    result: Tensor = apply_under_transforms(GradientOf)(value.detach(), surrogate)
    return result


def weighted_once_more(z: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = WeightedOnceMore.apply(z, log_weights)  # type: ignore[no-untyped-call]
    return results
