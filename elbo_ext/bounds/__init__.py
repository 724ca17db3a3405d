"""Lower bounds of ln p(x): estimators from samples, controls of the KL, and a model whose bound is known exactly.

x is observed and z latent; q(z|x) is the variational posterior, p(x, z) = p(x|z) p(z) the model. For every q

    ln p(x) = ELBO(x) + KL(q(z|x) || p(z|x)),    ELBO(x) = E_q[ln w],    w = p(x, z) / q(z|x)

so that the ELBO is a lower bound, tight exactly if q is the posterior. Samples z_1 ... z_K of q are on axis 0. Everything
is in nats.

- estimators of the bound and of its gradient (estimators.py), from a function ln p(x|z) and a Gaussian q:
  :func:`sgvb_a`, :func:`sgvb_b`, :func:`sticking_the_landing`, :func:`iwae`, :func:`dreg`, :func:`score_function`;
- what they are made of: :func:`elbo_ext.rsample_with_log_prob`, and :func:`iwae_bound` of any log-weights ln w;
- the ELBO as physics has it: :func:`free_energy`;
- controls of the KL in training (kl_controls.py): :func:`free_bits`, :func:`capacity`, :func:`balanced_kl`, schedules;
- the exact bound of a linear Gaussian model (linear_gaussian.py): :class:`LinearGaussian`.

How far a bound is from ln p(x) is a question for :mod:`elbo_ext.diagnostics`.
"""

from typing import Any

from torch import Tensor

from ..functional import elbo_loss, rsample_with_log_prob
from .estimators import dreg, iwae, iwae_bound, score_function, sgvb_a, sgvb_b, sticking_the_landing
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

__all__ = [
    "CosineSchedule",
    "CyclicalSchedule",
    "LinearGaussian",
    "LinearSchedule",
    "LogisticSchedule",
    "balanced_kl",
    "capacity",
    "dreg",
    "free_bits",
    "free_energy",
    "iwae",
    "iwae_bound",
    "rsample_with_log_prob",
    "score_function",
    "sgvb_a",
    "sgvb_b",
    "sticking_the_landing",
]


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


# help() and pickles name what users import, not the file that it happens to lie in.
for _name in __all__:
    if globals()[_name].__module__.startswith(f"{__name__}."):
        globals()[_name].__module__ = __name__
