"""Subclasses of torch.Tensor that tests of several folders give to the package."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Wrapper(Tensor):
    """Holds its tensor in ``_t``; what it is itself has neither values nor a gradient."""

    _t: Tensor
    calls: ClassVar[list[Any]] = []

    @staticmethod
    def __new__(cls, t: Tensor) -> "Wrapper":
        shell = Tensor._make_subclass(cls, torch.full_like(t.detach(), float("nan") if t.is_floating_point() else -1))
        shell._t = t
        return shell

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        result = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))
        return tree_map(lambda t: Wrapper(t) if type(t) is Tensor else t, result)


class Plain(Tensor):
    """Overrides nothing."""


def unwrapped(t: Any) -> Any:
    return t._t if isinstance(t, Wrapper) else t
