"""The latent stage: samples z of a Gaussian q, and what else is known of them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import formulas
from ..likelihoods import GAUSSIAN_KL
from ..ops import NONE, WITH_KL, WITH_LOG_PROB, Z_ALONE, as_tensor, sample_dtype, value_dtype
from .derivatives import Operands, device_of, fill_missing_with_none, joint_shape, sum_of_elements, vjp, without_none
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
_LOG_PROB_NAMES = {number: name for name, number in WITH_LOG_PROB.items()}
_SCORE = WITH_LOG_PROB["score"]


class LatentSpec(NamedTuple):
    """The arguments of the latent operators that are not tensors, in their order (csrc/ops/schema.cpp). Seed and noise come
    after the forms, the inputs before all."""

    constants: tuple[float, ...]
    forms: int  # of the inputs, as for the term gaussian_kl
    num_samples: int | None
    results: int
    batch_dims: int
    reduction: int

    @property
    def sample_axes(self) -> int:
        return int(self.num_samples is not None)

    def sample_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of z, from the inputs' joint shape."""
        return tuple(shape) if self.num_samples is None else (self.num_samples, *shape)

    def under_vmap(self) -> "LatentSpec":
        """With the mapped axis as an axis of examples, and no reduction over them."""
        return self._replace(batch_dims=self.batch_dims + 1, reduction=NONE)


# ---- noise ----


