"""The importance-weighted bound."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .modes import wants_grad
from .torch_internals import apply_outside_torch_func, in_trace, in_transform, is_tracing

_ops = torch.ops.elbo_ext


def _in_torch(log_weights: Tensor) -> Tensor:
    # Where all weights are zero, so are all derivatives: torch's would be NaN.
    nothing = (log_weights == -math.inf).all(0)
    # ln K of a size that may be another when a traced program is called, or of a number.
    log_count = torch.ones_like(log_weights).sum(0).log() if is_tracing() else math.log(len(log_weights))
    bound = torch.where(nothing, 0.0, log_weights).logsumexp(0) - log_count
    return torch.where(nothing, -math.inf, bound)


def normalized_weights(log_weights: Tensor) -> Tensor:
    """w_k / sum_j w_j of ``[K, ...]``; 0 where all weights are zero."""
    nothing = (log_weights == -math.inf).all(0)
    return torch.where(nothing, 0.0, torch.where(nothing, 0.0, log_weights).softmax(0))


class ImportanceBoundGradInForward(Function):
    """``apply(log_weights)``: ln 1/K sum_k w_k of ``[K, ...]``. Its gradient, the normalized weights w_k / sum_j w_j, is
    made in the forward pass. In the other ways of differentiating (modes.py) the formula serves."""

    @staticmethod
    def forward(ctx: Any, log_weights: Tensor) -> Tensor:
        bound: Tensor
        bound, weights = _ops.importance_bound(log_weights.contiguous(), True)
        ctx.save_for_backward(log_weights, weights)
        return bound

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        log_weights, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # the weights as functions of the log-weights
            weights = normalized_weights(log_weights)
        gradient: Tensor = grad.unsqueeze(0) * weights
        return gradient


_grad_in_forward = apply_outside_torch_func(ImportanceBoundGradInForward)


def importance_bound(log_weights: Tensor) -> Tensor:
    bound: Tensor
    if torch.compiler.is_compiling() or in_transform() or in_trace():
        return _in_torch(log_weights)
    if wants_grad((log_weights,)):
        bound = _grad_in_forward(log_weights)
    else:
        bound = _ops.importance_bound(log_weights.contiguous(), False)[0]
    return bound
