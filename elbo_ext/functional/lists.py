"""Functions of the latent stage that are given lists: several tensors, such as the weights of a network, in one call.

In eager code all tensors are sampled by one operator, which on CUDA is one kernel where they are dense, of one dtype
(float32 or bfloat16) and have numbers for priors. Inside of torch.compile and torch.func, with explicit noise, weights or
generators for each example, and where float64 and narrower tensors are mixed, each tensor has a call of its own.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import arguments, autograd
from ..arguments import PRIOR_SCALES, SCALES
from ..autograd import LatentListSpec
from ..ops import WITH_KL, Z_ALONE, value_dtype
from . import latent_call
from .latent_call import LatentCall, prepare

Result = TypeVar("Result")

_ONE_BY_ONE = ("noise", "weight", "kl_weight")  # what has to be None for one operator to serve


def of_lists(results: int, draws: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """From a function of one tensor ``mu`` to that of a list of them. ``results`` (ops.py): what the latent stage returns;
    without ``draws`` the function returns no samples."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(inspect.signature(function).parameters)

        def function_of_lists(*args: Any, **kwargs: Any) -> Any:
            arguments.keywords(kwargs, names)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            z, kl = _of_lists(function, results, draws, given)
            return z if results == Z_ALONE else (z, kl) if draws else kl

        return function_of_lists

    return decorate


def _of_lists(
    function: Callable[..., Any], results: int, draws: bool, given: Mapping[str, Any]
) -> tuple[list[Tensor], Tensor | None]:
    """The samples, and the sum of the KLs."""
    calls = _arguments_per_tensor(given)
    if _fits_one_call(given):
        prepared = [_of_position(k, prepare, results, *_of_call(call, draws)) for k, call in enumerate(calls)]
        dims = prepared[0].spec.batch_dims
        _check_one_batch(dims, (call.shape[:dims] for call in prepared))
        if len({(value_dtype(*call.inputs), call.spec.forms) for call in prepared}) == 1:
            return _in_one_call(results, draws, given, prepared)
    returned = [_of_position(k, function, **call) for k, call in enumerate(calls)]
    if results == Z_ALONE:
        return returned, None
    samples, kls = zip(*returned, strict=True) if draws else ([], returned)
    _check_one_batch(given.get("batch_dims", 1), (kl.shape for kl in kls))
    return list(samples), functools.reduce(torch.add, kls)


def _arguments_per_tensor(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each tensor: an entry of every list, and all others as they are."""
    count = len(given["mu"])
    for name, value in given.items():
        if name == "generator":
            continue
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a list of {count}, as mu is, or a number, got a torch.Tensor")
        if isinstance(value, (list, tuple)) and len(value) != count:
            raise ValueError(f"{name} must be a list of {count}, as mu is, got {len(value)}")
    return [
        {
            name: value[k] if isinstance(value, (list, tuple)) and name != "generator" else value
            for name, value in given.items()
        }
        for k in range(count)
    ]


def _of_position(position: int, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """What the function returns for the tensors of one position, which its errors name."""
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"at position {position} of the lists: {error}") from None


def _fits_one_call(given: Mapping[str, Any]) -> bool:
    if any(given.get(name) is not None for name in _ONE_BY_ONE) or isinstance(given.get("generator"), (list, tuple)):
        return False
    return not (torch.compiler.is_compiling() or autograd.in_trace() or autograd.in_transform())


def _of_call(call: Mapping[str, Any], draws: bool) -> tuple[Any, ...]:
    """The arguments of `prepare`, after the first."""
    scales, prior_scales = (tuple(call.get(name) for name in names) for names in (SCALES, PRIOR_SCALES))
    num_samples = call.get("num_samples") if draws else 0
    return (
        call["mu"], scales, call.get("prior_mu"), prior_scales, num_samples, call.get("batch_dims", 1),
        call.get("reduction", "none"),
    )  # fmt: skip


def _check_one_batch(batch_dims: int, shapes: Iterable[Sequence[int]]) -> None:
    different = sorted({tuple(arguments.known_shape(shape)) for shape in shapes})
    if len(different) > 1:
        raise ValueError(
            f"the tensors of the lists must have one batch shape, as they have one KL, got {' and '.join(map(str, different))} "
            f"with batch_dims={batch_dims}; batch_dims=0 adds up all elements, as for the weights of a network"
        )


def _in_one_call(
    results: int, draws: bool, given: Mapping[str, Any], prepared: Sequence[LatentCall]
) -> tuple[list[Tensor], Tensor | None]:
    mu: dict[str, Tensor] = {f"mu[{k}]": call.named["mu"] for k, call in enumerate(prepared)}
    first, count = mu["mu[0]"], len(prepared)
    arguments.on_one_device({"mu[0]": first}, mu)
    generator = given.get("generator")
    arguments.generator(generator, torch.Size(()))
    seeds = latent_call.draw_seeds(first.device, generator, count) if draws else torch.zeros(count, dtype=torch.int64)
    spec = LatentListSpec(tuple(call.spec for call in prepared))
    inputs = tuple(t for call in prepared for t in call.inputs)
    sampled = autograd.latent_list(spec, seeds, inputs)
    kl = sampled[-1] if results == WITH_KL else None
    return list(sampled[:count]), kl
