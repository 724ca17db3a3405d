"""The public functions. They check their arguments, draw the seed, and call the kernels through autograd.

Conventions, the same in every function:

**Scales.** The scale of a Gaussian is passed as ``logvar`` = ln sigma^2, or by exactly one of the keywords
``log_std``, ``std``, ``var`` in its place (``prior_...`` for the prior, ``recon_...`` for the likelihood). It is a
tensor that broadcasts to the mean (one number, one per channel, one per element) or a Python number. The values of a
tensor are not looked at, which would have to wait for its device: where ``std`` or ``var`` is not above zero, NaN or
numbers without a meaning come.

**Shapes.** Operands broadcast to a joint shape. Its ``batch_dims`` leading dimensions index examples, the others are
summed; ``batch_dims`` = number of dimensions means no sum: one value per element.

**Reduction.** Over the examples: "none" gives one value per example; "sum" adds them; "mean" = sum / number of
examples, never over elements.

**Weight.** ``weight`` (weights, or a boolean mask) broadcasts to the joint shape and multiplies each element's term. An
element of weight zero is left out, whatever stands there.

**Dtypes.** float32, float64, bfloat16 and float16, also mixed, without a cast copy. Half precision is computed and
accumulated in float32. Values are float64 if any operand is, else float32 (as in torch, one without
dimensions does not promote those that have some); gradients have their operand's dtype.

**Errors.** TypeError for what is no floating-point tensor (or number, where one may stand), ValueError for shapes that
do not broadcast, tensors on different devices, no or several scales, a ``batch_dims`` or ``reduction`` that does not
exist. The message names the argument, what came and what was expected.

All values are natural logarithms (nats).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, autograd, likelihoods
from .arguments import PRIOR_SCALES, RECON_SCALES, SCALES
from .autograd import LatentSpec, TermSpec
from .likelihoods import GAUSSIAN_KL, Likelihood, LikelihoodWithParameters, Term
from .ops import NONE, REDUCTIONS, WITH_KL, WITH_LOG_PROB, Z_ALONE, draw_seed, value_dtype
from .reference import ELBO

__all__ = [
    "ELBO",
    "bernoulli_log_prob",
    "elbo_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "laplace_log_prob",
    "rsample",
    "rsample_kl",
    "rsample_with_log_prob",
]

Scale = Tensor | float | None

_UNIT_SCALE = (0.0, 0.0, 1.0, 1.0)  # sigma = 1 in each form, in the order of SCALES
_POSTERIOR_AND_PRIOR = (*SCALES, "prior_mu", *PRIOR_SCALES)


def _operands(values: Iterable[Any]) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """Tensors, with None where a number stands, and the numbers, with 0 where a tensor stands."""
    tensors: list[Tensor | None] = []
    constants: list[float] = []
    eager = not torch.compiler.is_compiling()
    for value in values:
        is_tensor = isinstance(value, Tensor)
        # Dynamo refuses a Function that is given one tensor twice, a scale that posterior and prior share, say.
        if not eager and is_tensor and any(value is other for other in tensors):
            value = value.view_as(value)
        # A view such as z.conj().imag keeps its minus sign beside the memory; in a list of operands torch leaves it there.
        if is_tensor and eager and value.is_neg():
            value = value.resolve_neg()
        tensors.append(value if is_tensor else None)
        constants.append(0.0 if is_tensor else value)
    return tuple(tensors), tuple(constants)


def _posterior_and_prior(
    mu: Any, scales: Sequence[Scale], prior_mu: Any, prior_scales: Sequence[Scale]
) -> tuple[dict[str, Any], int]:
    """The operands of a KL by name, and their forms. The prior is N(0, 1), in the posterior's own form, where nothing else
    is given."""
    name, scale, form = arguments.scale(SCALES, scales)
    named = {"mu": arguments.tensor("mu", mu), name: scale}
    named["prior_mu"] = 0.0 if prior_mu is None else arguments.tensor_or_number("prior_mu", prior_mu)
    for given in prior_scales:
        if given is not None:
            name, scale, prior_form = arguments.scale(PRIOR_SCALES, prior_scales)
            named[name] = scale
            return named, GAUSSIAN_KL.pack((0, form, 0, prior_form))
    named["prior_scale"] = _UNIT_SCALE[form]
    return named, GAUSSIAN_KL.pack((0, form, 0, form))


def rsample(
    mu: Tensor,
    logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Reparameterized Gaussian sample, z = mu + sigma * eps, eps ~ N(0, I).

    Kingma & Welling 2014 ("Auto-Encoding Variational Bayes"), section 2.4. Gradients: dz/dmu = 1, dz/dsigma = eps.
    The noise is Philox4x32-10 and Box-Muller, made in registers from one drawn seed and made again in the backward
    pass; element i of z in row-major order gets normal number i of the seed's stream, on every device, with any number
    of threads and for any memory layout.

    Args:
        mu: mean, any shape.
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=`` in its place.
        num_samples: K adds a leading axis of K samples; None adds no axis.
        generator: where the seed is drawn from; by default torch's generator of mu's device.
        noise: eps itself, of z's shape, instead of a draw; any dtype, taken in the precision of mu and the scale.

    Returns:
        z of the joint shape S of mu and the scale, or ``[K, *S]``; its dtype is what the two promote to.

    Raises:
        ValueError, TypeError: see the module's conventions; also if noise has not z's shape or a generator comes with it.
    """
    name, scale, form = arguments.scale(SCALES, (logvar, log_std, std, var))
    named = {"mu": arguments.tensor("mu", mu), name: scale}
    shape = arguments.broadcast(named)
    inputs, constants = _operands(named.values())
    # The prior, which there is none of, is of the same form: kernels are compiled for pairs of forms.
    forms = GAUSSIAN_KL.pack((0, form, 0, form))
    spec = LatentSpec(constants, forms, arguments.num_samples(num_samples), Z_ALONE, len(shape), NONE)
    z: Tensor = autograd.latent(spec, *_seed_or_noise(mu, shape, spec, generator, noise), inputs)
    return z


