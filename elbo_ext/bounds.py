"""Lower bounds of ln p(x): estimators from samples, controls of the KL, and a model whose bound is known exactly.

x is observed and z latent; q(z|x) is the variational posterior, p(x, z) = p(x|z) p(z) the model. For every q

    ln p(x) = ELBO(x) + KL(q(z|x) || p(z|x)),    ELBO(x) = E_q[ln w],    w = p(x, z) / q(z|x)

so that the ELBO is a lower bound, tight exactly if q is the posterior. Estimators take log-weights ln w of K samples
z_1 ... z_K of q, on axis 0 unless told otherwise. Everything is in nats.

- from log-weights: :func:`iwae_bound`;
- the ELBO as physics has it: :func:`free_energy`;
- controls of the KL in training (kl_controls.py): :func:`free_bits`, :func:`capacity`, :func:`balanced_kl`, schedules;
- the exact bound of a linear Gaussian model (linear_gaussian.py): :class:`LinearGaussian`.

How far a bound is from ln p(x) is a question for :mod:`elbo_ext.diagnostics`.
"""

import math
from typing import Any

from torch import Tensor

from . import arguments
from .functional import elbo_loss
from .kl_controls import (
    CosineSchedule,
    CyclicalSchedule,
    LinearSchedule,
    LogisticSchedule,
    balanced_kl,
    capacity,
    free_bits,
)
from .linear_gaussian import LinearGaussian
from .ops import REDUCTIONS, value_dtype

__all__ = [
    "CosineSchedule",
    "CyclicalSchedule",
    "LinearGaussian",
    "LinearSchedule",
    "LogisticSchedule",
    "balanced_kl",
    "capacity",
    "free_bits",
    "free_energy",
    "iwae_bound",
]


def iwae_bound(log_weights: Tensor, *, dim: int = 0, reduction: str = "none") -> Tensor:
    """Importance-weighted bound, L_K = ln 1/K sum_k w_k, from log-weights ln w_k = ln p(x, z_k) - ln q(z_k|x).

    Burda, Grosse & Salakhutdinov 2016 ("Importance Weighted Autoencoders"), equation 8. ELBO = E[L_1] <= E[L_K] <=
    E[L_K+1] <= ln p(x): the bias is about -Var[w] / (2 K p(x)^2) (Nowozin 2018, "Debiasing Evidence Approximations").
    The trade-off: with K the bound gets tighter and its value less noisy, but the signal-to-noise ratio of its gradient
    by the parameters of q falls as 1 / sqrt(K), while that by the model's parameters rises as sqrt(K) (Rainforth et al.
    2018, "Tighter Variational Bounds are Not Necessarily Better").

    Args:
        log_weights: ln w ``[K, *batch]``, or with the K samples on another axis; K >= 1.
        dim: the axis of the samples.
        reduction: over the batch: "none", "sum" or "mean".

    Returns:
        The bound in nats, ``[*batch]`` or a scalar; float64 if the weights are, else float32. Samples of weight zero
        (-inf) count among the K; -inf if all are. There the gradient, which is the normalized weights, is 0/0 = NaN.

    Raises:
        ValueError, TypeError: if log_weights is no floating-point tensor, dim is none of its axes or has no samples, or
            the reduction does not exist.
    """
    arguments.samples("log_weights", log_weights, dim)
    number = arguments.reduction(reduction)
    bound = log_weights.to(value_dtype(log_weights)).logsumexp(dim) - math.log(log_weights.shape[dim])
    return _reduce(bound, number)


def free_energy(
    recon: Tensor, x: Tensor, mu: Tensor | None = None, logvar: Any = None, *, reduction: str = "mean", **options: Any
) -> Tensor:
    """Variational free energy F = E_q[-ln p(x, z)] - H[q], which is -ELBO, at temperature 1.

    In the words of physics: the energy of a state z is -ln p(x, z), q is a trial distribution, F = <energy> - entropy,
    and by Gibbs' inequality F >= -ln p(x), the equilibrium free energy, which is reached by p(z|x) alone (Neal & Hinton
    1998, "A View of the EM Algorithm"). It is the ``loss`` of :func:`elbo_ext.elbo_loss` at beta = 1, with the same
    variance: the energy of x given z comes from the samples behind ``recon``, the rest, which is the KL, is analytic.

    Args:
        recon, x, mu, logvar, reduction, options: as in :func:`elbo_ext.elbo_loss`, all but ``beta``.

    Returns:
        F in nats, the batch shape, or a scalar if reduced.

    Raises:
        ValueError, TypeError: as :func:`elbo_ext.elbo_loss`; ValueError for ``beta``, as a beta other than 1 is no free
            energy of this model.
    """
    if "beta" in options:
        raise ValueError(f"beta must not be given: the free energy has beta = 1, got {options['beta']}")
    return elbo_loss(recon, x, mu, logvar, reduction=reduction, **options).loss


def _reduce(examples: Tensor, reduction: int) -> Tensor:
    if reduction == REDUCTIONS["sum"]:
        return examples.sum()
    return examples.mean() if reduction == REDUCTIONS["mean"] else examples
