"""The functions over a dimension of classes, in plain Python."""

import math

import torch
from torch import Tensor

from .noise import gumbel_noise

__all__ = ["categorical_kl", "categorical_log_prob", "categorical_rsample_kl", "multinomial_log_prob"]


def _reduced(rows: Tensor, weight: Tensor | None, batch_dims: int, reduction: str) -> Tensor:
    """Rows that are left out by a weight of 0 add nothing."""
    if weight is not None:
        weight = weight.to(rows)
        rows = torch.where((weight == 0) & ~rows.isfinite(), 0.0, rows) * weight
    examples = rows.flatten(batch_dims).sum(-1) if rows.dim() > batch_dims else rows
    return examples if reduction == "none" else examples.sum() if reduction == "sum" else examples.mean()


def _log_probabilities(logits: Tensor, dim: int, unimix: float = 0.0) -> Tensor:
    """ln p, p = (1 - unimix) softmax + unimix / C, with the classes last."""
    logits = logits.movedim(dim, -1)
    log_s = logits - logits.logsumexp(-1, keepdim=True)
    return log_s if unimix == 0 else ((1 - unimix) * log_s.exp() + unimix / logits.shape[-1]).log()


def categorical_log_prob(
    x: Tensor,
    logits: Tensor,
    *,
    dim: int = -1,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """logits_x - ln sum_c e^logits_c."""
    log_p = _log_probabilities(logits, dim)
    shape = torch.broadcast_shapes(x.shape, log_p.shape[:-1])
    x = x.long().expand(shape)
    inside = (x >= 0) & (x < log_p.shape[-1])
    one_hot = torch.nn.functional.one_hot(torch.where(inside, x, 0), log_p.shape[-1]).bool()
    rows = torch.where(one_hot, log_p, 0.0).sum(-1)
    rows = torch.where(x == ignore_index, 0.0, torch.where(inside, rows, -math.inf))
    return _reduced(rows, weight, batch_dims, reduction)


def multinomial_log_prob(
    x: Tensor,
    logits: Tensor,
    *,
    dim: int = -1,
    coefficient: bool = False,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """sum_c x_c ln softmax(logits)_c, and with the coefficient ln (sum_c x_c)! - sum_c ln x_c!."""
    dim = dim if dim < 0 else dim - logits.dim()
    log_p = _log_probabilities(logits, dim)
    counts = x.movedim(dim, -1).to(log_p)
    rows = (counts * torch.where((counts == 0) & log_p.isinf(), 0.0, log_p)).sum(-1)
    if coefficient:
        rows = rows + torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)
    return _reduced(rows, weight, batch_dims, reduction)


def categorical_kl(
    logits: Tensor,
    prior_logits: Tensor | None = None,
    *,
    dim: int = -1,
    unimix: float = 0.0,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """sum_c p_c (ln p_c - ln q_c), of the uniform distribution by default."""
    dim = dim if dim < 0 else dim - logits.dim()
    log_p = _log_probabilities(logits, dim, unimix)
    if prior_logits is None:
        log_q = torch.full_like(log_p, -math.log(log_p.shape[-1]))
    else:
        log_q = _log_probabilities(prior_logits, dim, unimix)
    log_p, log_q = torch.broadcast_tensors(log_p, log_q)
    possible = log_p > -math.inf
    ratio = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    return _reduced((log_p.exp() * ratio).sum(-1), weight, batch_dims, reduction)


def categorical_rsample_kl(
    logits: Tensor,
    prior_logits: Tensor | None = None,
    *,
    dim: int = -1,
    unimix: float = 0.0,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """One-hot z of the largest ln p_c + g_c, with the gradient of p, and the KL. Noise counts with the classes last."""
    kl = categorical_kl(logits, prior_logits, dim=dim, unimix=unimix, batch_dims=batch_dims, reduction=reduction)
    log_p = _log_probabilities(logits, dim if dim < 0 else dim - logits.dim(), unimix)
    if prior_logits is not None:
        log_p = log_p.expand(torch.broadcast_shapes(logits.movedim(dim, -1).shape, prior_logits.movedim(dim, -1).shape))
    shape = log_p.shape if num_samples is None else (num_samples, *log_p.shape)
    back = dim if dim < 0 or num_samples is None else dim + 1
    if noise is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator))
        g = torch.from_numpy(gumbel_noise(seed, math.prod(shape))).reshape(shape).to(log_p)
    else:
        g = noise.movedim(back, -1).to(log_p)
    drawn = (log_p.detach() + g).argmax(-1)
    z = torch.nn.functional.one_hot(drawn, log_p.shape[-1]).to(log_p) + (log_p.exp() - log_p.exp().detach())
    return z.movedim(-1, back), kl
