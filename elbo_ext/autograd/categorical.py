"""One-hot samples whose gradient passes straight through to the probabilities, with the KL."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import formulas
from ..likelihoods import CATEGORICAL_KL
from ..ops import NONE, value_dtype
from .derivatives import Operands, fill_missing_with_none, vjp, without_none
from .modes import (
    GradientFunction,
    ValueFunction,
    apply_under_transforms,
    choose_forward,
    in_every_mode,
    needed_gradients,
)
from .term_sum import TermSpec, TermSum
from .vmap import (
    as_a_slice_sees_them,
    in_shape_of_operands,
    reduce_examples,
    unreduced_gradient,
    with_mapped_axis_first,
)

_ops = torch.ops.elbo_ext


class CategoricalSpec(NamedTuple):
    """The arguments of the operators categorical_sample and categorical_sample_backward that are not tensors."""

    constants: tuple[float, ...]  # of logits, prior and weight; the first is unimix
    num_samples: int | None
    batch_dims: int
    reduction: int

    @property
    def sample_axes(self) -> int:
        return int(self.num_samples is not None)

    def under_vmap(self) -> "CategoricalSpec":
        """With the mapped axis as an axis of examples, and no reduction over them."""
        return self._replace(batch_dims=self.batch_dims + 1, reduction=NONE)

    def kl(self) -> TermSpec:
        return TermSpec(CATEGORICAL_KL.number, self.constants, 0, self.batch_dims, self.reduction)


def gumbel_noise(seed: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the kernels of a device make from the seeds ``[n]``, which may be on the CPU: ``[n, *shape]``."""
    seeds = seed.reshape(-1).to(device, non_blocking=True)
    noise: Tensor = _ops.gumbel_noise(seeds, math.prod(shape), dtype == torch.float64)
    return noise.reshape(seed.numel(), *shape)


