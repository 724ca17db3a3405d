"""The loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import arguments, autograd, likelihoods
from ..arguments import PRIOR_SCALES, RECON_SCALES, SCALES
from ..autograd import TermSpec
from ..dispatch import overridden_by_arguments, public
from ..likelihoods import GAUSSIAN_KL, Likelihood, LikelihoodWithParameters
from ..ops import NONE, REDUCTIONS, as_tensor, value_dtype
from ..reference import ELBO
from . import categorical, densities
from .operands import Forms, Scale, named_inputs, no_use_beside, posterior_and_prior, sum_of_term, term_call

__all__ = [
    "elbo_loss",
]

_POSTERIOR_AND_PRIOR = (*SCALES, "prior_mu", *PRIOR_SCALES)


@public
def elbo_loss(
    recon: Tensor | None = None,
    x: Tensor | None = None,
    mu: Tensor | None = None,
    logvar: Scale = None,
    *,
    kl: Tensor | float | None = None,
    log_likelihood: Tensor | None = None,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    rho: Scale = None,
    min_std: float | None = None,
    min_var: float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Scale = None,
    prior_log_std: Scale = None,
    prior_std: Scale = None,
    prior_var: Scale = None,
    prior_rho: Scale = None,
    prior_min_std: float | None = None,
    prior_min_var: float | None = None,
    likelihood: str | Likelihood | LikelihoodWithParameters = "gaussian",
    recon_logvar: Scale = None,
    recon_log_std: Scale = None,
    recon_std: Scale = None,
    recon_var: Scale = None,
    recon_rho: Scale = None,
    recon_min_std: float | None = None,
    recon_min_var: float | None = None,
    beta: Tensor | float = 1.0,
    weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "mean",
) -> ELBO:
    """Minus the evidence lower bound: loss = -(log_likelihood - beta * kl).

    ELBO(x) = E_q(z|x)[ln p(x|z)] - KL(q(z|x) || p(z)) <= ln p(x) (Kingma & Welling 2014, equation 3); beta other than 1
    as in Higgins et al. 2017 ("beta-VAE"). The expectation is over the samples of z that recon was decoded from. On the
    first backward pass after a reduced result, the gradients are ready: the forward pass made them.

    Args:
        recon: the decoder's output: the mean, the logits of a Bernoulli, the logarithm of a Poisson's rate; or what an object
            says it is, ``likelihoods.NegativeBinomial(theta=theta, recon="logits")``. With K samples it has a leading axis K
            that x lacks, which counts among ``batch_dims`` (K samples of B examples: ``batch_dims=2``).
        x: data; broadcasts to recon without a copy.
        mu, logvar: of the posterior, whose KL to the prior is computed (:func:`gaussian_kl`); or
        kl: the KL of each example, as :func:`rsample_kl` returns it. Broadcasts to the batch shape; or a number, 0.0 for none.
        log_likelihood: ln p(x|z) of each example, ``[*batch]``, computed by the caller, in place of recon and x;
            ``batch_dims`` are then those of mu.
        likelihood: the name of a function without ``_log_prob``; or an object of :mod:`elbo_ext.likelihoods` with the
            parameters that the decoder does not give, ``likelihoods.DiscretizedLogistic(log_scale=-2.0, low=0.0, high=1.0)``.
        recon_logvar: scale of a Gaussian likelihood, discretized or not, ln sigma^2 = 0 by default; or ``recon_log_std=``,
            ``recon_std=``, ``recon_var=``, ``recon_rho=``, with ``recon_min_std=`` or ``recon_min_var=``.
        beta: factor of the KL, a finite number or a tensor that broadcasts to the batch shape.
        weight: multiplies each element's log-likelihood.
        kl_weight: multiplies the KL of each element of mu: the ``weight`` of :func:`gaussian_kl`.
        batch_dims, reduction: see :mod:`elbo_ext.functional`.

    Returns:
        ``ELBO(loss, log_likelihood, kl)`` in nats, each of the batch shape, or scalars if reduced; kl is without beta.

    Raises:
        ValueError, TypeError: see :mod:`elbo_ext.functional`; also for an unknown likelihood, a scale with another likelihood
            than those two, if recon and x repeat against each other, and if neither or both of kl and mu are given.
    """
    spec: TermSpec | None = None
    operands: tuple[Tensor | None, ...]
    named: dict[str, Any]
    recon_scales = dict(
        zip(
            RECON_SCALES,
            (recon_logvar, recon_log_std, recon_std, recon_var, recon_rho, recon_min_std, recon_min_var),
            strict=True,
        )
    )
    given = log_likelihood
    if log_likelihood is None and likelihoods.by_name(likelihood).likelihood.over_classes:
        log_likelihood, sample_axes = _over_classes(likelihood, recon, x, recon_scales, weight, batch_dims)
        assert recon is not None  # _over_classes has refused it
        first = {"recon": recon}
        operands, batch, named = (log_likelihood,), log_likelihood.shape, {}
    elif log_likelihood is None:
        named, forms, term = _recon_and_x(likelihood, recon, x, recon_scales)
        spec, operands, shape = term_call(term, named, forms, weight, batch_dims, reduction)
        assert recon is not None and x is not None  # _recon_and_x has refused them
        batch, sample_axes, first = shape[: spec.batch_dims], max(len(shape) - x.dim(), 0), {"recon": recon}
    else:
        is_default = isinstance(likelihood, str) and likelihood == "gaussian"
        given_likelihood = None if is_default else likelihood
        others = {"recon": recon, "x": x, "likelihood": given_likelihood, **recon_scales, "weight": weight}
        no_use_beside("log_likelihood", others)
        sample_axes, first = 0, {"log_likelihood": arguments.tensor("log_likelihood", log_likelihood)}
        operands, batch, named = (log_likelihood,), log_likelihood.shape, {}

    of_batch = named if weight is None else {**named, "weight": weight}
    if (kl is None) == (mu is None):
        raise ValueError(f"exactly one of kl and mu must be given, got {'neither' if kl is None else 'both'}")
    scales, prior_scales = (
        (logvar, log_std, std, var, rho, min_std, min_var),
        (prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var),
    )
    if kl is None:
        of_kl, forms_of_kl = posterior_and_prior(mu, scales, prior_mu, prior_scales)
        shape = arguments.broadcast(of_kl)  # a posterior at odds with itself comes before one at odds with recon
        assert mu is not None  # posterior_and_prior has refused it
        kl_weight = arguments.kl_weight(kl_weight, mu, shape)
        arguments.on_one_device(first, of_kl)
        if spec is not None:
            assert x is not None and mu is not None  # _recon_and_x and posterior_and_prior have refused them
            _check_batch(spec.batch_dims, sample_axes, x, mu, batch)
            batch_dims = spec.batch_dims - sample_axes
        elif given is None:
            batch_dims -= sample_axes
        kl = sum_of_term(GAUSSIAN_KL, of_kl, forms_of_kl, kl_weight, batch_dims, "none")
        arguments.broadcasts_to_batch(
            "the KL of mu and its scale has shape {}, which", kl, batch, operands={**named, "weight": weight}
        )
    else:
        kl = arguments.tensor_or_number("kl", kl)
        if not isinstance(kl, Tensor):
            (like,) = first.values()
            kl = as_tensor(kl, value_dtype(*operands), like.device)
        if spec is None and (type(batch_dims) is not int or batch_dims != 1):  # all dimensions are of the batch
            arguments.batch_dims(batch_dims, batch)
        unused = (*scales, prior_mu, *prior_scales, kl_weight)
        if any(value is not None for value in unused):
            no_use_beside("kl", dict(zip((*_POSTERIOR_AND_PRIOR, "kl_weight"), unused, strict=True)))
        arguments.broadcasts_to_batch("kl of shape {}", kl, batch, operands=of_batch)
    beta = arguments.beta(beta)
    arguments.on_one_device(first, {"kl": kl, "beta": beta})
    arguments.broadcasts_to_batch("beta of shape {}", beta, batch)

    dtype = value_dtype(*operands, kl, beta if isinstance(beta, Tensor) else None)
    if spec is not None:
        if isinstance(likelihood, LikelihoodWithParameters) and overridden_by_arguments(operands):
            # A parameter inside of the object, which is an argument of the log-likelihood's function alone.
            log_prob = getattr(densities, f"{term.name}_log_prob")
            of_object = {likelihood.recon: recon, **likelihood.parameters}
            log_likelihood = log_prob(x, **of_object, weight=weight, batch_dims=spec.batch_dims)
        elif isinstance(beta, float) and dtype is value_dtype(*operands):
            reduced = autograd.elbo(spec, beta, kl, operands)
            if reduced is not None:
                return ELBO(*reduced)
        if log_likelihood is None:
            log_likelihood = autograd.term_sum(spec._replace(reduction=NONE), operands)
    assert log_likelihood is not None  # given, where there is no spec
    log_likelihood, kl = log_likelihood.to(dtype), kl.to(dtype).expand(batch)
    loss = beta * kl - log_likelihood
    number = arguments.reduction(reduction)
    # Each ELBO by its class and not by _replace, whose result Dynamo of torch 2.11 cannot return from a graph.
    if number == NONE:  # copies of what the caller has, so that a change in place of one does not reach the other
        return ELBO(loss, log_likelihood.clone() if spec is None else log_likelihood, kl.clone())
    parts = (loss, log_likelihood, kl)
    return ELBO(*(part.sum() if number == REDUCTIONS["sum"] else part.mean() for part in parts))


def _over_classes(
    likelihood: Any, recon: Any, x: Any, recon_scales: Mapping[str, Any], weight: Any, batch_dims: Any
) -> tuple[Tensor, int]:
    """The log-likelihood of each example, of a likelihood over a dimension, and how many axes recon has that x lacks."""
    chosen = likelihoods.by_name(likelihood)
    arguments.recon_scales(chosen, recon_scales)
    arguments.data_tensor("x", x)
    arguments.tensor("recon", recon)
    log_prob = getattr(categorical, f"{chosen.likelihood.name}_log_prob")
    of_object = {chosen.recon: recon, **chosen.parameters}
    value = log_prob(x, **of_object, weight=weight, batch_dims=batch_dims)
    has_classes = chosen.likelihood is not likelihoods.Categorical
    sample_axes = max(recon.dim() - 1 - (x.dim() - has_classes), 0)
    if batch_dims < sample_axes:
        raise _too_few_batch_dims(sample_axes, batch_dims)
    return value, sample_axes


def _too_few_batch_dims(sample_axes: int, batch_dims: int) -> ValueError:
    return ValueError(
        f"batch_dims must be at least {sample_axes}, the number of axes of samples that recon has beyond x, "
        f"got {batch_dims}"
    )


def _recon_and_x(
    likelihood: Any, recon: Any, x: Any, recon_scales: Mapping[str, Any]
) -> tuple[dict[str, Any], Forms, Likelihood]:
    """The inputs of a likelihood by name, their forms, and the likelihood."""
    chosen = likelihoods.by_name(likelihood)
    term = chosen.likelihood
    scales = arguments.recon_scales(chosen, recon_scales)
    arguments.data_tensor("x", x)
    arguments.tensor("recon", recon)
    arguments.at_most_one_broadcasts(recon, x)
    shown = {chosen.recon: "recon"}
    if not chosen.parameters:
        shown |= {name.removeprefix("recon_"): name for name in recon_scales}
    named, forms = named_inputs(term, {"x": x, chosen.recon: recon, **scales, **chosen.parameters}, shown)
    return named, forms, term


def _check_batch(batch_dims: int, sample_axes: int, x: Tensor, mu: Tensor, batch: torch.Size) -> None:
    """That mu's examples are those of recon, without its axes of samples."""
    if batch_dims < sample_axes:
        raise _too_few_batch_dims(sample_axes, batch_dims)
    if sample_axes == batch_dims > 0 and arguments.same_shape(mu.shape[:sample_axes], batch):
        raise ValueError(
            f"x of shape {tuple(x.shape)} has no batch dimension, so that those of mu, of shape {tuple(mu.shape)}, "
            "are taken for latent ones; expand x to the batch, or pass kl"
        )
