"""The ways of differentiating, and a torch.autograd.Function for each of them. No other module tells them apart.

A module of a family writes one class X, as torch.compile takes it, and ``@in_every_mode`` derives the others:

===============  ==========================================  =======================================================
class            differs from X                              used
===============  ==========================================  =======================================================
X                as written: setup_context, no jvp           torch.compile, which refuses a Function that defines jvp
XWithJvp         has jvp                                     eager code: torch.func, forward mode, double backward
XNoFunctorch     forward takes ctx, no setup_context         other eager code: the least work outside the kernels
XGradInForward   the same, and writes the gradients in the   other eager code, reduced results: the inputs are read
                 forward pass                                once
===============  ==========================================  =======================================================

X keeps ``apply`` of each derived class under the name that the table _DERIVED gives it. Two more ways need no class:
X.forward, the operator alone, where nothing asks for a gradient, and X.in_torch, the formula in torch operations.
:func:`choose_forward` and :func:`needed_gradients` choose among all of them.
"""

from collections.abc import Callable, Sequence
from types import new_class
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops import NONE
from .derivatives import Operands, fill_missing_with_none, jvp, vjp
from .torch_internals import any_batched, apply_outside_torch_func, count_nested_jvp, in_trace, in_transform

_ops = torch.ops.elbo_ext
Apply = Callable[..., Any]


# ---- what a family writes ----


class Differentiable(Function):
    """A Function for torch.compile; its forward-mode derivative has a name that Dynamo does not look for."""

    with_jvp: ClassVar[Apply]

    @classmethod
    def eager_jvp(cls, ctx: Any, *tangents: Any) -> Any:
        """``jvp`` of XWithJvp."""
        raise NotImplementedError


class KernelFunction(Differentiable):
    """What a kernel computes and a formula in torch describes. ``apply`` takes settings first, then tensors."""

    settings: ClassVar[int]

    @staticmethod
    def in_torch(*arguments: Any) -> Any:
        """The result of ``forward`` in torch operations, which has all derivatives; not rounded alike."""
        raise NotImplementedError

    @classmethod
    def eager_jvp(cls, ctx: Any, *tangents: Any) -> Any:
        return jvp(cls.formula(ctx), ctx.saved_tensors, tangents[cls.settings :])

    @classmethod
    def formula(cls, ctx: Any) -> Apply:
        """in_torch as a function of the tensors alone."""
        raise NotImplementedError


class ValueFunction(KernelFunction):
    """``apply(spec, *tensors)``: values whose gradients a kernel makes. A family writes

    - ``forward(spec, *tensors)``: calls the operator.
    - ``backward(ctx, *upstream)``: calls :func:`needed_gradients`.
    - ``in_torch(spec, *tensors)``: the formula.
    - ``vmap``: torch's rule. It calls :func:`apply_under_transforms`.
    - ``value_and_gradients(spec, needs, *tensors)``, if one operator makes a reduced value and its needed gradients. Then
      also ``backward_function``, and ``negated(spec)`` if the gradients are of -1 times the value.

    and ``setup_context``, if it has to do more than that of this class.
    """

    settings = 1
    backward_function: ClassVar[type["GradientFunction"]]
    value_and_gradients: ClassVar[Apply | None] = None
    no_functorch: ClassVar[Apply]
    grad_in_forward: ClassVar[Apply | None] = None

    @staticmethod
    def negated(spec: Any) -> bool:
        """Whether ``value_and_gradients`` makes the gradients of -1 times the value."""
        return False

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @classmethod
    def formula(cls, ctx: Any) -> Apply:
        return lambda *tensors: cls.in_torch(ctx.spec, *tensors)


class GradientFunction(KernelFunction):
    """``apply(spec, needs, *upstream, *tensors)``: the needed gradients of a :class:`ValueFunction`, a tuple. A family
    writes ``forward``, ``in_torch`` and ``vmap``. Dynamo never sees one of them."""

    settings = 2
    upstream: ClassVar[int] = 1  # how many upstream gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        return None, None, *vjp(cls.formula(ctx), ctx.saved_tensors, ctx.needs_input_grad[2:], grads)

    @classmethod
    def formula(cls, ctx: Any) -> Apply:
        return lambda *tensors: cls.in_torch(ctx.spec, ctx.needs, *tensors)


# ---- the derived classes ----


def _with_jvp(function: type[Differentiable]) -> dict[str, Any]:
    members: dict[str, Any] = {"jvp": classmethod(lambda cls, ctx, *tangents: cls.eager_jvp(ctx, *tangents))}
    if issubclass(function, KernelFunction):
        settings = function.settings

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            function.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*inputs[settings:])

        members["setup_context"] = staticmethod(setup_context)
    return members


# On a small problem Function.apply takes longer than the kernels: it inspects the signature of a Function with
# setup_context, and unwraps what torch.func may have left wrapped. A forward that takes ctx itself needs no signature, and
# where no transform is active, apply_outside_torch_func goes past the rest.


def _no_functorch(function: type[ValueFunction]) -> dict[str, Any]:
    compute, setup_context = function.forward, function.setup_context

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = compute(*inputs)
        setup_context(ctx, inputs, output)
        return output

    return {"forward": staticmethod(forward), "setup_context": Function.setup_context}


