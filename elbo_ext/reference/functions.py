"""The public functions, as formulas in PyTorch."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formulas import gaussian, sample_and_log_prob, standard_deviation
from ..likelihoods import GAUSSIAN_KL, LIKELIHOODS, Term, by_name
from . import categorical
from .noise import normal_noise

__all__ = [
    "ELBO",
    "bernoulli_log_prob",
    "continuous_bernoulli_log_prob",
    "discretized_gaussian_log_prob",
    "discretized_logistic_log_prob",
    "elbo_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "laplace_log_prob",
    "negative_binomial_log_prob",
    "poisson_log_prob",
    "rsample",
    "rsample_kl",
    "rsample_with_log_prob",
    "student_t_log_prob",
    "zero_inflated_negative_binomial_log_prob",
]


class ELBO(NamedTuple):
    """What :func:`elbo_loss` returns. All three share one shape: the batch shape, or a scalar once reduced.

    Attributes:
        loss: ``-(log_likelihood - beta * kl)``, the quantity to minimize, in nats.
        log_likelihood: log p(x|z), in nats.
        kl: KL(q(z|x) || p(z)), in nats, without the factor beta.
    """

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor


def _pick(given: dict[str, Any], forms: Sequence[str], floors: Sequence[str]) -> tuple[str | None, str, float]:
    """Which of an input's ``forms`` is given, a keyword before the form by position; its name with its floor,
    "rho+min_std", the first form's if none is given; and the floor. All by their names in ``given``."""
    form = next((form for form in reversed(forms) if given.get(form) is not None), None)
    floor = next((floor for floor in floors if given.get(floor)), None)
    name = forms[0] if form is None else form
    return form, name if floor is None else f"{name}+{floor}", 0.0 if floor is None else given[floor]


def _pick_scale(given: dict[str, Any]) -> tuple[Tensor | float, str, float]:
    """(scale, form, floor) of a Gaussian, by the arguments' names; unit scale if none is given."""
    chosen, form, floor = _pick(given, GAUSSIAN_KL.forms["logvar"], GAUSSIAN_KL.floors["logvar"])
    return 0.0 if chosen is None else given[chosen], form, floor


def _by_name(prefix: str, *scales: Any) -> dict[str, Any]:
    """The arguments for a scale, forms and floors, under their names."""
    names = (*GAUSSIAN_KL.forms["logvar"], *GAUSSIAN_KL.floors["logvar"])
    return {prefix + name: value for name, value in zip(names, scales, strict=True)}


def _tensors(*values: Tensor | float | None) -> list[Any]:
    """All values as tensors of one dtype, float64 if any of the tensors is, else float32; None stays None. As in torch,
    tensors with dimensions decide, if there are any."""
    given = [v for v in values if isinstance(v, Tensor)]
    floating = [v for v in given if v.is_floating_point()]
    deciding = [v for v in floating if v.dim() > 0] or floating
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in deciding) else torch.float32
    device = given[0].device
    return [v if v is None else torch.as_tensor(v, dtype=dtype, device=device) for v in values]


def _reduce(examples: Tensor, reduction: str) -> Tensor:
    """Over the examples: "none", "sum", or "mean" = sum / number of examples."""
    reductions: dict[str, Callable[[], Tensor]] = {"none": lambda: examples, "sum": examples.sum, "mean": examples.mean}
    return reductions[reduction]()


def _sum_term(
    term: Term,
    inputs: list[Any],
    forms: Sequence[str],
    floors: Sequence[float],
    weight: Tensor | None,
    batch_dims: int,
    reduction: str,
) -> Tensor:
    """Weights the elements, sums all but the first ``batch_dims`` dimensions, then reduces the examples."""
    *tensors, weight = _tensors(*inputs, weight)
    number = term.pack([names.index(form) for names, form in zip(term.numbered_forms, forms, strict=True)])
    value = term.in_torch(number, tensors, weight, floors)
    batch, elements = value.shape[:batch_dims], value.shape[batch_dims:]
    return _reduce(value.reshape(*batch, math.prod(elements)).sum(-1), reduction)


