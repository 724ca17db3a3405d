"""What our classes share."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.types import _size

from .. import arguments

Self = TypeVar("Self", bound="Fused")

_HALF = (torch.bfloat16, torch.float16)


class Fused(Distribution):
    """A distribution whose log-density is one of the package's functions.

    It stands after torch's class in the list of bases, and so between that class and ``Distribution``: what torch's
    constructors and ``expand`` say to ``Distribution`` comes here first, and they need not be written again.
    """

    def __init__(
        self,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008  immutable
        event_shape: torch.Size = torch.Size(),  # noqa: B008
        validate_args: bool | None = None,
    ) -> None:
        if torch.compiler.is_compiling():  # which a check would end
            validate_args = False
        for name, parameter in self._given().items():
            if isinstance(parameter, Tensor):  # and no other class with a __torch_function__
                arguments.tensor(name, parameter)
                if validate_args is None and parameter.device.type != "cpu":
                    validate_args = False
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def _given(self) -> dict[str, Any]:
        """The parameters that are there: given, or computed from those by now."""
        return {name: self.__dict__[name] for name in self.arg_constraints if name in self.__dict__}

    def _expanded(self: Self, cls: type, batch_shape: _size, instance: Self | None) -> Self:
        """What torch's own ``expand`` do, for a class ``cls`` that has a constructor of its own."""
        new: Self = self._get_checked_instance(cls, instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        for name, parameter in self._given().items():
            setattr(new, name, parameter.expand(shape))
        Fused.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _score(self, log_prob: Callable[..., Tensor], value: Tensor, **parameters: Tensor) -> Tensor:
        """``log_prob``, a function of the package, element by element."""
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a torch.Tensor, got {type(value).__name__}")
        if self._validate_args:
            self._validate_sample(value)
        return log_prob(value, **parameters, batch_dims=max(value.dim(), len(self._batch_shape)))


def wide(t: Tensor) -> Tensor:
    """In the precision that the kernels compute in."""
    return t.float() if t.dtype in _HALF else t


def uniform(shape: torch.Size, like: Tensor) -> Tensor:
    """Numbers from [0, 1)."""
    return torch.rand(shape, dtype=torch.float32 if like.dtype in _HALF else like.dtype, device=like.device)
