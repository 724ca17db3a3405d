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

How far a bound is from ln p(x) is a question for :mod:`elbo_ext.diagnostics`. tests/README.md has a table of equations,
functions and the tests that hold them. ``python -m elbo_ext.demo bound`` measures the statements below on a linear
Gaussian model and on a VAE of digits, and draws one figure per statement.

**Which estimator.** An estimator takes ln p(x|z) as a function of the samples, so that the decoder may be any torch code.
All have the same arguments and differ in what they leave to chance:

>>> import torch, elbo_ext
>>> from elbo_ext import bounds, diagnostics
>>> x, mu, logvar = torch.rand(128, 784), torch.zeros(128, 20, requires_grad=True), torch.zeros(128, 20)
>>> decoder = torch.nn.Linear(20, 784)
>>> def log_likelihood(z):  # [K, 128, 20] -> [K, 128]
...     return elbo_ext.bernoulli_log_prob(x, decoder(z), batch_dims=2)
>>> bound = bounds.dreg(log_likelihood, mu, logvar, num_samples=8, reduction="mean")
>>> (-bound).backward()
>>> mu.grad.shape
torch.Size([128, 20])

With one sample in training :func:`elbo_ext.elbo_loss` (which is ``sgvb_b``) is the usual choice.
``sticking_the_landing`` lets q come to rest at the posterior, where its gradient vanishes with every draw. To tighten
the bound with K samples take ``dreg``: the gradient of ``iwae`` by the parameters of q drowns in noise as K grows.
``score_function`` is for decoders that have no derivative by z.

**A model that knows its evidence** is the test of all of them:

>>> model = bounds.LinearGaussian(torch.randn(10, 2), std=0.5)  # p(z) = N(0, I), p(x|z) = N(W z + b, 0.25 I)
>>> data = model.decode(torch.randn(100, 2)) + 0.5 * torch.randn(100, 10)
>>> mean, covariance = model.posterior(data)
>>> torch.testing.assert_close(model.elbo(data, mean, covariance=covariance), model.log_evidence(data))
>>> best_mu, best_logvar = model.best_diagonal(data)  # the best that an encoder with diagonal q can do
>>> bool((model.gap(data, best_mu, best_logvar) >= 0).all())
True
>>> wider = best_logvar + 0.5  # so that no weight is very large
>>> def log_weights(count):
...     z = elbo_ext.rsample(best_mu, wider, num_samples=count)
...     return model.log_joint(data, z) - elbo_ext.gaussian_log_prob(z, best_mu, wider, batch_dims=2)
>>> estimate = diagnostics.log_evidence(log_weights(100) for _ in range(10))  # 1,000 samples, 100 at a time in memory
>>> bool(((estimate.value - model.log_evidence(data)).abs() < 6 * estimate.standard_error).all())
True
>>> report = diagnostics.collapse_report(best_mu, best_logvar)

**A bound on ln p(x), not on p(x).** The mean of the weights w is exactly p(x); nothing is lost there. The loss is in
the logarithm: by Jensen's inequality E[ln w] <= ln E[w], with equality only if w does not vary. So exp(ELBO) bounds
p(x) from below as well, but it is no estimate of it, an average of bounds over data is one of log-likelihoods, and K
samples help only if the mean is taken before the logarithm: that is ``iwae_bound``.

**Why KL(q || p) and not the reverse.** The gap is KL(q(z|x) || p(z|x)), an expectation over q, from which one can
sample; p(z|x) enters through ln p(x, z) alone, as ln p(x) does not depend on q. The reverse would need samples of the
posterior. The price is the kind of fit: where p(z|x) is small q has to be small, so that it takes one mode of two and
is narrower than a correlated posterior. The reverse KL would cover everything and be too wide.

**Free energy and loss are one object.** -ln p(x, z) is the energy of a state z, q a trial distribution:
``free_energy``, mean energy minus entropy, is the ``loss`` of ``elbo_loss`` at ``beta=1``. That it is never below -ln
p(x), and equal only for the Boltzmann distribution p(z|x), is Gibbs' inequality and Jensen's at once. Reconstruction
minus KL is the same sum, with the energy's -ln p(z) on the side of the entropy.

**What the gap tells.** ``diagnostics.elbo_gap`` says how far q is from the posterior of this model, in nats. The part
of it that ``amortization_gap`` finds is what a better encoder would win; the rest takes a richer q. It does not compare
models: a decoder that ignores z has the prior for its posterior, and a gap of zero once q is the prior. Nor is a better
bound a better representation: with the same ln p(x), z may carry everything about x or nothing. ``collapse_report`` and
``aggregate_posterior`` look at that.
"""

from typing import Any

from torch import Tensor

from ..dispatch import public
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


@public
def free_energy(
    recon: Tensor, x: Tensor, mu: Tensor | None = None, logvar: Any = None, *, reduction: str = "mean", **options: Any
) -> Tensor:
    """Variational free energy F = E_q[-ln p(x, z)] - H[q], which is -ELBO, at temperature 1.

    In the words of physics: the energy of a state z is -ln p(x, z), q is a trial distribution, F = <energy> - entropy,
    and by Gibbs' inequality F >= -ln p(x), the equilibrium free energy, which is reached by p(z|x) alone (Neal & Hinton
    1998, "A View of the EM Algorithm"). It is the ``loss`` of :func:`elbo_ext.elbo_loss` at beta = 1, with the same
    variance: the energy of x given z comes from the samples that ``recon`` is of, the rest, which is the KL, is analytic.

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
