"""The torch.autograd.Function classes around the operators, nothing else.

- :class:`TermSum` and :class:`Latent` serve every way of differentiating: backward, double backward, forward mode,
  torch.func transforms, torch.compile.
- :class:`ScalarTermSum` and :class:`ScalarELBO` are the fast path of plain eager training on a reduced result: the
  forward pass reads the inputs once and writes the gradients at the same time.

First derivatives always come from the kernels. Derivatives of derivatives are taken of the same formula written in torch
operations (formulas.py), by torch itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import formulas
from .likelihoods import GAUSSIAN_KL, TERMS_BY_NUMBER
from .ops import NONE, REDUCTIONS, WITH_KL, WITH_LOG_PROB, Z_ALONE, value_dtype

_ops = torch.ops.elbo_ext
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_LOG_PROB_NAMES = {number: name for name, number in WITH_LOG_PROB.items()}
_SCORE = WITH_LOG_PROB["score"]
MEAN = REDUCTIONS["mean"]

Operands = Sequence[Tensor | None]


class TermSpec(NamedTuple):
    """The arguments of the term_sum operators that are not tensors (csrc/ops/schema.cpp)."""

    term: int
    constants: tuple[float, ...]  # stand for operands that are None
    forms: int
    batch_dims: int
    reduction: int


class LatentSpec(NamedTuple):
    """The arguments of the latent operators that are not tensors (csrc/ops/schema.cpp)."""

    constants: tuple[float, ...]
    forms: int  # of the inputs, as for the term gaussian_kl
    num_samples: int | None
    results: int
    batch_dims: int
    reduction: int

    @property
    def sample_axes(self) -> int:
        return int(self.num_samples is not None)


# ---- the operators called with a spec and the operands in one tuple; the weight is the last operand of a term ----


def _term_arguments(spec: TermSpec, operands: Operands) -> tuple[Any, ...]:
    term, constants, forms, batch_dims, reduction = spec
    return term, operands, constants, forms, batch_dims, reduction


def _latent_arguments(spec: LatentSpec, seed: Tensor | None, noise: Tensor | None, inputs: Operands) -> tuple[Any, ...]:
    constants, forms, num_samples, results, batch_dims, reduction = spec
    return inputs, constants, forms, seed, noise, num_samples, results, batch_dims, reduction


def _spread(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """One gradient or None for each operand; ``gradients`` has those that are needed."""
    rest = iter(gradients)
    return [next(rest) if need else None for need in needs]


# ---- the same mathematics in torch operations, for derivatives of derivatives ----


def _term_in_torch(spec: TermSpec, *operands: Tensor | None) -> Tensor:
    dtype = value_dtype(*operands)
    device = next(t.device for t in operands if t is not None)
    *inputs, weight = (
        torch.full((), constant, dtype=dtype, device=device) if t is None else t.to(dtype)
        for t, constant in zip(operands, spec.constants, strict=True)
    )
    value = TERMS_BY_NUMBER[spec.term].in_torch(spec.forms, inputs, None if operands[-1] is None else weight)
    shape = torch.broadcast_shapes(*(t.shape for t in operands if t is not None))
    value = value.expand(shape)
    return _reduce(value.flatten(spec.batch_dims).sum(-1) if len(shape) > spec.batch_dims else value, spec.reduction)


def _latent_in_torch(spec: LatentSpec, seed: Tensor | None, noise: Tensor | None, *inputs: Tensor | None):
    dtype = value_dtype(*inputs)
    device = next(t.device for t in inputs if t is not None)
    mu, scale, *prior = (
        torch.full((), constant, dtype=dtype, device=device) if t is None else t.to(dtype)
        for t, constant in zip(inputs, spec.constants, strict=True)
    )
    shape = torch.broadcast_shapes(*(t.shape for t in inputs if t is not None))
    if spec.num_samples is not None:
        shape = (spec.num_samples, *shape)
    eps = _explicit_noise(seed, shape, dtype)[0] if noise is None else noise.to(dtype)
    form, prior_form = GAUSSIAN_KL.form_names(spec.forms)
    z, log_q = formulas.sample_and_log_prob(mu, scale, form, eps, _LOG_PROB_NAMES.get(spec.results, "pathwise"))
    rounded = z.to(_sample_dtype(inputs))
    if spec.results == Z_ALONE:
        return rounded
    if spec.results == WITH_KL:
        kl = TermSpec(GAUSSIAN_KL.number, (*spec.constants, 1.0), spec.forms, spec.batch_dims, spec.reduction)
        return rounded, _term_in_torch(kl, *inputs, None)
    log_p = formulas.gaussian(z, *prior, prior_form.removeprefix("prior_"))
    batch = shape[: spec.batch_dims + spec.sample_axes]
    return rounded, *(t.expand(shape).reshape(*batch, math.prod(shape[len(batch) :])).sum(-1) for t in (log_q, log_p))


def _sample_dtype(inputs: Operands) -> torch.dtype:
    dtypes = [t.dtype for t in inputs[:2] if t is not None]
    return torch.promote_types(dtypes[0], dtypes[-1])


def _explicit_noise(seed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What the kernels make from each of the seeds ``[n]``: ``[n, *shape]``."""
    noise = _ops.normal_noise(seed.reshape(-1), math.prod(shape), dtype == torch.float64)
    return noise.reshape(seed.numel(), *shape)  # no -1: there may be no element


