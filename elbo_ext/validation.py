"""Checks of values, for those who ask: they wait for the device, and so are never made otherwise."""

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributions import constraints

from .autograd.torch_internals import in_trace, in_transform
from .likelihoods import Likelihood, Term

__all__ = ["validate_values"]

Result = TypeVar("Result")

_requested: ContextVar[bool] = ContextVar("elbo_ext.validate_values", default=False)


class validate_values:
    """Whether the functions of the package look at the values of tensors: within a ``with``, or from here on.

    A switch and no argument of every function, as what is to be checked is a piece of a program, and NaN rarely comes from
    the last call::

        with elbo_ext.validate_values():
            loss = elbo_ext.elbo_loss(decoder(z), x, kl=kl, likelihood="bernoulli").loss

    Then no argument of a function may be NaN, what is positive by its meaning (``std``, ``var``, ``scale``, ``rate`` ...) has
    to be above zero (or zero, with a floor), and ``x`` in the support of the likelihood. Elements of weight zero may be
    anything. Each call of a function waits for the device once. It holds in the thread or task that asks for it; nothing is
    checked inside of ``torch.compile``, ``torch.func``, forward mode, traces and CUDA graphs.

    Args:
        mode: False ends it.

    Raises:
        ValueError: from the functions, with the argument's name and the first index and value that is not allowed.
    """

    def __init__(self, mode: bool = True) -> None:
        global ever_requested
        ever_requested = True
        self._before = _requested.set(bool(mode))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        _requested.reset(self._before)


class _Check(NamedTuple):
    name: str
    value: Tensor
    allowed: constraints.Constraint
    rule: str  # what the message says of the argument
    weight: Tensor | None

    def failing(self) -> Tensor:
        bad: Tensor = ~self.allowed.check(self.value.detach())
        return bad if self.weight is None else bad & (self.weight.detach() != 0)


_Checks = dict[tuple[str, int], _Check]
_collected: ContextVar[_Checks | None] = ContextVar("elbo_ext.collected", default=None)  # by the outermost function


ever_requested = False  # what every call of the package asks first, as it costs nothing


def requested() -> bool:
    """And whether values can be looked at."""
    return (
        not torch.compiler.is_compiling()
        and _requested.get()
        and not in_transform()
        and not in_trace()
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def call(function: Callable[..., Result], args: Any, kwargs: Any) -> Result:
    """The public function, and then the checks of its arguments and of what it calls."""
    outer = _collected.get()
    checks: _Checks = {} if outer is None else outer
    before = _collected.set(checks)
    try:
        for name, value in _by_name(function, args, kwargs).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                _add(checks, _Check(name, value, constraints.real, "must not be NaN,", None))
        result = function(*args, **kwargs)
    finally:
        _collected.reset(before)
    if outer is None:
        _raise_first(list(checks.values()))
    return result


def operands(term: Term, named: Mapping[str, Any], forms: int, weight: Tensor | None) -> None:
    """What is known of the operands of a term, in the place of what is true of every argument."""
    checks = None if not ever_requested or torch.compiler.is_compiling() else _collected.get()
    if checks is None:
        return
    for k, (name, value) in enumerate(named.items()):
        if isinstance(value, Tensor):
            allowed: constraints.Constraint = constraints.real
            rule = "must not be NaN,"
            form = forms >> 4 * k & 15
            if form in term.positive_of_inputs[k]:
                allowed, rule = constraints.positive, "must be positive,"
            elif form % len(term.forms_of_inputs[k]) in term.positive_of_inputs[k]:  # above a floor
                allowed, rule = constraints.nonnegative, "must not be negative or NaN,"
            elif name == "x" and isinstance(term, Likelihood) and term.support is not constraints.real:
                allowed, rule = term.support, f"must be in the support of the {term.name} likelihood, {term.support},"
            _add(checks, _Check(name, value, allowed, rule, weight))


def checked_where_used(name: str, value: Tensor) -> None:
    """An argument that a function hands on, and does not look at itself, is checked where it is used: with a weight, say."""
    checks = None if not ever_requested or torch.compiler.is_compiling() else _collected.get()
    if checks is not None:
        checks.pop((name, id(value)), None)


def _add(checks: _Checks, check: _Check) -> None:
    checks[check.name, id(check.value)] = check  # which keeps the tensor, and so its id


def _by_name(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    try:
        named = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except TypeError:  # the function's own error is to come
        return {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


@torch.no_grad()
def _raise_first(checks: list[_Check]) -> None:
    if not checks:
        return
    failing = [check.failing() for check in checks]
    for check, bad, found in zip(checks, failing, torch.stack([bad.any() for bad in failing]).tolist(), strict=True):
        if found:
            # Where the weight repeats the operand, the operand's own index.
            shape = check.value.shape
            joint = bad.nonzero()[0].tolist()[bad.dim() - len(shape) :]
            index = tuple(0 if size == 1 else i for i, size in zip(joint, shape, strict=True))
            where = f" at index {index}" if index else ""
            raise ValueError(f"{check.name} {check.rule} got {check.value[index].item():g}{where}")