def _log_prob(
    name: str, given: dict[str, Any], weight: Tensor | None = None, batch_dims: int = 1, reduction: str = "none"
) -> Tensor:
    """ln p(x), summed over the event dimensions, of a likelihood of the registry; ``given`` has forms of its inputs."""
    return _sum_of(LIKELIHOODS[name], given, weight, batch_dims, reduction)


def _sum_of(
    term: Term, given: dict[str, Any], weight: Tensor | None = None, batch_dims: int = 1, reduction: str = "none"
) -> Tensor:
    """The sum of a term whose inputs stand in ``given`` by the names of their forms."""
    inputs, forms, floors = [], [], []
    given = dict(term.with_numbers(given))
    for input, names, of_input in zip(term.inputs, term.forms_of_inputs, term.floors_of_inputs, strict=True):
        chosen, form, floor = _pick(given, names, of_input)
        inputs.append(term.defaults[input] if chosen is None else given[chosen])
        forms.append(form)
        floors.append(floor)
    return _sum_term(term, inputs, forms, floors, weight, batch_dims, reduction)


def rsample(
    mu: Tensor,
    logvar: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    min_std: float | None = None,
    min_var: float | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """z = mu + sigma * eps, eps ~ N(0, I): the reparameterized sample.

    Kingma & Welling 2014, section 2.4; Rezende et al. 2014. The gradients are dz/dmu = 1 and
    dz/dsigma = eps.

    Args:
        mu: tensor of any shape.
        logvar: ln sigma^2, broadcastable with mu; or one of ``log_std``, ``std``, ``var``, ``rho`` in its place, and
            ``min_std`` or ``min_var``, if any, with it.
        num_samples: K adds a leading axis of length K to z; None adds no axis.
        generator: where the seed of eps is drawn from; None is torch's default generator. A list has one for each example
            along the first dimension of S.
        noise: eps itself, of z's shape, instead of :func:`normal_noise` in row-major order of z.

    Returns:
        z of shape ``[*S]`` or ``[K, *S]``, S the broadcast shape of mu and the scale.
    """
    own = _by_name("", logvar, log_std, std, var, rho, min_std, min_var)
    scale, form, floor = _pick_scale(own)
    dtype = torch.result_type(mu, scale) if isinstance(scale, Tensor) else mu.dtype
    mean, scale, noise = _tensors(mu, scale, noise)
    shape = torch.broadcast_shapes(mean.shape, scale.shape)
    if num_samples is not None:
        shape = (num_samples, *shape)
    if noise is None:
        from ..ops import draw_seed

        def draw(generator: torch.Generator | None, *shape: int) -> Tensor:
            seed = int(draw_seed(mu.device, generator))
            return torch.from_numpy(normal_noise(seed, math.prod(shape))).reshape(shape).to(mean)

        if generator is None or isinstance(generator, torch.Generator):
            noise = draw(generator, *shape)
        else:
            axis = 0 if num_samples is None else 1
            noise = torch.stack([draw(one, *shape[:axis], *shape[axis + 1 :]) for one in generator], axis)
    z: Tensor = (mean + standard_deviation(scale, form, floor) * noise).to(dtype)
    return z


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    min_std: float | None = None,
    min_var: float | None = None,
    prior_log_std: Tensor | float | None = None,
    prior_std: Tensor | float | None = None,
    prior_var: Tensor | float | None = None,
    prior_rho: Tensor | float | None = None,
    prior_min_std: float | None = None,
    prior_min_var: float | None = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """KL(q || p) of diagonal Gaussians, summed over the latent dimensions, in nats.

    KL = sum_j 1/2 ((mu_j - mu_pj)^2 / sigma_pj^2 + sigma_j^2 / sigma_pj^2 - 1 - ln(sigma_j^2 / sigma_pj^2))
    (Kingma & Welling 2014, appendix B, for the default prior N(0, I)).

    Args:
        mu, logvar, prior_mu, prior_logvar: broadcastable, their broadcast shape ``[*batch, *latent]``.
        weight: factor of each element's KL, broadcastable to that shape.
        batch_dims: number of batch dimensions; the others are summed.
        reduction: over the batch: "none", "sum" or "mean" (sum / number of examples).

    Returns:
        ``[*batch]``, or a scalar once reduced; float64 if any tensor is, else float32.
    """
    own = _by_name("", logvar, log_std, std, var, rho, min_std, min_var)
    prior = _by_name(
        "prior_", prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var
    )
    given = {"mu": mu, **own, "prior_mu": 0.0 if prior_mu is None else prior_mu, **prior}
    if all(value is None for value in prior.values()):
        given["prior_logvar"] = 0.0
    return _sum_of(GAUSSIAN_KL, given, weight, batch_dims, reduction)


def rsample_kl(
    mu: Tensor,
    logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    min_std: float | None = None,
    min_var: float | None = None,
    prior_log_std: Tensor | float | None = None,
    prior_std: Tensor | float | None = None,
    prior_var: Tensor | float | None = None,
    prior_rho: Tensor | float | None = None,
    prior_min_std: float | None = None,
    prior_min_var: float | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise: Tensor | None = None,
    kl_weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """:func:`rsample` and :func:`gaussian_kl` of the same distribution: (z, kl).

    z has the joint shape of posterior and prior. The KL is analytic, so it has no sample axis whatever
    ``num_samples`` is. ``kl_weight`` is a factor of each element's KL.
    """
    own: dict[str, Any] = _by_name("", logvar, log_std, std, var, rho, min_std, min_var)
    prior: dict[str, Any] = _by_name(
        "prior_", prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var
    )
    joint = torch.broadcast_tensors(
        mu, *(v for v in (*own.values(), prior_mu, *prior.values()) if isinstance(v, Tensor))
    )
    z = rsample(joint[0], **own, num_samples=num_samples, generator=generator, noise=noise)
    options: dict[str, Any] = {"batch_dims": batch_dims, "reduction": reduction}
    kl = gaussian_kl(mu, prior_mu=prior_mu, **own, **prior, **options, weight=kl_weight)
    return z, kl


def rsample_with_log_prob(
    mu: Tensor,
    logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    min_std: float | None = None,
    min_var: float | None = None,
    prior_log_std: Tensor | float | None = None,
    prior_std: Tensor | float | None = None,
    prior_var: Tensor | float | None = None,
    prior_rho: Tensor | float | None = None,
    prior_min_std: float | None = None,
    prior_min_var: float | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise: Tensor | None = None,
    kl_weight: Tensor | None = None,
    batch_dims: int = 1,
    gradient: str = "pathwise",
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample z of q, ln q(z) and the prior's ln p(z), each summed over the elements of an example.

    ln q comes from the noise (:func:`sample_and_log_prob`), so that it is exact however small sigma is. With K samples
    all three have a leading axis K. ``kl_weight`` is a factor of each element's ln q and ln p, which a factor of zero leaves
    out.
    """
    own = _by_name("", logvar, log_std, std, var, rho, min_std, min_var)
    prior = _by_name(
        "prior_", prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var
    )
    given = (mu, *own.values(), prior_mu, *prior.values())
    joint = torch.broadcast_tensors(*(v for v in given if isinstance(v, Tensor)))[0].shape
    scale, form, floor = _pick_scale(own)
    prior_scale, prior_form, prior_floor = _pick_scale(
        {name.removeprefix("prior_"): value for name, value in prior.items()}
    )
    dtype = torch.result_type(mu, scale) if isinstance(scale, Tensor) else mu.dtype
    mean, scale, prior_mean, prior_scale, eps = _tensors(
        mu, scale, 0.0 if prior_mu is None else prior_mu, prior_scale, noise
    )
    shape = joint if num_samples is None else (num_samples, *joint)
    if eps is None:  # the noise is what turns a standard normal into itself
        zeros = torch.zeros(joint, dtype=mean.dtype, device=mean.device)
        eps = rsample(zeros, 0.0, num_samples=num_samples, generator=generator)

    def elements(*operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, scale, prior_mean, prior_scale, eps = operands
        z, log_q = sample_and_log_prob(mean, scale, form, eps, gradient, floor)
        return z, log_q, gaussian(z, prior_mean, prior_scale, prior_form, prior_floor)

    operands = (mean, scale, prior_mean, prior_scale, eps)
    z, log_q, log_p = elements(*operands)
    if kl_weight is not None:
        out = (kl_weight == 0) & ~(log_q + log_p).isfinite()
        _, log_q, log_p = elements(*(torch.where(out, 1.0, t) for t in operands))
        log_q, log_p = (torch.where(out, 0.0, t * kl_weight) for t in (log_q, log_p))
    batch = shape[: batch_dims + (num_samples is not None)]
    size = math.prod(shape[len(batch) :])
    log_q, log_p = (t.expand(shape).reshape(*batch, size).sum(-1) for t in (log_q, log_p))
    return z.expand(shape).to(dtype), log_q, log_p


def gaussian_log_prob(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float = 0.0,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    min_std: float | None = None,
    min_var: float | None = None,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln N(x; mean, diag(sigma^2)), summed over the event dimensions, in nats.

    ln N = -1/2 sum_j ((x_j - mean_j)^2 / sigma_j^2 + ln sigma_j^2 + ln 2 pi)
    (Kingma & Welling 2014, appendix C.2).

    Args:
        x, mean, logvar: broadcastable, their broadcast shape ``[*batch, *event]``.
        weight: factor of each element's log-density, broadcastable to that shape.
        batch_dims: number of batch dimensions; the others are summed.
        reduction: over the batch: "none", "sum" or "mean" (sum / number of examples).

    Returns:
        ``[*batch]``, or a scalar once reduced; float64 if any tensor is, else float32.
    """
    given = {"x": x, "mean": mean, **_by_name("", logvar, log_std, std, var, rho, min_std, min_var)}
    return _log_prob("gaussian", given, weight, batch_dims, reduction)


def bernoulli_log_prob(
    x: Tensor,
    logits: Tensor,
    *,
    weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "none",
) -> Tensor:
    """ln p(x) = sum_j (x_j ln p_j + (1 - x_j) ln(1 - p_j)), p = sigmoid(logits), in nats.

    Kingma & Welling 2014, appendix C.1; minus the binary cross-entropy for x inside (0, 1).

    Args:
        x, logits: broadcastable, their broadcast shape ``[*batch, *event]``; x in [0, 1].
        weight: factor of each element's log-probability, broadcastable to that shape.
        batch_dims: number of batch dimensions; the others are summed.
        reduction: over the batch: "none", "sum" or "mean" (sum / number of examples).

    Returns:
        ``[*batch]``, or a scalar once reduced; float64 if any tensor is, else float32.
    """
    return _log_prob("bernoulli", {"x": x, "logits": logits}, weight, batch_dims, reduction)


def laplace_log_prob(
    x: Tensor, mean: Tensor, log_scale: Tensor | float = 0.0, *, scale: Tensor | float | None = None, **options: Any
) -> Tensor:
    """ln p(x) = sum_j -(|x_j - mean_j| / b_j + ln b_j + ln 2), in nats; options: as for :func:`gaussian_log_prob`."""
    return _log_prob("laplace", {"x": x, "mean": mean, "log_scale": log_scale, "scale": scale}, **options)


def poisson_log_prob(
    x: Tensor, log_rate: Tensor | float | None = None, *, rate: Tensor | float | None = None, **options: Any
) -> Tensor:
    """ln p(x) = sum_j (x_j ln r_j - r_j - ln x_j!), in nats; options: as for :func:`gaussian_log_prob`."""
    return _log_prob("poisson", {"x": x, "log_rate": log_rate, "rate": rate}, **options)


def negative_binomial_log_prob(
    x: Tensor,
    mean: Any = None,
    theta: Any = None,
    *,
    log_mean: Any = None,
    logits: Any = None,
    log_theta: Any = None,
    **options: Any,
) -> Tensor:
    """ln p(x) of negative binomials of mean m and variance m + m^2 / theta; options: as for :func:`gaussian_log_prob`."""
    given = {"x": x, "mean": mean, "log_mean": log_mean, "logits": logits, "theta": theta, "log_theta": log_theta}
    return _log_prob("negative_binomial", given, **options)


def zero_inflated_negative_binomial_log_prob(
    x: Tensor,
    mean: Any = None,
    theta: Any = None,
    gate_logits: Any = None,
    *,
    log_mean: Any = None,
    logits: Any = None,
    log_theta: Any = None,
    **options: Any,
) -> Tensor:
    """The same with extra zeros from a gate; options: as for :func:`gaussian_log_prob`."""
    given = {"x": x, "mean": mean, "log_mean": log_mean, "logits": logits, "theta": theta, "log_theta": log_theta}
    return _log_prob("zero_inflated_negative_binomial", {**given, "gate_logits": gate_logits}, **options)


def student_t_log_prob(
    x: Tensor,
    df: Any = None,
    mean: Any = 0.0,
    log_scale: Any = 0.0,
    *,
    log_df: Any = None,
    scale: Any = None,
    **options: Any,
) -> Tensor:
    """ln p(x) of t distributions with df degrees of freedom; options: as for :func:`gaussian_log_prob`."""
    given = {"x": x, "df": df, "log_df": log_df, "mean": mean, "log_scale": log_scale, "scale": scale}
    return _log_prob("student_t", given, **options)


def continuous_bernoulli_log_prob(x: Tensor, logits: Tensor | float, **options: Any) -> Tensor:
    """ln p(x) = sum_j (a_j x_j - ln((e^a_j - 1) / a_j)), a the logits, in nats; options: as for :func:`gaussian_log_prob`."""
    return _log_prob("continuous_bernoulli", {"x": x, "logits": logits}, **options)


def discretized_logistic_log_prob(
    x: Tensor,
    mean: Tensor | float,
    log_scale: Tensor | float = 0.0,
    *,
    scale: Tensor | float | None = None,
    low: float | None = -1.0,
    high: float | None = 1.0,
    bins: int = 256,
    width: float | None = None,
    **options: Any,
) -> Tensor:
    """ln p(x) = sum_j ln(S((x_j + h - mean_j) / b_j) - S((x_j - h - mean_j) / b_j)), S the logistic function, in nats.

    h is half a bin, (high - low) / (bins - 1) / 2, or width / 2 where low and high are None. The lowest bin begins at
    -infinity, the highest one ends at +infinity. options: as for :func:`gaussian_log_prob`.
    """
    given = {"x": x, "mean": mean, "log_scale": log_scale, "scale": scale}
    return _log_prob(
        "discretized_logistic", {**given, "low": low, "high": high, "bins": bins, "width": width}, **options
    )


def discretized_gaussian_log_prob(
    x: Tensor,
    mean: Tensor | float,
    logvar: Tensor | float = 0.0,
    *,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    min_std: float | None = None,
    min_var: float | None = None,
    low: float | None = -1.0,
    high: float | None = 1.0,
    bins: int = 256,
    width: float | None = None,
    **options: Any,
) -> Tensor:
    """ln p(x) = sum_j ln(Phi((x_j + h - mean_j) / sigma_j) - Phi((x_j - h - mean_j) / sigma_j)), in nats; bins and options as
    for :func:`discretized_logistic_log_prob`."""
    given = {"x": x, "mean": mean, **_by_name("", logvar, log_std, std, var, rho, min_std, min_var)}
    return _log_prob(
        "discretized_gaussian", {**given, "low": low, "high": high, "bins": bins, "width": width}, **options
    )


def elbo_loss(
    recon: Tensor | None = None,
    x: Tensor | None = None,
    mu: Tensor | None = None,
    logvar: Tensor | float | None = None,
    *,
    kl: Tensor | None = None,
    log_likelihood: Tensor | None = None,
    log_std: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    rho: Tensor | float | None = None,
    min_std: float | None = None,
    min_var: float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    prior_log_std: Tensor | float | None = None,
    prior_std: Tensor | float | None = None,
    prior_var: Tensor | float | None = None,
    prior_rho: Tensor | float | None = None,
    prior_min_std: float | None = None,
    prior_min_var: float | None = None,
    likelihood: Any = "gaussian",
    recon_logvar: Tensor | float | None = None,
    recon_log_std: Tensor | float | None = None,
    recon_std: Tensor | float | None = None,
    recon_var: Tensor | float | None = None,
    recon_rho: Tensor | float | None = None,
    recon_min_std: float | None = None,
    recon_min_var: float | None = None,
    beta: Tensor | float = 1.0,
    weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    batch_dims: int = 1,
    reduction: str = "mean",
) -> ELBO:
    """Minus the evidence lower bound, loss = -(ln p(x|z) - beta KL(q(z|x) || p(z))), in nats.

    Kingma & Welling 2014, equations 3 and 7; beta = 1 gives the bound on ln p(x), other values the beta-VAE
    objective (Higgins et al. 2017).

    Args:
        recon: the decoder's output, mean or logits, ``[*batch, *event]``; with K samples of z a leading
            axis K beyond those of x, which counts as a batch dimension.
        x: the data, broadcastable with recon.
        mu, logvar: of q(z|x), ``[*batch, *latent]`` without the sample axis; or
        kl: the KL per example, broadcastable to the batch shape.
        log_likelihood: ln p(x|z) of each example, in place of recon and x.
        likelihood: a name or an object of :mod:`elbo_ext.likelihoods`; recon is what its ``decoder`` says, the mean of a
            Gaussian (scale: ``recon_logvar`` or another form), the logits of a Bernoulli.
        weight: factor of each element's log-likelihood, broadcastable to ``[*batch, *event]``.
        kl_weight: factor of each element's KL, broadcastable to ``[*batch, *latent]``.
        batch_dims: number of recon's batch dimensions; the others are summed.
        reduction: over the batch: "none", "sum" or "mean" (sum / number of examples).
    """
    classes = 0  # dimensions of them that recon has and x has not
    scales = _by_name("", recon_logvar, recon_log_std, recon_std, recon_var, recon_rho, recon_min_std, recon_min_var)
    if log_likelihood is None:
        chosen = by_name(likelihood)
        given = {"x": x, chosen.recon: recon, **chosen.parameters}
        classes = int(chosen.likelihood.over_classes)
        if "logvar" in chosen.likelihood.forms:
            given = {**scales, **given}
        if classes:
            log_prob = getattr(categorical, f"{chosen.likelihood.name}_log_prob")
            log_likelihood = log_prob(**given, weight=weight, batch_dims=batch_dims)
            classes -= chosen.likelihood.name == "multinomial"  # whose x has a dimension of its own for them
        else:
            log_likelihood = _log_prob(chosen.likelihood.name, given, weight, batch_dims)
    if kl is None:
        assert mu is not None, "one of kl and mu"
        own: dict[str, Any] = _by_name("", logvar, log_std, std, var, rho, min_std, min_var)
        prior: dict[str, Any] = _by_name(
            "prior_", prior_logvar, prior_log_std, prior_std, prior_var, prior_rho, prior_min_std, prior_min_var
        )
        operands = (x, recon, *scales.values(), weight)
        sample_axes = 0 if x is None else max(t.dim() for t in operands if isinstance(t, Tensor)) - x.dim() - classes
        options: dict[str, Any] = {"weight": kl_weight, "batch_dims": batch_dims - sample_axes}
        kl = gaussian_kl(mu, prior_mu=prior_mu, **own, **prior, **options)
    log_likelihood, kl, beta = _tensors(log_likelihood, kl, beta)
    kl = kl.expand_as(log_likelihood)
    loss = -(log_likelihood - beta * kl)
    if reduction == "none":  # copies of what the caller has, so that a change in place of one does not reach the other
        return ELBO(loss, log_likelihood.clone(), kl.clone())
    return ELBO(*(_reduce(value, reduction) for value in (loss, log_likelihood, kl)))
