"""The reduced ELBO by one operator, likelihood and KL together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops import NONE
from .derivatives import Operands, fill_missing_with_none
from .modes import any_float16, needed_gradients, take_gradients, wants_grad
from .term_sum import TermSpec, TermSumBackward
from .torch_internals import apply_outside_torch_func, in_trace, in_transform

_ops = torch.ops.elbo_ext


class ELBOGradInForward(Function):
    """``apply(spec, beta, kl, *operands)``: (loss, log_likelihood, kl), each reduced by spec.reduction.

    loss = beta * kl - log_likelihood, so that the operands' gradient is (grad of log_likelihood - grad of loss) times
    that of the log-likelihood, and the gradient of the KL is grad of kl + beta * grad of loss. In the other ways of
    differentiating (modes.py) the three are put together from a sum of terms.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: TermSpec, beta: float, kl: Tensor, *operands: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.spec, ctx.beta = spec, beta
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)
        loss, log_likelihood, reduced_kl, ctx.of_kl, *ctx.gradients = _ops.elbo_with_gradients(
            spec.term, operands, *spec[1:], kl, beta, ctx.needs_input_grad[3:]
        )
        if not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(reduced_kl)
        return loss, log_likelihood, reduced_kl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_log_likelihood: Tensor | None, grad_kl: Tensor | None) -> Any:
        needs, operands = ctx.needs_input_grad[3:], ctx.saved_tensors
        if grad_loss is not None or grad_log_likelihood is not None:
            made = take_gradients(ctx, grad_loss, grad_log_likelihood, grad_kl)
            if made is not None:
                of_kl = _ops.elbo_backward(made, ctx.of_kl, grad_loss, grad_log_likelihood, grad_kl, ctx.beta)
                return None, None, of_kl, *fill_missing_with_none(made, needs)
        of_kl = None
        upstream = _sum_of(grad_kl, None if grad_loss is None else grad_loss * ctx.beta)
        if upstream is not None and ctx.needs_input_grad[2]:
            of_kl = ctx.of_kl * upstream
        upstream = _sum_of(grad_log_likelihood, None if grad_loss is None else -grad_loss)
        if upstream is None or not any(needs):
            return None, None, of_kl, *(None for _ in needs)
        gradients = needed_gradients(TermSumBackward, ctx.spec, needs, upstream, *operands)
        return None, None, of_kl, *fill_missing_with_none(gradients, needs)


def _sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


_grad_in_forward = apply_outside_torch_func(ELBOGradInForward)


def elbo(spec: TermSpec, beta: float, kl: Tensor, operands: Operands) -> Sequence[Tensor] | None:
    """(loss, log_likelihood, kl), reduced, by one operator; None where that is not possible."""
    results: Sequence[Tensor]
    if spec.over_classes or spec.reduction == NONE or torch.compiler.is_compiling() or in_transform() or in_trace():
        return None
    if wants_grad(operands) and not any_float16(operands):
        results = _grad_in_forward(spec, beta, kl, *operands)
        return results
    if wants_grad((kl, *operands)):
        return None
    no_gradients = (False,) * len(operands)
    results = _ops.elbo_with_gradients(spec.term, operands, *spec[1:], kl, beta, no_gradients)[:3]
    return results