def _reduce(examples: Tensor, reduction: int) -> Tensor:
    return examples if reduction == NONE else examples.mean() if reduction == MEAN else examples.sum()


def _vjp(function: Callable, operands: Operands, needs: Sequence[bool], cotangents) -> list[Tensor | None]:
    """Gradients of function(*operands) by the needed operands, by torch."""
    picked = [i for i, need in enumerate(needs) if need]

    def of_picked(*values: Tensor):
        full = list(operands)
        for i, value in zip(picked, values, strict=True):
            full[i] = value
        return function(*full)

    _, pull_back = torch.func.vjp(of_picked, *(operands[i] for i in picked))
    return _spread(pull_back(cotangents), needs)


def _jvp(function: Callable, operands: Operands, tangents: Operands):
    """The derivative of function(*operands) along the tangents: the transpose of the transpose, because torch.func.jvp
    cannot be nested inside torch.autograd.forward_ad."""
    picked = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def of_picked(*values: Tensor):
        full = list(operands)
        for i, value in zip(picked, values, strict=True):
            full[i] = value
        return function(*full)

    output, pull_back = torch.func.vjp(of_picked, *(operands[i] for i in picked))
    zeros = torch.zeros_like(output) if isinstance(output, Tensor) else tuple(map(torch.zeros_like, output))
    _, push_forward = torch.func.vjp(pull_back, zeros)
    return push_forward(tuple(tangents[i] for i in picked))[0]


# ---- vmap: the mapped axis becomes the first batch dimension ----


def _rank(t: Tensor, dim: int | None) -> int:
    return t.dim() - (dim is not None)


def _align(operands: Operands, dims: Sequence[int | None], size: int, expand: bool) -> list[Tensor | None]:
    """Operands with the mapped axis in front of the joint rank. ``expand``: also those that have none."""
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


def _unalign(gradients: Sequence[Tensor | None], operands: Operands, dims: Sequence[int | None], size: int):
    """Gradients of aligned operands, as gradients of the operands with the mapped axis in front."""
    shapes = [
        None if t is None else (size, *(s for i, s in enumerate(t.shape) if i != dim))
        for t, dim in zip(operands, dims, strict=True)
    ]
    return tuple(None if g is None else g.reshape(shape) for g, shape in zip(gradients, shapes, strict=True))


