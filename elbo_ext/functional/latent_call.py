"""One call of the latent stage: its arguments, checked, and where its noise comes from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments, autograd, ops, validation
from ..autograd import LatentSpec
from ..autograd.torch_internals import is_recorded
from ..likelihoods import GAUSSIAN_KL
from ..ops import NONE, Z_ALONE, draw_on_cuda, value_dtype
from .operands import Forms, Generators, operands_and_constants, posterior_and_prior


class LatentCall(NamedTuple):
    """Of one tensor: its operands by name, and as the latent operators take them."""

    named: dict[str, Any]
    forms: Forms
    shape: torch.Size  # of one sample
    weight: Tensor | None  # of the KL
    inputs: tuple[Tensor | None, ...]
    spec: LatentSpec


def prepare(
    results: int,
    mu: Any,
    scales: Sequence[Any],
    prior_mu: Any,
    prior_scales: Sequence[Any],
    num_samples: Any,
    batch_dims: Any,
    reduction: Any,
    kl_weight: Any = None,
) -> LatentCall:
    """A call for ``results`` (ops.py), checked. Where z is all, there is neither a prior nor a batch."""
    if results == Z_ALONE:
        name, scale, form, floor = arguments.scale(arguments.SCALES, scales)
        named = {"mu": arguments.tensor("mu", mu), name: scale}
        # The prior, which there is none of, is of the same form: kernels are compiled for pairs of forms.
        forms = Forms(GAUSSIAN_KL.pack((0, form, 0, form if floor == 0 else 0)), (0.0, floor))
    else:
        named, forms = posterior_and_prior(mu, scales, prior_mu, prior_scales)
    shape = arguments.broadcast(named)
    weight = arguments.kl_weight(kl_weight, mu, shape)
    validation.operands(GAUSSIAN_KL, named, forms.number, weight)
    inputs, constants = operands_and_constants(named.values(), forms.floors)
    samples = arguments.num_samples(num_samples)
    if results == Z_ALONE:
        batch, reduced = 0, NONE
    else:
        batch, reduced = arguments.batch_dims(batch_dims, shape), arguments.reduction(reduction)
    return LatentCall(
        named, forms, shape, weight, inputs, LatentSpec(constants, forms.number, samples, results, batch, reduced)
    )


def seed_or_noise(call: LatentCall, generator: Generators, noise: Any) -> tuple[Tensor | None, Tensor | None]:
    """What the latent operators take: a fresh seed, or the caller's noise."""
    mu, shape, spec, inputs = call.named["mu"], call.shape, call.spec, call.inputs
    arguments.generator(generator, shape)
    if noise is None:
        if (generator is None or isinstance(generator, torch.Generator)) and autograd.in_trace():
            return None, _noise_of_torch(spec, inputs, generator)
        if generator is not None and not isinstance(generator, torch.Generator):
            return None, _noise_of_each(mu, shape, spec, generator, value_dtype(*inputs))
        if torch.compiler.is_compiling() and generator is None:
            return torch.ops.elbo_ext.draw_seed(mu), None
        return draw_seeds(mu.device, generator), None
    if generator is not None:
        raise ValueError("noise and generator were both given; noise leaves nothing to draw")
    arguments.tensor("noise", noise)
    expected = spec.sample_shape(shape)
    if not arguments.same_shape(noise.shape, expected):
        raise ValueError(f"noise must have the shape of the sample, {tuple(expected)}, got {tuple(noise.shape)}")
    arguments.broadcast({"mu": mu, "noise": noise})  # for the device
    return None, noise


def draw_seeds(device: torch.device, generator: torch.Generator | None, count: int = 1) -> Tensor:
    """As many seeds, one after the other, as by ops.draw_seed; for CUDA on the CPU, read off the generator's state, where
    nothing records the draw: a tenth of the time that it takes to launch a kernel. The kernels take the seeds from either."""
    if device.type == "cuda" and not is_recorded():
        generator = torch.cuda.default_generators[device.index] if generator is None else generator
        return torch.tensor([draw_on_cuda(generator) for _ in range(count)])
    return ops.draw_seeds(device, generator, count)


def _noise_of_each(
    mu: Tensor, shape: torch.Size, spec: LatentSpec, generators: Sequence[torch.Generator], dtype: torch.dtype
) -> Tensor:
    """For every example what the kernels would make from a seed of its own generator."""
    seeds = [draw_seeds(mu.device, generator) for generator in generators]
    if not seeds:
        return mu.new_empty(spec.sample_shape(shape), dtype=dtype)
    noise = autograd.explicit_noise(torch.cat(seeds), spec.sample_shape(shape[1:]), dtype, mu.device)
    return noise.movedim(0, spec.sample_axes)


def _noise_of_torch(spec: LatentSpec, inputs: tuple[Tensor | None, ...], generator: torch.Generator | None) -> Tensor:
    """By an operator that a traced program runs anew at every call."""
    like = torch.broadcast_tensors(*(t for t in inputs if t is not None))[0]
    if spec.num_samples is not None:
        like = like.unsqueeze(0).expand(spec.num_samples, *(-1,) * like.dim())
    if generator is None:
        return torch.randn_like(like, dtype=value_dtype(*inputs))
    return torch.randn(like.shape, generator=generator, dtype=value_dtype(*inputs), device=like.device)