@in_every_mode
class CategoricalSampleBackward(GradientFunction):
    """``apply(spec, needs, grad_z, grad_kl, *operands)``: the needed gradients of :class:`CategoricalSample`, from that of the
    samples, summed over them, and that of the KL."""

    upstream = 2

    @staticmethod
    def forward(
        spec: CategoricalSpec, needs: Sequence[bool], grad_z: Tensor | None, grad_kl: Tensor | None,
        *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if grad_z is None:  # the KL alone
            kl = spec.kl()
            return tuple(_ops.categorical_backward(kl.term, operands, *kl[1:], grad_kl, needs))
        return tuple(
            _ops.categorical_sample_backward(
                operands, spec.constants, spec.batch_dims, spec.reduction, grad_z, grad_kl, needs
            )
        )

    @staticmethod
    def in_torch(
        spec: CategoricalSpec, needs: Sequence[bool], grad_z: Tensor | None, grad_kl: Tensor | None,
        *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        def with_gradient(*operands: Tensor | None) -> tuple[Tensor, ...]:
            results = []
            if grad_z is not None:
                results.append(_probabilities(spec, operands).to(grad_z.dtype))
            if grad_kl is not None:
                results.append(TermSum.in_torch(spec.kl(), *operands))
            return tuple(results)

        upstream = without_none((grad_z, grad_kl))
        return without_none(vjp(with_gradient, operands, needs, upstream))

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], spec: CategoricalSpec, needs: Sequence[bool], grad_z: Tensor | None,
        grad_kl: Tensor | None, *operands: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
        size, dims = info.batch_size, in_dims[4:]
        aligned = with_mapped_axis_first(operands, dims, size, expand=True)
        if grad_z is not None:
            dim = in_dims[2]
            grad_z = grad_z.expand(size, *grad_z.shape) if dim is None else grad_z.movedim(dim, 0)
        if grad_kl is not None:
            grad_kl = unreduced_gradient(grad_kl, in_dims[3], spec.batch_dims, spec.reduction, aligned, size)
        gradients = apply_under_transforms(CategoricalSampleBackward)(
            spec.under_vmap(), needs, grad_z, grad_kl, *aligned
        )
        result = in_shape_of_operands(fill_missing_with_none(gradients, needs), operands, dims, size)
        return tuple(result), (0,) * len(result)


@in_every_mode
class CategoricalSample(ValueFunction):
    """``apply(spec, seed, noise, *operands)``: (z, kl); operands are logits and prior, which may be None, and None for the
    weight."""

    @staticmethod
    def forward(
        spec: CategoricalSpec, seed: Tensor | None, noise: Tensor | None, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        constants, num_samples, batch_dims, reduction = spec
        results: Sequence[Tensor] = _ops.categorical_sample(
            operands, constants, seed, noise, num_samples, batch_dims, reduction
        )
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[3:]
        _, _, *operands = ctx.saved_tensors
        if (grad_z is None and grad_kl is None) or not any(needs):
            return (None,) * len(ctx.needs_input_grad)
        if grad_z is not None and ctx.spec.num_samples is not None:
            grad_z = grad_z.sum(0, dtype=value_dtype(*operands))
        gradients = needed_gradients(CategoricalSampleBackward, ctx.spec, needs, grad_z, grad_kl, *operands)
        return None, None, None, *fill_missing_with_none(gradients, needs)

    @staticmethod
    def in_torch(
        spec: CategoricalSpec, seed: Tensor | None, noise: Tensor | None, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        logits = operands[0]
        assert logits is not None
        p = _probabilities(spec, operands)
        shape = p.shape if spec.num_samples is None else (spec.num_samples, *p.shape)
        if noise is None:
            assert seed is not None
            noise = gumbel_noise(seed, shape, p.dtype, logits.device)[0]
        drawn = (p.detach().log() + noise.to(p.dtype)).argmax(-1, keepdim=True)
        one_hot = torch.zeros(shape, dtype=p.dtype, device=p.device).scatter(-1, drawn, 1.0)
        z = one_hot + (p - p.detach())
        return z.to(logits.dtype), TermSum.in_torch(spec.kl(), *operands)

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], spec: CategoricalSpec, seed: Tensor | None, noise: Tensor | None,
        *operands: Tensor | None,
    ) -> tuple[Any, Any]:  # fmt: skip
        size, dims, axis = info.batch_size, in_dims[3:], spec.sample_axes
        # Expanded, so that z has the mapped axis even where only the noise has it.
        aligned = with_mapped_axis_first(operands, dims, size, expand=True)
        whole = torch.broadcast_shapes(*(t.shape for t in aligned if t is not None))
        shape = whole[1:] if spec.num_samples is None else (spec.num_samples, *whole[1:])
        if noise is None:
            assert seed is not None
            seeds = seed if in_dims[1] is None else seed.movedim(in_dims[1], 0)
            noise = gumbel_noise(seeds, shape, value_dtype(*operands), seed.device)
            noise = noise.expand(size, *shape)  # without a mapped seed, the same for all
        else:
            noise = noise.expand(size, *noise.shape) if in_dims[2] is None else noise.movedim(in_dims[2], 0)
        z, kl = apply_under_transforms(CategoricalSample)(spec.under_vmap(), None, noise.movedim(0, axis), *aligned)
        dtype = value_dtype(*as_a_slice_sees_them(operands, dims))
        return (z, reduce_examples(kl.to(dtype), spec.reduction)), (axis, 0)


def _probabilities(spec: CategoricalSpec, operands: Operands) -> Tensor:
    logits = operands[0]
    assert logits is not None
    return formulas.mixed_with_uniform(logits.to(value_dtype(*operands)).log_softmax(-1), spec.constants[0]).exp()


def categorical_sample(
    spec: CategoricalSpec, seed: Tensor | None, noise: Tensor | None, operands: Operands
) -> tuple[Tensor, Tensor]:
    sampled: tuple[Tensor, Tensor] = choose_forward(CategoricalSample, operands)(spec, seed, noise, *operands)
    return sampled
