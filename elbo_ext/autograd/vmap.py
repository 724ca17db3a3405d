"""What the families' vmap rules share: the mapped axis becomes the first batch dimension."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..ops import NONE, REDUCTIONS
from .derivatives import Operands, joint_shape

MEAN = REDUCTIONS["mean"]


def _rank(t: Tensor, dim: int | None) -> int:
    return t.dim() - (dim is not None)


def as_a_slice_sees_them(operands: Operands, dims: Sequence[int | None]) -> list[Tensor | None]:
    """Tensors without data, of the operands' dtypes and of the ranks that they have without the mapped axis: what decides
    the dtype of a result (ops.value_dtype), which the mapped axis must not change."""
    return [
        None if t is None else torch.empty((1,) * _rank(t, dim), dtype=t.dtype, device="meta")
        for t, dim in zip(operands, dims, strict=True)
    ]


def with_mapped_axis_first(
    operands: Operands, dims: Sequence[int | None], size: int, expand: bool
) -> list[Tensor | None]:
    """Operands with the mapped axis before the joint rank of all. ``expand``: also those that have none."""
    rank = max(_rank(t, dim) for t, dim in zip(operands, dims, strict=True) if t is not None)
    aligned: list[Tensor | None] = []
    for t, dim in zip(operands, dims, strict=True):
        if t is not None:
            own_rank = _rank(t, dim)
            if dim is not None:
                t = t.movedim(dim, 0)
            elif expand:
                t = t.unsqueeze(0).expand(size, *t.shape)
            if dim is not None or expand:
                t = t.reshape(size, *(1,) * (rank - own_rank), *t.shape[1:])
        aligned.append(t)
    return aligned


def in_shape_of_operands(
    gradients: Iterable[Tensor | None], operands: Operands, dims: Sequence[int | None], size: int
) -> list[Tensor]:
    """Gradients by the operands that :func:`with_mapped_axis_first` returned, those that are not None, in the shape of the
    operands that it was given, with the mapped axis first."""
    shaped = []
    for g, t, dim in zip(gradients, operands, dims, strict=True):
        if g is not None and t is not None:
            shaped.append(g.reshape(size, *(s for i, s in enumerate(t.shape) if i != dim)))
    return shaped


def unreduced_gradient(
    grad: Tensor, dim: int | None, batch_dims: int, reduction: int, aligned: Operands, size: int
) -> Tensor:
    """The upstream gradient per example, from that of a result reduced over examples. ``aligned``: the operands, the mapped
    axis first."""
    grad = grad.unsqueeze(0).expand(size, *grad.shape) if dim is None else grad.movedim(dim, 0)
    if reduction == NONE:
        return grad
    batch = joint_shape(aligned)[1 : batch_dims + 1]
    if reduction == MEAN:
        grad = grad / math.prod(batch)
    return grad.reshape(size, *(1,) * len(batch)).expand(size, *batch)


def reduce_examples(values: Tensor, reduction: int) -> Tensor:
    """Per mapped index, over the examples: ``[size, *batch]`` to ``[size]``, or as it is."""
    if reduction == NONE:
        return values
    values = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    return values.mean(1) if reduction == MEAN else values.sum(1)
