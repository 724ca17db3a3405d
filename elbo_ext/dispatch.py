"""What every public function does before its own work: it gives way to arguments that take the call over, and checks values
for those who ask (validation.py).

``__torch_function__`` is how torch's own functions let a subclass of torch.Tensor, or another class, do so (see
:mod:`torch.overrides`). A subclass that keeps its tensor inside would otherwise be taken for the empty shell that it is, and
lose its gradient without a word. :func:`torch.fx.symbolic_trace` records calls in the same way.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import validation
from .autograd.torch_internals import any_overrides, dynamo_knows_of_overrides

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def public(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Dispatches ``__torch_function__`` of all arguments and of the modes around the call, as torch's own functions do."""
    return _dispatching(function, asks_modes=True)


def public_with_lists(
    of_lists: Callable[..., Any],
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """The same for a function that takes a list of tensors in place of its first argument, ``mu``, and then others:
    ``of_lists(function)`` is called for these."""
    return lambda function: _dispatching(function, asks_modes=True, of_lists=of_lists)


def public_with_callback(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The same for a function that runs code of the caller's, a function or a generator. Modes alone are not asked: torch
    suspends a mode while it is asked, and that code has to run in it (``with torch.device(...)``)."""
    return _dispatching(function, asks_modes=False)


def _dispatching(
    function: Callable[Parameters, Result], asks_modes: bool, of_lists: Callable[..., Any] | None = None
) -> Callable[Parameters, Result]:
    overridden = _overridden if asks_modes else overridden_by_arguments
    function_of_lists = function if of_lists is None else of_lists(function)

    @functools.wraps(function)
    def dispatching(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        values: tuple[Any, ...] = (*args, *kwargs.values())
        called = function
        if of_lists is not None and isinstance(mu := args[0] if args else kwargs.get("mu"), (list, tuple)):
            values = tuple(t for value in values for t in (value if isinstance(value, (list, tuple)) else (value,)))
            if any(isinstance(t, Tensor) for t in mu):
                called = function_of_lists
        if has_torch_function(values) and overridden(values):  # the first alone costs next to nothing
            result: Result = handle_torch_function(dispatching, values, *args, **kwargs)
            return result
        if validation.ever_requested and validation.requested():
            return validation.call(called, args, kwargs)
        return called(*args, **kwargs)

    return dispatching


def _overridden(values: tuple[Any, ...]) -> bool:
    return has_torch_function(values) and (not torch.compiler.is_compiling() or dynamo_knows_of_overrides())


def overridden_by_arguments(values: tuple[Any, ...]) -> bool:
    """By one of the values, whatever modes there are."""
    return _overridden(values) and any_overrides(values)