def explicit_noise(seed: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the kernels of a device make from the seeds ``[n]``, which may be on the CPU: ``[n, *shape]``."""
    seeds = seed.reshape(-1).to(device, non_blocking=True)  # no wait for the device
    noise: Tensor = _ops.normal_noise(seeds, math.prod(shape), dtype == torch.float64)
    return noise.reshape(seed.numel(), *shape)  # no -1: there may be no element


def _mapped_noise(
    seed: Tensor | None, noise: Tensor | None, in_dims: Sequence[Any], spec: LatentSpec, size: int, inputs: Operands,
    aligned: Operands,
) -> Tensor:  # fmt: skip
    """The noise of a mapped sample, explicit, in the kernels' layout: ``[K, size, ...]`` or ``[size, ...]``.

    A mapped seed (randomness="different") gives every slice its own stream, an unmapped one the same noise to all.
    """
    seed_dim, noise_dim = in_dims
    shape = spec.sample_shape(joint_shape(aligned)[1:])
    if noise is None:
        assert seed is not None
        seeds = seed if seed_dim is None else seed.movedim(seed_dim, 0)
        noise = explicit_noise(seeds, shape, value_dtype(*inputs), device_of(inputs))
        if seed_dim is None:
            noise = noise.expand(size, *shape)
    else:
        noise = noise.unsqueeze(0).expand(size, *noise.shape) if noise_dim is None else noise.movedim(noise_dim, 0)
        noise = noise.reshape(size, *(1,) * (len(shape) - noise.dim() + 1), *noise.shape[1:])
    return noise.movedim(0, spec.sample_axes)


# ---- the functions ----


@in_every_mode
class LatentBackward(GradientFunction):
    """``apply(spec, needs, grad_z, grad_second, grad_third, seed, noise, *inputs)``: the needed gradients of
    :class:`Latent`, from those of its results; the last flag of needs is for the noise."""

    upstream = 3

    @staticmethod
    def forward(
        spec: LatentSpec, needs: Sequence[bool], grad_z: Tensor | None, grad_second: Tensor | None,
        grad_third: Tensor | None, seed: Tensor | None, noise: Tensor | None, *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with_kl = spec.results == WITH_KL
        grads = (grad_z, grad_second, None, None) if with_kl else (grad_z, None, grad_second, grad_third)
        return tuple(_ops.latent_backward(inputs, *spec[:2], seed, noise, *spec[2:], *grads, needs))

    @staticmethod
    def in_torch(
        spec: LatentSpec, needs: Sequence[bool], grad_z: Tensor | None, grad_second: Tensor | None,
        grad_third: Tensor | None, seed: Tensor | None, noise: Tensor | None, *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grads = (grad_z, grad_second, grad_third)

        def results_with_gradient(noise: Tensor | None, *inputs: Tensor | None) -> tuple[Tensor, ...]:
            results = Latent.in_torch(spec, seed, noise, *inputs)
            results = (results,) if isinstance(results, Tensor) else results
            return tuple(r for r, grad in zip(results, grads, strict=False) if grad is not None)

        needs = (needs[-1], *needs[:-1])
        of_noise, *of_inputs = vjp(results_with_gradient, (noise, *inputs), needs, without_none(grads))
        return without_none((*of_inputs, of_noise))

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], spec: LatentSpec, needs: Sequence[bool], grad_z: Tensor | None,
        grad_second: Tensor | None, grad_third: Tensor | None, seed: Tensor | None, noise: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
        size, dims = info.batch_size, in_dims[7:]
        aligned = with_mapped_axis_first(inputs, dims, size, expand=True)
        mapped_noise = _mapped_noise(seed, noise, in_dims[5:7], spec, size, inputs, aligned)
        axis = spec.sample_axes

        def per_sample(grad: Tensor | None, dim: int | None) -> Tensor | None:
            if grad is None:
                return None
            if dim is not None:
                return grad.movedim(dim, axis)
            return grad.unsqueeze(axis).expand(*grad.shape[:axis], size, *grad.shape[axis:])

        if spec.results == WITH_KL:
            if grad_second is not None:
                grad_second = unreduced_gradient(
                    grad_second, in_dims[3], spec.batch_dims, spec.reduction, aligned, size
                )
        else:
            grad_second, grad_third = per_sample(grad_second, in_dims[3]), per_sample(grad_third, in_dims[4])
        upstream = (per_sample(grad_z, in_dims[2]), grad_second, grad_third)
        gradients = apply_under_transforms(LatentBackward)(
            spec.under_vmap(), needs, *upstream, None, mapped_noise, *aligned
        )
        *of_inputs, of_noise = fill_missing_with_none(gradients, needs)
        result = in_shape_of_operands(of_inputs, inputs, dims, size)
        if of_noise is not None:
            result.append(of_noise.movedim(axis, 0))
        return tuple(result), (0,) * len(result)


@in_every_mode
class Latent(ValueFunction):
    """``apply(spec, seed, noise, *inputs)``: z, (z, kl) or (z, log_q, log_p), as spec.results says; inputs are mu and
    scale, and where there is more than z, prior_mu and prior_scale."""

    @staticmethod
    def forward(
        spec: LatentSpec, seed: Tensor | None, noise: Tensor | None, *inputs: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        results: Sequence[Tensor] = _ops.latent(inputs, *spec[:2], seed, noise, *spec[2:])
        return results[0] if spec.results == Z_ALONE else tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec = spec = inputs[0]
        ctx.set_materialize_grads(False)
        if spec.results == _SCORE:
            ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_second: Tensor | None = None, grad_third: Tensor | None = None
    ) -> Any:
        if grad_z is None and grad_second is None and grad_third is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, needs_noise, *needs_inputs = ctx.needs_input_grad
        needs = (*needs_inputs, needs_noise)
        seed, noise, *inputs = ctx.saved_tensors
        of_mu_is_of_z = needs[0] and grad_third is None and passes_through(inputs[0], grad_z, grad_second)
        if of_mu_is_of_z:
            needs = (False, *needs[1:])
        gradients: Sequence[Tensor] = ()
        if any(needs):
            upstream = (grad_z, grad_second, grad_third)
            gradients = needed_gradients(LatentBackward, ctx.spec, needs, *upstream, seed, noise, *inputs)
        of_mu, *of_others, of_noise = fill_missing_with_none(gradients, needs)
        return None, None, of_noise, grad_z if of_mu_is_of_z else of_mu, *of_others

    @classmethod
    def eager_jvp(cls, ctx: Any, *tangents: Any) -> Any:
        derivative = super().eager_jvp(ctx, *tangents)
        return (None, *derivative[1:]) if ctx.spec.results == _SCORE else derivative

    @staticmethod
    def in_torch(
        spec: LatentSpec, seed: Tensor | None, noise: Tensor | None, *inputs: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        dtype = value_dtype(*inputs)
        device = device_of(inputs)
        mu, scale, *prior = (
            as_tensor(constant, dtype, device) if t is None else t.to(dtype)
            for t, constant in zip(inputs, spec.constants, strict=True)
        )
        if noise is None:
            assert seed is not None
            eps = explicit_noise(seed, spec.sample_shape(joint_shape(inputs)), dtype, device)[0]
        else:
            eps = noise.to(dtype)
        form, prior_form = GAUSSIAN_KL.form_names(spec.forms)
        floor, prior_floor = GAUSSIAN_KL.floors_in(spec.forms, spec.constants)
        gradient = _LOG_PROB_NAMES.get(spec.results, "pathwise")
        z, log_q = formulas.sample_and_log_prob(mu, scale, form, eps, gradient, floor)
        rounded = z.to(sample_dtype(*inputs[:2]))
        if spec.results == Z_ALONE:
            return rounded
        if spec.results == WITH_KL:
            kl = TermSpec(GAUSSIAN_KL.number, (*spec.constants, 1.0), spec.forms, spec.batch_dims, spec.reduction)
            return rounded, TermSum.in_torch(kl, *inputs, None)
        prior_mu, prior_scale = prior
        log_p = formulas.gaussian(z, prior_mu, prior_scale, prior_form.replace("prior_", ""), prior_floor)
        return rounded, *(sum_of_elements(t, spec.batch_dims + spec.sample_axes) for t in (log_q, log_p))

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], spec: LatentSpec, seed: Tensor | None, noise: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Any, Any]:  # fmt: skip
        size, dims = info.batch_size, in_dims[3:]
        # Expanded, so that z has the mapped axis even where only the noise has it.
        aligned = with_mapped_axis_first(inputs, dims, size, expand=True)
        noise = _mapped_noise(seed, noise, in_dims[1:3], spec, size, inputs, aligned)
        result = apply_under_transforms(Latent)(spec.under_vmap(), None, noise, *aligned)
        axis, seen = spec.sample_axes, as_a_slice_sees_them(inputs, dims)
        dtype, dtype_of_z = value_dtype(*seen), sample_dtype(*seen[:2])
        if spec.results == Z_ALONE:
            return result.to(dtype_of_z), axis
        z, *others = result[0].to(dtype_of_z), *(t.to(dtype) for t in result[1:])
        if spec.results == WITH_KL:
            return (z, reduce_examples(others[0], spec.reduction)), (axis, 0)
        return (z, *others), (axis,) * 3


def passes_through(mu: Tensor | None, grad_z: Tensor | None, grad_kl: Tensor | None) -> bool:
    """dz/dmu = 1: where nothing else reaches mu, its gradient is that of z, and nothing is written."""
    if mu is None or grad_z is None or grad_kl is not None:
        return False
    same = mu.shape == grad_z.shape and mu.dtype is grad_z.dtype
    return same and mu.is_contiguous() and grad_z.is_contiguous()


def latent(spec: LatentSpec, seed: Tensor | None, noise: Tensor | None, inputs: Operands) -> Any:
    return choose_forward(Latent, (noise, *inputs))(spec, seed, noise, *inputs)