def _grad_in_forward(function: type[ValueFunction]) -> dict[str, Any] | None:
    """Not for unreduced results, whose upstream gradient differs from row to row."""
    if function.value_and_gradients is None:
        return None
    compute, backward_function = function.value_and_gradients, function.backward_function

    def forward(ctx: Any, spec: Any, *operands: Tensor | None) -> Any:
        ctx.spec = spec
        ctx.save_for_backward(*operands)
        value, *ctx.gradients = compute(spec, ctx.needs_input_grad[1:], *operands)
        return value

    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        operands = ctx.saved_tensors  # torch's own error if one of them was changed in place
        gradients: Sequence[Tensor] | None = take_gradients(ctx, grad)
        if gradients is None:
            gradients = needed_gradients(backward_function, ctx.spec, needs, grad, *operands)
        else:
            _ops.scale_gradients_(gradients, grad, function.negated(ctx.spec))
        return None, *fill_missing_with_none(gradients, needs)

    return {
        "forward": staticmethod(forward),
        "setup_context": Function.setup_context,
        "backward": staticmethod(backward),
    }


class _Derived(NamedTuple):
    suffix: str  # of the class's name
    attribute: str  # of X, holds ``apply`` of the class
    of: type[Differentiable]  # the base class of X
    members: Callable[[Any], dict[str, Any] | None]  # of the class, instead of those of X; None: X has no such class
    get_apply: Callable[[type[Function]], Apply]


_DERIVED = (
    _Derived("WithJvp", "with_jvp", Differentiable, _with_jvp, lambda function: function.apply),
    _Derived("NoFunctorch", "no_functorch", ValueFunction, _no_functorch, apply_outside_torch_func),
    _Derived("GradInForward", "grad_in_forward", ValueFunction, _grad_in_forward, apply_outside_torch_func),
)

AnyDifferentiable = TypeVar("AnyDifferentiable", bound=Differentiable)


def in_every_mode(function: type[AnyDifferentiable]) -> type[AnyDifferentiable]:
    """Gives the class, unchanged otherwise, the derived classes of _DERIVED that its base class has."""
    for row in _DERIVED:
        members = row.members(function) if issubclass(function, row.of) else None
        if members is not None:
            derived = new_class(function.__name__ + row.suffix, (function,))
            derived.__module__ = function.__module__
            for name, member in members.items():
                setattr(derived, name, member)
            setattr(function, row.attribute, row.get_apply(derived))
    return function


# ---- the choice ----


def wants_grad(operands: Operands) -> bool:
    if torch.is_grad_enabled():
        for t in operands:
            if t is not None and t.requires_grad:
                return True
    return False


def any_float16(operands: Operands) -> bool:
    """Gradients made in the forward pass could underflow in float16, before a GradScaler's factor reaches them."""
    for t in operands:
        if t is not None and t.dtype is torch.float16:
            return True
    return False


def choose_forward(function: type[ValueFunction], operands: Operands, reduction: int = NONE) -> Apply:
    """The cheapest way to a forward pass that serves the caller's way of differentiating. ``operands``: all that may need
    a gradient."""
    compiling = torch.compiler.is_compiling()
    if in_trace():
        return function.in_torch
    if in_transform():
        # torch.func inside of a compiled function, and forward mode over forward mode, go past a Function's rules
        # (the latter with a derivative of zero), so that they get the formula itself.
        return function.in_torch if compiling or count_nested_jvp() > 1 else function.with_jvp
    if not wants_grad(operands):
        return function.forward
    if compiling:
        return function.apply
    if reduction != NONE and function.grad_in_forward is not None and not any_float16(operands):
        return function.grad_in_forward
    return function.no_functorch


def needed_gradients(
    function: type[GradientFunction], spec: Any, needs: Sequence[bool], *tensors: Tensor | None
) -> Sequence[Tensor]:
    """``function.apply`` in the cheapest way that serves the caller's way of differentiating, from a backward pass."""
    compute: Callable[..., Sequence[Tensor]]
    if torch.compiler.is_compiling():
        compute = function.forward
    elif any_batched(tensors[: function.upstream]):
        compute = function.in_torch
    elif torch.is_grad_enabled() or in_transform():
        compute = function.with_jvp
    else:
        compute = function.forward
    gradients: Sequence[Tensor] = compute(spec, needs, *tensors)
    return gradients


def apply_under_transforms(function: type[Differentiable]) -> Apply:
    """``function.apply`` as torch.func's transforms and torch.compile take it."""
    return function.apply if torch.compiler.is_compiling() else function.with_jvp


def take_gradients(ctx: Any, *upstream: Tensor | None) -> list[Tensor] | None:
    """The gradients made in the forward pass. They are given away: the first backward pass takes them, so that autograd
    may keep them without a copy. None if they are gone, or if the upstream gradients ask for more than numbers: functions
    of what they depend on (create_graph), or a batch of them."""
    if ctx.gradients is None or torch.is_grad_enabled() or any_batched(upstream):
        return None
    gradients: list[Tensor] = ctx.gradients
    ctx.gradients = None
    return gradients