def _per_example(spec, size: int, operands: Operands, grad: Tensor | None, dim: int | None):
    """The spec without reduction over examples but with the mapped axis as an example axis, and the upstream gradient
    that goes with it."""
    inner = spec._replace(batch_dims=spec.batch_dims + 1, reduction=NONE)
    if grad is None:
        return inner, None
    grad = grad.unsqueeze(0).expand(size, *grad.shape) if dim is None else grad.movedim(dim, 0)
    if spec.reduction != NONE:
        batch = torch.broadcast_shapes(*(t.shape for t in operands if t is not None))[1 : spec.batch_dims + 1]
        if spec.reduction == MEAN:
            grad = grad / math.prod(batch)
        grad = grad.reshape(size, *(1,) * len(batch)).expand(size, *batch)
    return inner, grad


def _reduce_mapped(value: Tensor, reduction: int) -> Tensor:
    if reduction == NONE:
        return value
    value = value.flatten(1) if value.dim() > 1 else value.unsqueeze(1)
    return value.mean(1) if reduction == MEAN else value.sum(1)


def _mapped_noise(seed, noise, in_dims, spec: LatentSpec, size: int, inputs: Operands, dims) -> Tensor:
    """The noise of a mapped sample, explicit, in the kernels' layout: ``[K, size, ...]`` or ``[size, ...]``.

    A mapped seed (randomness="different") gives every slice its own stream, an unmapped one the same noise to all.
    """
    seed_dim, noise_dim = in_dims
    aligned = _align(inputs, dims, size, expand=True)
    shape = torch.broadcast_shapes(*(t.shape for t in aligned if t is not None))[1:]
    if spec.num_samples is not None:
        shape = (spec.num_samples, *shape)
    if noise is None:
        seeds = seed if seed_dim is None else seed.movedim(seed_dim, 0)
        noise = _explicit_noise(seeds, shape, value_dtype(*inputs))
        if seed_dim is None:
            noise = noise.expand(size, *shape)
    else:
        noise = noise.unsqueeze(0).expand(size, *noise.shape) if noise_dim is None else noise.movedim(noise_dim, 0)
        noise = noise.reshape(size, *(1,) * (len(shape) - noise.dim() + 1), *noise.shape[1:])
    return noise.movedim(0, 1) if spec.num_samples is not None else noise


# ---- sums of terms ----


class TermSum(Function):
    """``apply(spec, *operands)``: the sum of a term, weight last; operands that are None stand for constants."""

    @staticmethod
    def forward(spec: TermSpec, *operands: Tensor | None) -> Tensor:
        return _ops.term_sum(*_term_arguments(spec, operands))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.spec = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        needs = ctx.needs_input_grad[1:]
        gradients = _needed_gradients(TermSumBackward, ctx.spec, needs, grad, *ctx.saved_tensors)
        return None, *_spread(gradients, needs)

    @staticmethod
    def vmap(info, in_dims, spec: TermSpec, *operands: Tensor | None):
        operands = _align(operands, in_dims[1:], info.batch_size, expand=False)
        inner = spec._replace(batch_dims=spec.batch_dims + 1, reduction=NONE)
        return _reduce_mapped(_for_mode(TermSum).apply(inner, *operands), spec.reduction), 0


class TermSumBackward(Function):
    """``apply(spec, needs, grad, *operands)``: the needed gradients of :class:`TermSum`, a tuple."""

    @staticmethod
    def forward(spec: TermSpec, needs: Sequence[bool], grad: Tensor, *operands: Tensor | None):
        return tuple(_ops.term_sum_backward(*_term_arguments(spec, operands), grad, needs))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.spec, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def in_torch(spec: TermSpec, needs: Sequence[bool], grad: Tensor, *operands: Tensor | None):
        gradients = _vjp(lambda *ts: _term_in_torch(spec, *ts), operands, needs, grad.to(value_dtype(*operands)))
        return tuple(g for g in gradients if g is not None)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, *_vjp(
            lambda *ts: TermSumBackward.in_torch(ctx.spec, ctx.needs, *ts), ctx.saved_tensors, ctx.needs_input_grad[2:], grads
        )

    @staticmethod
    def vmap(info, in_dims, spec: TermSpec, needs: Sequence[bool], grad: Tensor, *operands: Tensor | None):
        dims, size = in_dims[3:], info.batch_size
        aligned = _align(operands, dims, size, expand=True)
        inner, grad = _per_example(spec, size, aligned, grad, in_dims[2])
        gradients = _spread(_for_mode(TermSumBackward).apply(inner, needs, grad, *aligned), needs)
        result = tuple(g for g in _unalign(gradients, operands, dims, size) if g is not None)
        return result, (0,) * len(result)


