"""Sums of terms: log-likelihoods and the KL (likelihoods.py)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..likelihoods import LIKELIHOODS, TERMS_BY_NUMBER
from ..ops import NONE, as_tensor, value_dtype
from .derivatives import Operands, device_of, fill_missing_with_none, sum_of_elements, vjp, without_none
from .modes import (
    GradientFunction,
    ValueFunction,
    apply_under_transforms,
    choose_forward,
    in_every_mode,
    needed_gradients,
)
from .vmap import (
    MEAN,
    as_a_slice_sees_them,
    in_shape_of_operands,
    reduce_examples,
    unreduced_gradient,
    with_mapped_axis_first,
)

_ops = torch.ops.elbo_ext


class TermSpec(NamedTuple):
    """The arguments of the term_sum operators that are not tensors, in their order (csrc/ops/schema.cpp). The operands,
    weight last, come after the term."""

    term: int
    constants: tuple[float, ...]  # stand for operands that are None
    forms: int
    batch_dims: int
    reduction: int

    @property
    def over_classes(self) -> bool:
        """Whether the last dimension of the operands is one of classes, which the term is a sum over: then the operators are
        those of csrc/ops/categorical.cpp."""
        return TERMS_BY_NUMBER[self.term].over_classes

    def under_vmap(self) -> "TermSpec":
        """With the mapped axis as an axis of examples, and no reduction over them."""
        return self._replace(batch_dims=self.batch_dims + 1, reduction=NONE)


@in_every_mode
class TermSumBackward(GradientFunction):
    """``apply(spec, needs, grad, *operands)``: the needed gradients of :class:`TermSum`."""

    @staticmethod
    def forward(spec: TermSpec, needs: Sequence[bool], grad: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
        backward = _ops.categorical_backward if spec.over_classes else _ops.term_sum_backward
        return tuple(backward(spec.term, operands, *spec[1:], grad, needs))

    @staticmethod
    def in_torch(spec: TermSpec, needs: Sequence[bool], grad: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
        grad = grad.to(value_dtype(*operands))
        return without_none(vjp(lambda *ts: TermSum.in_torch(spec, *ts), operands, needs, grad))

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], spec: TermSpec, needs: Sequence[bool], grad: Tensor, *operands: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims, size = in_dims[3:], info.batch_size
        aligned = with_mapped_axis_first(operands, dims, size, expand=True)
        grad = unreduced_gradient(grad, in_dims[2], spec.batch_dims, spec.reduction, aligned, size)
        gradients = apply_under_transforms(TermSumBackward)(spec.under_vmap(), needs, grad, *aligned)
        result = in_shape_of_operands(fill_missing_with_none(gradients, needs), operands, dims, size)
        return tuple(result), (0,) * len(result)


@in_every_mode
class TermSum(ValueFunction):
    """``apply(spec, *operands)``: the sum of a term, weight last; operands that are None stand for constants."""

    backward_function = TermSumBackward

    @staticmethod
    def forward(spec: TermSpec, *operands: Tensor | None) -> Tensor:
        value: Tensor = (_ops.categorical if spec.over_classes else _ops.term_sum)(spec.term, operands, *spec[1:])
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        gradients = needed_gradients(TermSumBackward, ctx.spec, needs, grad, *ctx.saved_tensors)
        return None, *fill_missing_with_none(gradients, needs)

    @staticmethod
    def value_and_gradients(spec: TermSpec, needs: Sequence[bool], *operands: Tensor | None) -> Sequence[Tensor]:
        factor = -1.0 if TermSum.negated(spec) else 1.0
        compute = _ops.categorical_with_gradients if spec.over_classes else _ops.term_sum_with_gradients
        results: Sequence[Tensor] = compute(spec.term, operands, *spec[1:], factor, needs)
        return results

    @staticmethod
    def negated(spec: TermSpec) -> bool:
        """A log-likelihood is maximized: its upstream gradient is usually -1, a KL's 1. What the forward pass has multiplied
        by, the backward pass need not."""
        return TERMS_BY_NUMBER[spec.term].name in LIKELIHOODS

    @staticmethod
    def in_torch(spec: TermSpec, *operands: Tensor | None) -> Tensor:
        dtype = value_dtype(*operands)
        device = device_of(operands)
        *inputs, weight = (
            as_tensor(constant, dtype, device)
            if t is None
            else t
            if spec.over_classes and not t.is_floating_point()
            else t.to(dtype)
            for t, constant in zip(operands, spec.constants, strict=True)
        )
        value = TERMS_BY_NUMBER[spec.term].in_torch(
            spec.forms, inputs, None if operands[-1] is None else weight, spec.constants
        )
        rows = without_none(operands)
        if spec.over_classes:  # whose values are of the rows
            rows = tuple(t[..., 0] for t in rows)
        examples = sum_of_elements(torch.broadcast_tensors(value, *rows)[0], spec.batch_dims)
        if spec.reduction == NONE:
            return examples
        return examples.mean() if spec.reduction == MEAN else examples.sum()

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], spec: TermSpec, *operands: Tensor | None) -> tuple[Tensor, int]:
        aligned = with_mapped_axis_first(operands, in_dims[1:], info.batch_size, expand=False)
        examples = apply_under_transforms(TermSum)(spec.under_vmap(), *aligned)
        dtype = value_dtype(*as_a_slice_sees_them(operands, in_dims[1:]))
        return reduce_examples(examples.to(dtype), spec.reduction), 0


def term_sum(spec: TermSpec, operands: Operands) -> Tensor:
    value: Tensor = choose_forward(TermSum, operands, spec.reduction)(spec, *operands)
    return value