def rsample_kl(
    mu: Tensor,
    logvar: Scale = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    prior_log_std: Scale = None,
    prior_std: Scale = None,
    prior_var: Scale = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """:func:`rsample` and :func:`gaussian_kl` in one pass over mu and the scale.

    Args:
        mu, logvar, num_samples, generator, noise: as in :func:`rsample`.
        prior_mu, prior_logvar, batch_dims, reduction: as in :func:`gaussian_kl`.

    Returns:
        ``(z, kl)``: z as from :func:`rsample`, with the joint shape of all four; kl as from :func:`gaussian_kl`, in nats.
        The KL is analytic, so it has no axis of samples.

    Raises:
        ValueError, TypeError: as the two functions.
    """
    scales, prior_scales = (logvar, log_std, std, var), (prior_logvar, prior_log_std, prior_std, prior_var)
    z, kl = _sample_beside_prior(
        WITH_KL, mu, scales, prior_mu, prior_scales, num_samples, generator, noise, batch_dims, reduction
    )
    return z, kl


def rsample_with_log_prob(
    mu: Tensor,
    logvar: Scale = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    prior_log_std: Scale = None,
    prior_std: Scale = None,
    prior_var: Scale = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    batch_dims: int = 1,
    gradient: str = "pathwise",
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample z of q = N(mu, diag sigma^2), ln q(z) and ln p(z) of the prior, N(0, I) by default, in one pass.

    z = mu + sigma * eps as in :func:`rsample`. ln q = sum -1/2 (eps^2 + ln sigma^2 + ln 2 pi) is computed from the noise, so
    that it is exact for any sigma, where (z - mu) / sigma has lost its digits to the rounding of z. ln p is that of z
    before z is rounded to its dtype.

    Args:
        mu, logvar, num_samples, generator, noise: as in :func:`rsample`.
        prior_mu, prior_logvar, batch_dims: as in :func:`gaussian_kl`.
        gradient: ln q depends on mu and sigma directly, and by way of z. What its gradient takes account of:

            - "pathwise": both, which leaves -1/2 d ln sigma^2 (Kingma & Welling 2014, section 2.4);
            - "sticking_the_landing": z alone. What is left out, the score, has mean zero (Roeder, Wu & Duvenaud 2017);
            - "score": the direct dependence alone, eps / sigma for mu and (eps^2 - 1) / 2 for ln sigma^2 (Williams
              1992). z is then a constant, also to ln p and to the caller.

            The last two leave something out of the first derivative, so that second ones are not those of ln q's mean.

    Returns:
        ``(z, log_q, log_p)``: z as from :func:`rsample`, of the joint shape of all four; log_q and log_p in nats, of the
        batch shape; float64 if any operand is, else float32. With K samples all have a leading axis K.

    Raises:
        ValueError, TypeError: see the module's conventions; ValueError for an unknown ``gradient``.
    """
    arguments.one_of("gradient", gradient, tuple(WITH_LOG_PROB))
    scales, prior_scales = (logvar, log_std, std, var), (prior_logvar, prior_log_std, prior_std, prior_var)
    z, log_q, log_p = _sample_beside_prior(
        WITH_LOG_PROB[gradient], mu, scales, prior_mu, prior_scales, num_samples, generator, noise, batch_dims, "none"
    )
    return z, log_q, log_p


def _sample_beside_prior(
    results: int,
    mu: Any,
    scales: Sequence[Scale],
    prior_mu: Any,
    prior_scales: Sequence[Scale],
    num_samples: Any,
    generator: Any,
    noise: Any,
    batch_dims: Any,
    reduction: Any,
) -> tuple[Tensor, ...]:
    """z and what else of ``results`` (ops.py) there is."""
    named, forms = _posterior_and_prior(mu, scales, prior_mu, prior_scales)
    shape = arguments.broadcast(named)
    inputs, constants = _operands(named.values())
    spec = LatentSpec(
        constants,
        forms,
        arguments.num_samples(num_samples),
        results,
        arguments.batch_dims(batch_dims, shape),
        arguments.reduction(reduction),
    )
    sampled: tuple[Tensor, ...] = autograd.latent(spec, *_seed_or_noise(mu, shape, spec, generator, noise), inputs)
    return sampled


def _seed_or_noise(
    mu: Tensor, shape: torch.Size, spec: LatentSpec, generator: torch.Generator | None, noise: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the latent operators take: a fresh seed, or the caller's noise."""
    arguments.generator(generator)
    if noise is None:
        if torch.compiler.is_compiling() and generator is None:
            return torch.ops.elbo_ext.draw_seed(mu), None
        return draw_seed(mu.device, generator), None
    if generator is not None:
        raise ValueError("noise and generator were both given; noise leaves nothing to draw")
    arguments.tensor("noise", noise)
    expected = shape if spec.num_samples is None else (spec.num_samples, *shape)
    if not arguments.same_shape(noise.shape, expected):
        raise ValueError(f"noise must have the shape of the sample, {tuple(expected)}, got {tuple(noise.shape)}")
    arguments.broadcast({"mu": mu, "noise": noise})  # for the device
    return None, noise


def gaussian_kl(
    mu: Tensor,
    logvar: Scale = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    prior_log_std: Scale = None,
    prior_std: Scale = None,
    prior_var: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """KL( N(mu, diag sigma^2) || N(prior_mu, diag prior_sigma^2) ), the prior N(0, I) by default.

    KL = sum 1/2 ((mu - prior_mu)^2 / prior_sigma^2 + r - 1 - ln r), r = sigma^2 / prior_sigma^2 (Kingma & Welling 2014,
    appendix B). Never negative, and right to full relative precision as r -> 1, where the textbook form loses all digits.

    Args:
        mu, logvar: of the posterior; or ``log_std=``, ``std=``, ``var=`` in place of ``logvar``.
        prior_mu, prior_logvar: of the prior; or ``prior_log_std=``, ``prior_std=``, ``prior_var=``.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The KL in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    named, forms = _posterior_and_prior(
        mu, (logvar, log_std, std, var), prior_mu, (prior_logvar, prior_log_std, prior_std, prior_var)
    )
    return _term_sum(GAUSSIAN_KL, named, forms, weight, batch_dims, reduction)


def gaussian_log_prob(
    x: Tensor,
    mean: Tensor | float,
    logvar: Scale = None,
    *,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln N(x; mean, diag sigma^2), the constant included; sigma = 1 if no scale is given.

    ln N = sum -1/2 ((x - mean)^2 / sigma^2 + ln sigma^2 + ln 2 pi) (Kingma & Welling 2014, appendix C.2). Finite for
    x = mean with any finite ln sigma^2.

    Args:
        x: data.
        mean: mean, a tensor or a number.
        logvar: ln sigma^2; or ``log_std=``, ``std=``, ``var=`` in its place.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    given = {"x": x, "mean": mean, "logvar": logvar, "log_std": log_std, "std": std, "var": var}
    return _log_prob(likelihoods.Gaussian, given, weight, batch_dims, reduction)


def bernoulli_log_prob(
    x: Tensor,
    logits: Tensor | float,
    *,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln Bernoulli(x; sigmoid(logits)) = x * logits - softplus(logits), for any x in [0, 1].

    Kingma & Welling 2014, appendix C.1; minus the binary cross-entropy. Right for logits of any size. The values of x
    are not checked.

    Args:
        x: data in [0, 1].
        logits: log-odds, a tensor or a number.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    return _log_prob(likelihoods.Bernoulli, {"x": x, "logits": logits}, weight, batch_dims, reduction)


def laplace_log_prob(
    x: Tensor,
    mean: Tensor | float,
    log_scale: Scale = None,
    *,
    scale: Scale = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln Laplace(x; mean, b), the constant included; b = 1 if no scale is given.

    ln p = sum -(|x - mean| / b + ln b + ln 2): absolute errors in place of a Gaussian's squares, so that single large
    errors count less (Laplace 1774; the L1 loss of image models with its scale). Where x = mean the gradient is 0.

    Args:
        x: data.
        mean: mean, a tensor or a number.
        log_scale: ln b; or ``scale=``, b itself, in its place.
        weight, batch_dims, reduction: see the module's conventions.

    Returns:
        The log-density in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the module's conventions.
    """
    given = {"x": x, "mean": mean, "log_scale": log_scale, "scale": scale}
    return _log_prob(likelihoods.Laplace, given, weight, batch_dims, reduction)


def _named_inputs(term: Term, given: Mapping[str, Any], shown: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """The inputs of a term, checked, by the names that errors call them; and their forms. ``given`` has a value or None for
    the forms of the inputs; ``shown`` their names where they differ."""
    named: dict[str, Any] = {}
    chosen = []
    for name, forms, positive in zip(term.inputs, term.forms_of_inputs, term.positive_of_inputs, strict=True):
        if len(forms) == 1 and name not in term.defaults:
            check = arguments.tensor if name == "x" else arguments.tensor_or_number
            label, form = shown.get(name, name), 0
            value = check(label, given[name])
        else:
            names = [shown.get(form, form) for form in forms] if shown else forms
            values = [given.get(form) for form in forms]
            label, value, form = arguments.one_form(names, values, positive, term.defaults.get(name))
        named[label] = value
        chosen.append(form)
    return named, term.pack(chosen)


def _term(
    term: Term, named: dict[str, Any], forms: int, weight: Any, batch_dims: Any, reduction: Any
) -> tuple[TermSpec, tuple[Tensor | None, ...], torch.Size]:
    """Spec, operands (weight last) and joint shape of a term whose inputs are checked one by one."""
    weight = arguments.weight(weight)
    shape = arguments.broadcast(named if weight is None else {**named, "weight": weight})
    operands, constants = _operands((*named.values(), 1.0 if weight is None else weight))
    spec = TermSpec(
        term.number, constants, forms, arguments.batch_dims(batch_dims, shape), arguments.reduction(reduction)
    )
    return spec, operands, shape


def _term_sum(term: Term, named: dict[str, Any], forms: int, weight: Any, batch_dims: Any, reduction: Any) -> Tensor:
    spec, operands, _ = _term(term, named, forms, weight, batch_dims, reduction)
    return autograd.term_sum(spec, operands)


def _log_prob(likelihood: Likelihood, given: Mapping[str, Any], weight: Any, batch_dims: Any, reduction: Any) -> Tensor:
    """What every ``..._log_prob`` does: ``given`` has its arguments by name."""
    return _term_sum(likelihood, *_named_inputs(likelihood, given, {}), weight, batch_dims, reduction)


def elbo_loss(
    recon: Tensor | None = None,
    x: Tensor | None = None,
    mu: Tensor | None = None,
    logvar: Scale = None,
    *,
    kl: Tensor | None = None,
    log_likelihood: Tensor | None = None,
    log_std: Scale = None,
    std: Scale = None,
    var: Scale = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Scale = None,
    prior_log_std: Scale = None,
    prior_std: Scale = None,
    prior_var: Scale = None,
    likelihood: str | Likelihood | LikelihoodWithParameters = "gaussian",
    recon_logvar: Scale = None,
    recon_log_std: Scale = None,
    recon_std: Scale = None,
    recon_var: Scale = None,
    beta: Tensor | float = 1.0,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "mean",
) -> ELBO:
    """Minus the evidence lower bound: loss = -(log_likelihood - beta * kl).

    ELBO(x) = E_q(z|x)[ln p(x|z)] - KL(q(z|x) || p(z)) <= ln p(x) (Kingma & Welling 2014, equation 3); beta other than 1
    as in Higgins et al. 2017 ("beta-VAE"). The expectation is over the samples of z that recon was decoded from. On the
    first backward pass after a reduced result, the gradients are ready: the forward pass made them.

    Args:
        recon: the decoder's output: the mean of a Gaussian or Laplace likelihood, the logits of a Bernoulli. With K samples
            it has a leading axis K that x lacks, which counts among ``batch_dims`` (K samples of B examples:
            ``batch_dims=2``).
        x: data; broadcasts to recon without a copy.
        mu, logvar: of the posterior, whose KL to the prior is computed (:func:`gaussian_kl`); or
        kl: the KL of each example, as :func:`rsample_kl` returns it. Broadcasts to the batch shape.
        log_likelihood: ln p(x|z) of each example, ``[*batch]``, computed by the caller, in place of recon and x;
            ``batch_dims`` are then those of mu.
        likelihood: "gaussian", "bernoulli" or "laplace"; or an object of :mod:`elbo_ext.likelihoods` with the parameters
            that the decoder does not give, ``likelihoods.Laplace(scale=0.5)``.
        recon_logvar: scale of the Gaussian likelihood, ln sigma^2 = 0 by default; or ``recon_log_std=``, ...
        beta: factor of the KL, a number or a tensor that broadcasts to the batch shape.
        weight: multiplies each element's log-likelihood.
        batch_dims, reduction: see the module's conventions.

    Returns:
        ``ELBO(loss, log_likelihood, kl)`` in nats, each of the batch shape, or scalars if reduced; kl is without beta.

    Raises:
        ValueError, TypeError: see the module's conventions; also for an unknown likelihood, a scale with another likelihood
            than the Gaussian, if recon and x repeat against each other, and if neither or both of kl and mu are given.
    """
    spec: TermSpec | None = None
    operands: tuple[Tensor | None, ...]
    recon_scales = dict(zip(RECON_SCALES, (recon_logvar, recon_log_std, recon_std, recon_var), strict=True))
    if log_likelihood is None:
        named, forms, term = _recon_and_x(likelihood, recon, x, recon_scales)
        spec, operands, shape = _term(term, named, forms, weight, batch_dims, reduction)
        assert recon is not None and x is not None  # _recon_and_x has refused them
        batch, sample_axes, first = shape[: spec.batch_dims], max(len(shape) - x.dim(), 0), {"recon": recon}
    else:
        named_likelihood = (
            None if isinstance(likelihood, str) and likelihood == "gaussian" else likelihood
        )  # the default
        others = {"recon": recon, "x": x, "likelihood": named_likelihood, **recon_scales, "weight": weight}
        _no_use_beside("log_likelihood", others)
        sample_axes, first = 0, {"log_likelihood": arguments.tensor("log_likelihood", log_likelihood)}
        operands, batch = (log_likelihood,), log_likelihood.shape

    if (kl is None) == (mu is None):
        raise ValueError(f"exactly one of kl and mu must be given, got {'neither' if kl is None else 'both'}")
    scales, prior_scales = (logvar, log_std, std, var), (prior_logvar, prior_log_std, prior_std, prior_var)
    if kl is None:
        named, forms = _posterior_and_prior(mu, scales, prior_mu, prior_scales)
        arguments.broadcast(named)  # a posterior at odds with itself comes before one at odds with recon
        arguments.on_one_device(first, named)
        if spec is not None:
            assert x is not None and mu is not None  # _recon_and_x and _posterior_and_prior have refused them
            _check_batch(spec.batch_dims, sample_axes, x, mu, batch)
            batch_dims = spec.batch_dims - sample_axes
        kl = _term_sum(GAUSSIAN_KL, named, forms, None, batch_dims, "none")
        arguments.broadcasts_to_batch("the KL of mu and its scale has shape {}, which", kl, batch)
    else:
        arguments.tensor("kl", kl)
        if spec is None and (type(batch_dims) is not int or batch_dims != 1):  # all dimensions are of the batch
            arguments.batch_dims(batch_dims, batch)
        given = dict(zip(_POSTERIOR_AND_PRIOR, (*scales, prior_mu, *prior_scales), strict=True))
        _no_use_beside("kl", given)
        arguments.broadcasts_to_batch("kl of shape {}", kl, batch)
    beta = arguments.tensor_or_number("beta", beta)
    arguments.on_one_device(first, {"kl": kl, "beta": beta})
    arguments.broadcasts_to_batch("beta of shape {}", beta, batch)

    dtype = value_dtype(*operands, kl, beta if isinstance(beta, Tensor) else None)
    if spec is not None:
        if isinstance(beta, float) and dtype is value_dtype(*operands):
            reduced = autograd.elbo(spec, beta, kl, operands)
            if reduced is not None:
                return ELBO(*reduced)
        log_likelihood = autograd.term_sum(spec._replace(reduction=NONE), operands)
    assert log_likelihood is not None  # given, where there is no spec
    log_likelihood, kl = log_likelihood.to(dtype), kl.to(dtype).expand(batch)
    parts = ELBO(beta * kl - log_likelihood, log_likelihood, kl)
    number = arguments.reduction(reduction)
    if number == NONE:  # copies of what the caller has, so that a change in place of one does not reach the other
        return parts._replace(log_likelihood=log_likelihood.clone() if spec is None else log_likelihood, kl=kl.clone())
    return ELBO(*(part.sum() if number == REDUCTIONS["sum"] else part.mean() for part in parts))


def _recon_and_x(
    likelihood: Any, recon: Any, x: Any, recon_scales: Mapping[str, Any]
) -> tuple[dict[str, Any], int, Likelihood]:
    """The inputs of a likelihood by name, their forms, and the likelihood."""
    chosen = likelihoods.by_name(likelihood)
    term = chosen.likelihood
    scales = arguments.recon_scales(chosen, recon_scales)
    arguments.tensor("x", x)
    arguments.tensor("recon", recon)
    arguments.at_most_one_broadcasts(recon, x)
    shown = {term.decoder: "recon"}
    if not chosen.parameters:
        shown |= {name.removeprefix("recon_"): name for name in recon_scales}
    named, forms = _named_inputs(term, {"x": x, term.decoder: recon, **scales, **chosen.parameters}, shown)
    return named, forms, term


def _check_batch(batch_dims: int, sample_axes: int, x: Tensor, mu: Tensor, batch: torch.Size) -> None:
    """That mu's examples are those of recon, without its axes of samples."""
    if batch_dims < sample_axes:
        raise ValueError(
            f"batch_dims must be at least {sample_axes}, the number of axes of samples that recon has beyond x, "
            f"got {batch_dims}"
        )
    if sample_axes == batch_dims > 0 and arguments.same_shape(mu.shape[:sample_axes], batch):
        raise ValueError(
            f"x of shape {tuple(x.shape)} has no batch dimension, so that those of mu, of shape {tuple(mu.shape)}, "
            "are taken for latent ones; expand x to the batch, or pass kl"
        )


def _no_use_beside(what: str, given: Mapping[str, Any]) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        verb = "has" if len(names) == 1 else "have"
        raise ValueError(f"{' and '.join(names)} {verb} no use beside {what}, which is computed already")