# ---- the latent stage ----


class Latent(Function):
    """``apply(spec, seed, noise, *inputs)``: z, (z, kl) or (z, log_q, log_p), as spec.results says; inputs are mu and
    scale, and where there is more than z, prior_mu and prior_scale."""

    @staticmethod
    def forward(spec: LatentSpec, seed: Tensor | None, noise: Tensor | None, *inputs: Tensor | None):
        results = _ops.latent(*_latent_arguments(spec, seed, noise, inputs))
        return results[0] if spec.results == Z_ALONE else tuple(results)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.spec, *tensors = inputs
        ctx.set_materialize_grads(False)
        if ctx.spec.results == _SCORE:
            ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad_z: Tensor | None, first: Tensor | None = None, second: Tensor | None = None):
        if grad_z is None and first is None and second is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, needs_noise, *needs_inputs = ctx.needs_input_grad
        needs = (*needs_inputs, needs_noise)
        seed, noise, *inputs = ctx.saved_tensors
        given_on = needs[0] and first is None and second is None and _alike(inputs[0], grad_z)
        if given_on:  # dz/dmu = 1: where nothing else reaches mu, its gradient is that of z, and nothing is written
            needs = (False, *needs[1:])
        gradients = ()
        if any(needs):
            gradients = _needed_gradients(LatentBackward, ctx.spec, needs, grad_z, first, second, seed, noise, *inputs)
        of_mu, *of_others, of_noise = _spread(gradients, needs)
        return None, None, of_noise, grad_z if given_on else of_mu, *of_others

    @staticmethod
    def vmap(info, in_dims, spec: LatentSpec, seed, noise, *inputs: Tensor | None):
        size, dims = info.batch_size, in_dims[3:]
        noise = _mapped_noise(seed, noise, in_dims[1:3], spec, size, inputs, dims)
        # Expanded, so that z has the mapped axis even where only the noise has it.
        aligned = _align(inputs, dims, size, expand=True)
        inner = spec._replace(batch_dims=spec.batch_dims + 1, reduction=NONE)
        result = _for_mode(Latent).apply(inner, None, noise, *aligned)
        axis = spec.sample_axes
        if spec.results == Z_ALONE:
            return result, axis
        if spec.results == WITH_KL:
            return (result[0], _reduce_mapped(result[1], spec.reduction)), (axis, 0)
        return result, (axis,) * 3


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and a.is_contiguous() and b.is_contiguous()


