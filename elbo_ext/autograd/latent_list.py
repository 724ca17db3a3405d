"""The latent stage of several tensors together, such as the weights of a network: one node of the graph for all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops import WITH_KL
from .derivatives import Operands, fill_missing_with_none
from .latent import LatentBackward, LatentSpec, passes_through
from .modes import needed_gradients, wants_grad
from .torch_internals import any_batched, apply_outside_torch_func, in_transform

_ops = torch.ops.elbo_ext


class LatentListSpec(NamedTuple):
    """The arguments of the latent_list operators that are not tensors. The tensors' specs differ in their constants alone."""

    each: tuple[LatentSpec, ...]

    @property
    def width(self) -> int:
        """The number of inputs of each tensor."""
        return len(self.each[0].constants)

    @property
    def arguments(self) -> tuple[tuple[float, ...], int]:
        """The constants of all, and the forms: what comes before the seeds."""
        return tuple(constant for spec in self.each for constant in spec.constants), self.each[0].forms

    def apart(self, inputs: Sequence[Any]) -> list[Sequence[Any]]:
        """What belongs to each tensor, of one entry for each input."""
        return [inputs[first : first + self.width] for first in range(0, len(inputs), self.width)]


class LatentList(Function):
    """``apply(spec, seeds, *inputs)``: the samples, and after them the KL if there is one. For eager code outside of
    torch.func; elsewhere each tensor has a call of its own."""

    @staticmethod
    def forward(ctx: Any, spec: LatentListSpec, seeds: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seeds, *inputs)
        return _forward(spec, seeds, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        spec: LatentListSpec = ctx.spec
        count, needs = len(spec.each), ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        seeds, *inputs = ctx.saved_tensors
        of_z, of_kl = grads[:count], grads[count] if spec.each[0].results == WITH_KL else None
        if torch.is_grad_enabled() or in_transform() or any_batched(grads):
            return None, None, *_one_by_one(spec, needs, of_z, of_kl, seeds, inputs)
        needs = list(needs)
        result: list[Tensor | None] = [None] * len(inputs)
        for k in range(count):
            mu = k * spec.width
            if needs[mu] and passes_through(inputs[mu], of_z[k], of_kl):
                needs[mu], result[mu] = False, of_z[k]
        if any(needs):
            gradients = _ops.latent_list_backward(inputs, *spec.arguments, seeds, *spec.each[0][2:], of_z, of_kl, needs)
            for i, gradient in enumerate(fill_missing_with_none(gradients, needs)):
                if gradient is not None:
                    result[i] = gradient
        return None, None, *result


def _forward(spec: LatentListSpec, seeds: Tensor, inputs: Operands) -> tuple[Tensor, ...]:
    return tuple(_ops.latent_list(inputs, *spec.arguments, seeds, *spec.each[0][2:]))


def _one_by_one(
    spec: LatentListSpec,
    needs: Sequence[bool],
    of_z: Operands,
    of_kl: Tensor | None,
    seeds: Tensor,
    inputs: Operands,
) -> list[Tensor | None]:
    """The gradients as functions of what they depend on, or of batches of upstream gradients."""
    result: list[Tensor | None] = []
    for k, (own, own_needs) in enumerate(zip(spec.apart(inputs), spec.apart(needs), strict=True)):
        gradients: Sequence[Tensor] = ()
        if any(own_needs) and (of_z[k] is not None or of_kl is not None):
            gradients = needed_gradients(
                LatentBackward, spec.each[k], (*own_needs, False), of_z[k], of_kl, None, seeds[k : k + 1], None, *own
            )
            result += fill_missing_with_none(gradients, own_needs)
        else:
            result += [None] * spec.width
    return result


_apply = apply_outside_torch_func(LatentList)


def latent_list(spec: LatentListSpec, seeds: Tensor, inputs: Operands) -> tuple[Tensor, ...]:
    if not wants_grad(inputs):
        return _forward(spec, seeds, inputs)
    results: tuple[Tensor, ...] = _apply(spec, seeds, *inputs)
    return results
