"""A family of operators that the package does not have, written as a new one would be: a kernel and its gradients, the
formula, the vmap rules. elbo_ext.autograd.modes then has to make it work in every way of differentiating."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from elbo_ext.autograd.derivatives import fill_missing_with_none, vjp, without_none
from elbo_ext.autograd.modes import (
    GradientFunction,
    ValueFunction,
    apply_under_transforms,
    choose_forward,
    in_every_mode,
    needed_gradients,
)
from elbo_ext.autograd.vmap import in_shape_of_operands, reduce_examples, unreduced_gradient, with_mapped_axis_first
from elbo_ext.ops import REDUCTIONS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


class Spec(NamedTuple):
    """Sum of x ln softmax(logits) over the last dimension."""

    reduction: int


kernels: list[str] = []  # which ones ran, in order


def ran(name: str) -> None:
    if not torch.compiler.is_compiling():
        kernels.append(name)


def value_kernel(logits: Tensor, x: Tensor, reduction: int) -> Tensor:
    examples = (x * logits.log_softmax(-1)).sum(-1)
    return examples.sum() if reduction == REDUCTIONS["sum"] else examples


def gradient_kernel(logits: Tensor, x: Tensor, grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    grad = grad.unsqueeze(-1)
    of_logits = grad * (x - logits.softmax(-1) * x.sum(-1, keepdim=True))
    return tuple(g for g, need in zip((of_logits, grad * logits.log_softmax(-1)), needs, strict=True) if need)


@in_every_mode
class CategoricalBackward(GradientFunction):
    @staticmethod
    def forward(spec: Spec, needs: Sequence[bool], grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        ran("backward")
        return gradient_kernel(*operands, grad, needs)

    @staticmethod
    def in_torch(spec: Spec, needs: Sequence[bool], grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        return without_none(vjp(lambda *ts: Categorical.in_torch(spec, *ts), operands, needs, grad))

    @staticmethod
    def vmap(info: Any, in_dims: Any, spec: Spec, needs: Sequence[bool], grad: Tensor, *operands: Tensor) -> Any:
        dims, size = in_dims[3:], info.batch_size
        aligned = with_mapped_axis_first(operands, dims, size, expand=True)
        grad = unreduced_gradient(grad, in_dims[2], aligned[0].dim() - 2, spec.reduction, aligned, size)
        gradients = apply_under_transforms(CategoricalBackward)(Spec(REDUCTIONS["none"]), needs, grad, *aligned)
        result = in_shape_of_operands(fill_missing_with_none(gradients, needs), operands, dims, size)
        return tuple(result), (0,) * len(result)


@in_every_mode
class Categorical(ValueFunction):
    backward_function = CategoricalBackward

    @staticmethod
    def forward(spec: Spec, *operands: Tensor) -> Tensor:
        ran("forward")
        return value_kernel(*operands, spec.reduction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        gradients = needed_gradients(CategoricalBackward, ctx.spec, needs, grad, *ctx.saved_tensors)
        return None, *fill_missing_with_none(gradients, needs)

    @staticmethod
    def value_and_gradients(spec: Spec, needs: Sequence[bool], *operands: Tensor) -> Sequence[Tensor]:
        ran("both")
        ones = torch.ones(operands[0].shape[:-1], dtype=operands[0].dtype)
        return value_kernel(*operands, spec.reduction), *gradient_kernel(*operands, ones, needs)

    @staticmethod
    def in_torch(spec: Spec, *operands: Tensor) -> Tensor:
        return value_kernel(*operands, spec.reduction)

    @staticmethod
    def vmap(info: Any, in_dims: Any, spec: Spec, *operands: Tensor) -> tuple[Tensor, int]:
        aligned = with_mapped_axis_first(operands, in_dims[1:], info.batch_size, expand=True)
        examples = apply_under_transforms(Categorical)(Spec(REDUCTIONS["none"]), *aligned)
        return reduce_examples(examples, spec.reduction), 0


def categorical(logits: Tensor, x: Tensor, reduction: str) -> Tensor:
    spec = Spec(REDUCTIONS[reduction])
    value: Tensor = choose_forward(Categorical, (logits, x), spec.reduction)(spec, logits, x)
    return value


def in_torch(logits: Tensor, x: Tensor, reduction: str) -> Tensor:
    return value_kernel(logits, x, REDUCTIONS[reduction])


Function = Callable[[Tensor, Tensor, str], Tensor]


def gradients(f: Function, logits: Tensor, x: Tensor, reduction: str, **options: Any) -> tuple[Tensor, ...]:
    leaves = logits.clone().requires_grad_(), x.clone().requires_grad_()
    value = f(*leaves, reduction)
    grad = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    return torch.autograd.grad(value, leaves, grad, **options)


def double_backward(f: Function, logits: Tensor, x: Tensor, reduction: str) -> Any:
    leaf = logits.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf, x, reduction).square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaf)


def forward_mode(f: Function, logits: Tensor, x: Tensor, reduction: str) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(logits, x), x, reduction)).tangent


def batched_gradients(f: Function, logits: Tensor, x: Tensor, reduction: str) -> Any:
    leaf = logits.clone().requires_grad_()
    value = f(leaf, x, reduction)
    return torch.autograd.grad(value, leaf, torch.stack([value.detach(), 2 * value.detach()]), is_grads_batched=True)


def of_func(transform: Callable[..., Any]) -> Callable[..., Any]:
    return lambda f, logits, x, reduction: transform(lambda t: f(t, x, reduction).square().sum())(logits)


def mapped_gradients(f: Function, logits: Tensor, x: Tensor, reduction: str) -> Any:
    loss = torch.func.grad(lambda t, u: f(t, u, reduction).square().sum(), argnums=(0, 1))
    return torch.func.vmap(loss, in_dims=(1, None))(torch.stack([logits, x], 1), x)


def compiled_gradients(f: Function, logits: Tensor, x: Tensor, reduction: str) -> Any:
    torch._dynamo.reset()
    return gradients(torch.compile(f, backend="aot_eager", fullgraph=True), logits, x, reduction)


WAYS = {
    "values": lambda f, *inputs: f(*inputs),
    "backward": gradients,
    "create_graph": lambda f, *inputs: gradients(f, *inputs, create_graph=True),
    "double_backward": double_backward,
    "forward_mode": forward_mode,
    "is_grads_batched": batched_gradients,
    "func.grad": of_func(torch.func.grad),
    "func.hessian": of_func(torch.func.hessian),
    "func.jacfwd^2": of_func(lambda f: torch.func.jacfwd(torch.func.jacfwd(f))),
    "func.vmap": mapped_gradients,
    "compile": compiled_gradients,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("way", WAYS)
def test_in_every_way(way: str, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, x = (torch.rand(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    result, expected = (WAYS[way](f, logits, x, reduction) for f in (categorical, in_torch))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_the_kernels_that_eager_code_calls() -> None:
    logits, x = torch.rand(3, 4), torch.rand(3, 4)
    for reduction, expected in [("none", ["forward", "backward"]), ("sum", ["both"])]:
        kernels.clear()
        value = categorical(logits.clone().requires_grad_(), x, reduction)
        if reduction == "sum":  # whose gradients only have to be multiplied: elbo_ext's operator does that
            value.backward()
        else:
            value.backward(torch.ones(3))
        assert kernels == expected
    kernels.clear()
    with torch.no_grad():
        categorical(logits, x, "sum")
    assert kernels == ["forward"]