class LatentBackward(Function):
    """``apply(spec, needs, grad_z, first, second, seed, noise, *inputs)``: the needed gradients of :class:`Latent`, a
    tuple, from those of z and of the results behind z; the last flag of needs is for the noise."""

    @staticmethod
    def forward(spec: LatentSpec, needs, grad_z, first, second, seed, noise, *inputs: Tensor | None):
        grads = (grad_z, first, None, None) if spec.results == WITH_KL else (grad_z, None, first, second)
        return tuple(_ops.latent_backward(*_latent_arguments(spec, seed, noise, inputs), *grads, needs))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.spec, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def in_torch(spec: LatentSpec, needs, grad_z, first, second, seed, noise, *inputs: Tensor | None):
        grads = (grad_z, first, second)

        def function(noise, *inputs):
            results = _latent_in_torch(spec, seed, noise, *inputs)
            results = (results,) if spec.results == Z_ALONE else results
            return tuple(r for r, grad in zip(results, grads, strict=False) if grad is not None)

        cotangents = tuple(g for g in grads if g is not None)
        of_noise, *of_inputs = _vjp(function, (noise, *inputs), (needs[-1], *needs[:-1]), cotangents)
        return tuple(g for g in (*of_inputs, of_noise) if g is not None)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, *_vjp(
            lambda *ts: LatentBackward.in_torch(ctx.spec, ctx.needs, *ts), ctx.saved_tensors, ctx.needs_input_grad[2:], grads
        )

    @staticmethod
    def vmap(info, in_dims, spec: LatentSpec, needs, grad_z, first, second, seed, noise, *inputs: Tensor | None):
        size, dims = info.batch_size, in_dims[7:]
        noise_tensor = _mapped_noise(seed, noise, in_dims[5:7], spec, size, inputs, dims)
        aligned = _align(inputs, dims, size, expand=True)
        axis = spec.sample_axes

        def of_samples(grad: Tensor | None, dim: int | None) -> Tensor | None:
            if grad is None:
                return None
            if dim is not None:
                return grad.movedim(dim, axis)
            return grad.unsqueeze(axis).expand(*grad.shape[:axis], size, *grad.shape[axis:])

        if spec.results == WITH_KL:
            inner, first = _per_example(spec, size, aligned, first, in_dims[3])
        else:
            inner, _ = _per_example(spec, size, aligned, None, None)
            first, second = of_samples(first, in_dims[3]), of_samples(second, in_dims[4])
        gradients = _for_mode(LatentBackward).apply(
            inner, needs, of_samples(grad_z, in_dims[2]), first, second, None, noise_tensor, *aligned
        )
        *of_inputs, of_noise = _spread(gradients, needs)
        result = [g for g in _unalign(of_inputs, inputs, dims, size) if g is not None]
        if of_noise is not None:
            result.append(of_noise.movedim(axis, 0))
        return tuple(result), (0,) * len(result)


# ---- a value whose gradient is not its own ----


class WeightedGradient(Function):
    """``apply(weight, t)``: t itself; its gradient is multiplied by the number ``weight``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: float, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.weight = inputs[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad * ctx.weight


class GradientOf(Function):
    """``apply(value, surrogate)``: the value, with the gradient of the surrogate, of the same shape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad


