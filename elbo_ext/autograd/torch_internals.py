"""What the package uses of torch that has no public name, so that a new torch is checked against one file.

All of it was seen in torch 2.11.0, 2.13.0 and 2.15.0, unless the function says otherwise. The one private import elsewhere
is that of ops.py, which registers the draw of a seed as an effect before this package can be imported.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.distributions import kl as _kl

_functorch = torch._C._functorch
_is_legacy_batched: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
_torch_func_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_tracing: Callable[[], bool] = torch._C._is_tracing
_count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_DYNAMO_HANDLES_OVERRIDES = torch.__version__ >= "2.13"


def in_forward_mode() -> bool:
    """Inside torch.autograd.forward_ad.dual_level."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Under torch.func, or in forward mode."""
    return _torch_func_is_active() or forward_ad._current_level >= 0  # not by a call: it is asked often


def is_tracing() -> bool:
    """Inside of torch.jit.trace. Its public name takes ten times as long, and Dynamo knows neither."""
    return not torch.compiler.is_compiling() and _is_tracing()


def in_trace() -> bool:
    """Inside of torch.jit.trace or torch.onnx.export, which have no translation of our operators. Both of its exporters trace,
    one by torch.jit.trace and the other by torch.export."""
    return torch.onnx.is_in_onnx_export() if torch.compiler.is_compiling() else _is_tracing()


def is_recorded() -> bool:
    """Whether operators are compiled, traced, transformed, watched by a mode, or captured in a CUDA graph, any of which may
    run them again."""
    return (
        torch.compiler.is_compiling()
        or _is_tracing()
        or in_transform()
        or _count_modes() != 0
        or torch.cuda.is_current_stream_capturing()
    )


def count_nested_jvp() -> int:
    """How many torch.func.jvp (or jacfwd) are nested around the call."""
    return sum(level.key() == _functorch.TransformType.Jvp for level in _functorch.get_interpreter_stack() or ())


def any_batched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Under torch.autograd.grad(is_grads_batched=True), an older kind of vmap that asks no Function for its rule."""
    for t in tensors:
        if t is not None and _is_legacy_batched(t):
            return True
    return False


def any_overrides(values: tuple[Any, ...]) -> bool:
    """Whether one of the values has a ``__torch_function__`` of its own: torch.overrides.has_torch_function, but for modes."""
    return any(type(value) is not Tensor for value in torch.overrides._get_overloaded_args(values))


def dynamo_knows_of_overrides() -> bool:
    """False inside of Tensor.__torch_function__, where torch.overrides.has_torch_function says so only in eager code; and in
    torch 2.11, whose Dynamo stops at torch.overrides.handle_torch_function (that of 2.13 and 2.15 does not)."""
    return _DYNAMO_HANDLES_OVERRIDES and torch._C._is_torch_function_enabled()


def apply_outside_torch_func(function: type[Function]) -> Callable[..., Any]:
    """function.apply, for a Function without setup_context, and for calls outside torch.func.

    On a small problem Function.apply of torch 2.11 and 2.13 takes longer than the kernels: it unwraps what torch.func may
    have left in the arguments. What it calls then is its base class's apply, which is returned here. In 2.15 both are the
    same.
    """
    apply: Callable[..., Any] = super(Function, function).apply  # type: ignore[misc]
    return apply


def remember_kl(*pairs: tuple[type, type]) -> None:
    """Finds what torch.distributions.kl_divergence calls for these classes now: Dynamo cannot trace the search, but what it has
    found before. Any later ``register_kl`` makes torch forget."""
    for pair in pairs:
        _kl._KL_MEMOIZE[pair] = _kl._dispatch_kl(*pair)
