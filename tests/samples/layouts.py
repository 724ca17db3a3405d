"""The same numbers, lying differently in memory."""

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def as_it_is(t: Tensor) -> Tensor:
    return t


def _copied_into(place: Tensor, t: Tensor) -> Tensor:
    return place.copy_(t)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def transposed(t: Tensor) -> Tensor:
    """The first two dimensions swapped in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def reversed_dims(t: Tensor) -> Tensor:
    """Column-major: the first dimension is the innermost one."""
    return t.permute(*range(t.dim() - 1, -1, -1)).contiguous().permute(*range(t.dim() - 1, -1, -1))


def stepped(t: Tensor) -> Tensor:
    """Every third element of a longer last dimension."""
    return _copied_into(t.new_zeros(*t.shape[:-1], 3 * t.shape[-1])[..., 1::3], t)


def stepped_rows(t: Tensor) -> Tensor:
    """Every second row, and a margin after each."""
    return _copied_into(t.new_zeros(2 * t.shape[0], *t.shape[1:-1], t.shape[-1] + 5)[::2, ..., : t.shape[-1]], t)


def unaligned(t: Tensor) -> Tensor:
    """Contiguous, but the first element stands one element after an aligned address."""
    return _copied_into(t.new_zeros(t.numel() + 1)[1:].view(t.shape), t)


def first_row_repeated(t: Tensor) -> Tensor:
    """Stride 0 over the first dimension, at full size."""
    return t[:1].expand(t.shape)


def one_number_repeated(t: Tensor) -> Tensor:
    return t.flatten()[0].expand(t.shape)


def windows(t: Tensor) -> Tensor:
    """Rows that overlap in memory: each begins two elements after the one before."""
    return t.as_strided((t.shape[0], t.shape[-1]), (2, 1))


LAYOUTS: dict[str, Layout] = {
    "channels_last": channels_last,
    "transposed": transposed,
    "reversed": reversed_dims,
    "stepped": stepped,
    "stepped_rows": stepped_rows,
    "unaligned": unaligned,
    "first_row_repeated": first_row_repeated,
    "one_number_repeated": one_number_repeated,
}