class WeightedOnceMore(Function):
    """``apply(z, log_weights)``: z itself, and zeros [K, ...] in the shape of the log-weights.

    Whatever gradient comes back to z is multiplied by the normalized weights v [K, ...] of its samples. They are known
    only after z has been used, and so are handed to the backward pass as the gradient of the zeros: a result that adds
    v * zeros gives them, times its own upstream gradient, which the sum over samples is, as the weights add up to 1.
    (A hook on z would do, but Dynamo of torch 2.11 loses one that knows of later results.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        return z.view_as(z), torch.zeros_like(log_weights)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad_z: Tensor, grad_zeros: Tensor):
        upstream = grad_zeros.sum(0)
        v = torch.where(upstream == 0, 0.0, grad_zeros / upstream)
        return grad_z * v.reshape(*v.shape, *(1,) * (grad_z.dim() - v.dim())).to(grad_z.dtype), None


# ---- forward mode: torch.compile refuses a Function that defines jvp, so only eager code sees these ----


class EagerTermSum(TermSum):
    @staticmethod
    def jvp(ctx, _, *tangents: Tensor | None):
        return _jvp(lambda *ts: _term_in_torch(ctx.spec, *ts), ctx.saved_tensors, tangents)


class EagerTermSumBackward(TermSumBackward):
    @staticmethod
    def jvp(ctx, _, __, *tangents: Tensor | None):
        return _jvp(lambda *ts: TermSumBackward.in_torch(ctx.spec, ctx.needs, *ts), ctx.saved_tensors, tangents)


class EagerLatent(Latent):
    @staticmethod
    def jvp(ctx, _, *tangents: Tensor | None):
        derivative = _jvp(lambda *ts: _latent_in_torch(ctx.spec, *ts), ctx.saved_tensors, tangents)
        return (None, *derivative[1:]) if ctx.spec.results == _SCORE else derivative


class EagerLatentBackward(LatentBackward):
    @staticmethod
    def jvp(ctx, _, __, *tangents: Tensor | None):
        return _jvp(lambda *ts: LatentBackward.in_torch(ctx.spec, ctx.needs, *ts), ctx.saved_tensors, tangents)


class EagerWeightedGradient(WeightedGradient):
    @staticmethod
    def jvp(ctx, _, tangent: Tensor) -> Tensor:
        return tangent * ctx.weight


class EagerGradientOf(GradientOf):
    @staticmethod
    def jvp(ctx, _, tangent: Tensor) -> Tensor:
        return tangent


_EAGER = {
    TermSum: EagerTermSum,
    TermSumBackward: EagerTermSumBackward,
    Latent: EagerLatent,
    LatentBackward: EagerLatentBackward,
    WeightedGradient: EagerWeightedGradient,
    GradientOf: EagerGradientOf,
}


def _needed_gradients(function: type[Function], spec, needs, *tensors: Tensor | None) -> Sequence[Tensor]:
    """What a backward function returns, in the cheapest way that the caller's mode of differentiation allows."""
    if torch.compiler.is_compiling():
        return function.forward(spec, needs, *tensors)
    if _batched(*tensors[:3]):  # the upstream gradients are among the first three
        return function.in_torch(spec, needs, *tensors)
    if torch.is_grad_enabled() or _transformed():
        return _EAGER[function].apply(spec, needs, *tensors)
    return function.forward(spec, needs, *tensors)


def _batched(*grads: Tensor | None) -> bool:
    """Under torch.autograd.grad(is_grads_batched=True), an older kind of vmap that asks no Function for its rule."""
    for grad in grads:
        if grad is not None and _is_batched(grad):
            return True
    return False


def _for_mode(function: type[Function]) -> type[Function]:
    return function if torch.compiler.is_compiling() else _EAGER[function]


# ---- plain eager backward. On a small problem Function.apply takes longer than the kernels: it inspects the signature of a
# Function with setup_context, and unwraps what torch.func may have left behind. A forward that takes ctx itself needs no
# signature, and where no transform is active, _plain_apply goes past the rest ----


def _plain_apply(function: type[Function]) -> Callable:
    """function.apply, for a Function without setup_context, outside torch.func."""
    return super(Function, function).apply


class PlainTermSum(TermSum):
    setup_context = Function.setup_context

    @staticmethod
    def forward(ctx, spec: TermSpec, *operands: Tensor | None) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(*operands)
        return _ops.term_sum(*_term_arguments(spec, operands))


class PlainLatent(Latent):
    setup_context = Function.setup_context

    @staticmethod
    def forward(ctx, spec: LatentSpec, seed: Tensor | None, noise: Tensor | None, *inputs: Tensor | None):
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, noise, *inputs)
        z, *others = _ops.latent(*_latent_arguments(spec, seed, noise, inputs))
        if spec.results == _SCORE:
            ctx.mark_non_differentiable(z)
        return (z, *others) if others else z


# ---- the fast path: gradients in the forward pass ----


def _wants_grad(operands: Operands) -> bool:
    if torch.is_grad_enabled():
        for t in operands:
            if t is not None and t.requires_grad:
                return True
    return False


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _transformed() -> bool:
    """Under torch.func or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def fast_path(operands: Operands, reduction: int) -> bool:
    """Whether a term's gradients can be made in its forward pass.

    Not for unreduced results, whose upstream gradient differs from row to row; not for float16, whose gradients could
    underflow before a GradScaler's factor reaches them; not under torch.func, forward mode or torch.compile, which need
    functions without hidden state.
    """
    if reduction == NONE or torch.compiler.is_compiling() or _transformed() or not _wants_grad(operands):
        return False
    for t in operands:
        if t is not None and t.dtype is torch.float16:
            return False
    return True


def _take_gradients(ctx, *grads: Tensor | None) -> list[Tensor] | None:
    """The gradients made in the forward pass. They are given away: the first backward pass takes them, so that autograd
    may keep them without a copy. None if they are gone, or if the upstream ``grads`` ask for more than numbers: functions
    of what they depend on (create_graph), or a batch of them."""
    if ctx.gradients is None or torch.is_grad_enabled() or _batched(*grads):
        return None
    gradients, ctx.gradients = ctx.gradients, None
    return gradients


class ScalarTermSum(Function):
    """As :class:`TermSum`, reduced, with gradients in the forward pass."""

    @staticmethod
    def forward(ctx, spec: TermSpec, *operands: Tensor | None) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(*operands)
        value, *ctx.gradients = _ops.term_sum_with_gradients(
            *_term_arguments(spec, operands), 1.0, ctx.needs_input_grad[1:]
        )
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        needs = ctx.needs_input_grad[1:]
        operands = ctx.saved_tensors  # torch's own error if one of them was changed in place
        gradients = _take_gradients(ctx, grad)
        if gradients is None:
            gradients = _needed_gradients(TermSumBackward, ctx.spec, needs, grad, *operands)
        else:
            _ops.scale_gradients_(gradients, grad)
        return None, *_spread(gradients, needs)


class ScalarELBO(Function):
    """``apply(spec, beta, kl, *operands)``: (loss, log_likelihood, kl), each reduced by spec.reduction.

    loss = beta * kl - log_likelihood, so that the operands' gradient is (grad of log_likelihood - grad of loss) times
    that of the log-likelihood, and the gradient of the KL is grad of kl + beta * grad of loss.
    """

    @staticmethod
    def forward(ctx, spec: TermSpec, beta: float, kl: Tensor, *operands: Tensor | None):
        ctx.spec, ctx.beta = spec, beta
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)
        loss, log_likelihood, reduced_kl, ctx.of_kl, *ctx.gradients = _ops.elbo_with_gradients(
            *_term_arguments(spec, operands), kl, beta, ctx.needs_input_grad[3:]
        )
        if not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(reduced_kl)
        return loss, log_likelihood, reduced_kl

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, grad_log_likelihood: Tensor | None, grad_kl: Tensor | None):
        needs, operands = ctx.needs_input_grad[3:], ctx.saved_tensors
        if grad_loss is not None or grad_log_likelihood is not None:
            gradients = _take_gradients(ctx, grad_loss, grad_log_likelihood, grad_kl)
            if gradients is not None:
                of_kl = _ops.elbo_backward(gradients, ctx.of_kl, grad_loss, grad_log_likelihood, grad_kl, ctx.beta)
                return None, None, of_kl, *_spread(gradients, needs)
        of_kl = None
        upstream = _sum_of(grad_kl, None if grad_loss is None else grad_loss * ctx.beta)
        if upstream is not None and ctx.needs_input_grad[2]:
            of_kl = ctx.of_kl * upstream
        upstream = _sum_of(grad_log_likelihood, None if grad_loss is None else -grad_loss)
        if upstream is None or not any(needs):
            return None, None, of_kl, *(None for _ in needs)
        gradients = _needed_gradients(TermSumBackward, ctx.spec, needs, upstream, *operands)
        return None, None, of_kl, *_spread(gradients, needs)


def _sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


# ---- the importance-weighted bound ----


def _importance_in_torch(log_weights: Tensor) -> Tensor:
    # Where all weights are zero, so are all derivatives: torch's would be NaN.
    nothing = (log_weights == -math.inf).all(0)
    bound = torch.where(nothing, 0.0, log_weights).logsumexp(0) - math.log(len(log_weights))
    return torch.where(nothing, -math.inf, bound)


def normalized_weights(log_weights: Tensor) -> Tensor:
    """w_k / sum_j w_j of ``[K, ...]``; 0 where all weights are zero."""
    nothing = (log_weights == -math.inf).all(0)
    return torch.where(nothing, 0.0, torch.where(nothing, 0.0, log_weights).softmax(0))


class ImportanceBound(Function):
    """``apply(log_weights)``: ln 1/K sum_k w_k of ``[K, ...]``. Its gradient, the normalized weights w_k / sum_j w_j, is
    made in the forward pass."""

    @staticmethod
    def forward(ctx, log_weights: Tensor) -> Tensor:
        bound, weights = _ops.importance_bound(log_weights.contiguous(), True)
        ctx.save_for_backward(log_weights, weights)
        return bound

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        log_weights, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # the weights as functions of the log-weights
            weights = normalized_weights(log_weights)
        return grad.unsqueeze(0) * weights


# ---- what the public functions call ----

_plain_term_sum, _plain_latent = _plain_apply(PlainTermSum), _plain_apply(PlainLatent)
_scalar_term_sum = _plain_apply(ScalarTermSum)
_scalar_elbo = _plain_apply(ScalarELBO)
_importance_bound = _plain_apply(ImportanceBound)


def weighted_gradient(weight: float, t: Tensor) -> Tensor:
    return _for_mode(WeightedGradient).apply(weight, t)


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    return _for_mode(GradientOf).apply(value.detach(), surrogate)


def weighted_once_more(z: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    return WeightedOnceMore.apply(z, log_weights)


def term_sum(spec: TermSpec, operands: Operands) -> Tensor:
    if fast_path(operands, spec.reduction):
        return _scalar_term_sum(spec, *operands)
    return _function(TermSum, _plain_term_sum, _term_in_torch, operands)(spec, *operands)


def elbo(spec: TermSpec, beta: float, kl: Tensor, operands: Operands) -> Sequence[Tensor] | None:
    """(loss, log_likelihood, kl), reduced, by one operator; None where that is not possible."""
    if fast_path(operands, spec.reduction):
        return _scalar_elbo(spec, beta, kl, *operands)
    if spec.reduction == NONE or torch.compiler.is_compiling() or _transformed() or _wants_grad((kl, *operands)):
        return None
    no_gradients = (False,) * len(operands)
    return _ops.elbo_with_gradients(*_term_arguments(spec, operands), kl, beta, no_gradients)[:3]


def importance_bound(log_weights: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or _transformed():
        return _importance_in_torch(log_weights)
    if _wants_grad((log_weights,)):
        return _importance_bound(log_weights)
    return _ops.importance_bound(log_weights.contiguous(), False)[0]


def latent(spec: LatentSpec, seed: Tensor | None, noise: Tensor | None, inputs: Operands):
    return _function(Latent, _plain_latent, _latent_in_torch, (noise, *inputs))(spec, seed, noise, *inputs)


def _function(general: type[Function], plain: Callable, in_torch: Callable, operands: Operands) -> Callable:
    """The cheapest way to a forward pass that serves the caller's mode of differentiation."""
    compiling = torch.compiler.is_compiling()
    if _transformed():
        # torch.func inside of a compiled function, and forward mode over forward mode, go past a Function's rules
        # (the latter with a derivative of zero), so that they get the formula itself.
        return in_torch if compiling or _forward_levels() > 1 else _EAGER[general].apply
    if not _wants_grad(operands):
        return general.forward
    return general.apply if compiling else plain


def _forward_levels() -> int:
    """How many torch.func.jvp (or jacfwd) are nested around the call."""
    functorch = torch._C._functorch
    return sum(level.key() == functorch.TransformType.Jvp for level in functorch.get_interpreter_stack() or ())
