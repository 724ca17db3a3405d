"""Categorical data and latents: terms over a dimension of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments, autograd, likelihoods, ops
from ..autograd import CategoricalSpec, TermSpec
from ..autograd.torch_internals import is_tracing
from ..dispatch import public
from ..likelihoods import CATEGORICAL_KL, Term
from . import latent_call
from .operands import operands_and_constants

__all__ = [
    "categorical_kl",
    "categorical_log_prob",
    "categorical_rsample_kl",
    "multinomial_log_prob",
]


@public
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
    """ln p(x) = logits[x] - logsumexp(logits): minus the cross-entropy of classes, as of words or segments.

    Its derivative by the logit of the class x, the probability of all others, keeps its digits where the model is sure.

    Args:
        x: classes, of any integer dtype; the shape of logits without ``dim``, or one that broadcasts to it. What is no class
            has -inf with gradient 0.
        logits: unnormalized log-probabilities, with the classes along ``dim``, in any layout; -inf for impossible ones.
        dim: the dimension of the classes.
        ignore_index: an x that counts as 0, as of padding.
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`; of the shape of x, the joint shape
            without ``dim``. The mean is over examples, whether or not they are ignored.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if logits or weight is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`; TypeError for an x of no integer dtype.
    """
    logits = arguments.classes("logits", logits, dim)
    x = arguments.labels("x", x)
    return _sum(
        likelihoods.Categorical, {"x": x.unsqueeze(-1), "logits": logits.movedim(dim, -1)},
        (arguments.integer("ignore_index", ignore_index), 0.0), weight, batch_dims, reduction,
    )  # fmt: skip


@public
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
    """sum_c x_c ln softmax(logits)_c: counts of items, as of Mult-VAE's users (Liang et al. 2018) and of topic models.

    Args:
        x: counts, dense, of any dtype, an integer one as well, which is read as it is; a floating-point one has a gradient.
        logits: unnormalized log-probabilities; both have their classes along ``dim``, and broadcast to each other.
        dim: the dimension of the classes.
        coefficient: whether ln N! - sum_c ln x_c! is added, N = sum_c x_c: a constant of the data, computed in float64 by
            torch's own operations.
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`; of the joint shape without ``dim``.

    Returns:
        The log-probability in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`.
    """
    logits = arguments.classes("logits", logits, dim)
    dim = dim if dim < 0 else dim - logits.dim()
    x = arguments.classes("x", x, dim, data=True)
    named = {"x": x.movedim(dim, -1), "logits": logits.movedim(dim, -1)}
    value = _sum(likelihoods.Multinomial, named, (0.0, 0.0), weight, batch_dims, reduction)
    if not coefficient:
        return value
    counts = named["x"].double()
    constant = (counts.sum(-1) + 1).lgamma() - (counts + 1).lgamma().sum(-1)
    return value + _of_rows(constant, named, weight, batch_dims, reduction).to(value.dtype)


@public
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
    """KL( Categorical(logits) || Categorical(prior_logits) ), the uniform prior by default.

    sum_c p_c (ln p_c - ln q_c), p = (1 - unimix) softmax(logits) + unimix / C, and q of prior_logits alike (Hafner et al.
    2023, "Mastering diverse domains through world models", whose unimix is 0.01). Never negative, and right to full relative
    precision as p -> q, where the sum cancels.

    Args:
        logits: of the posterior, with the classes along ``dim``.
        prior_logits: of the prior, of a shape that broadcasts against that of logits.
        dim: the dimension of the classes.
        unimix: the share of the uniform distribution, between 0 and 1.
        weight, batch_dims, reduction: see the conventions of :mod:`elbo_ext.functional`; of the joint shape without ``dim``.
            Free nats and balance: :mod:`elbo_ext.bounds`.

    Returns:
        The KL in nats: the batch shape, or a scalar if reduced; float64 if any operand is, else float32.

    Raises:
        ValueError, TypeError: see the conventions of :mod:`elbo_ext.functional`.
    """
    named, constants = _posterior_and_prior(logits, prior_logits, dim, unimix)
    return _sum(CATEGORICAL_KL, named, constants, weight, batch_dims, reduction)


@public
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
    """A one-hot sample z of Categorical(logits) and :func:`categorical_kl`.

    z is the class of the largest ln p_c + g_c, g standard Gumbel noise from the package's own stream (as for
    :func:`elbo_ext.rsample`), which is the same for any device, number of threads and layout. Its gradient is passed straight
    through to the probabilities, as of z + p - p.detach() (Bengio, Leonard & Courville 2013).

    Args:
        logits, prior_logits, dim, unimix, batch_dims, reduction: as in :func:`categorical_kl`.
        num_samples: K adds a leading axis of K samples; None adds no axis.
        generator: where the seed is drawn from; by default torch's generator of the device.
        noise: g itself, of z's shape, instead of a draw.

    Returns:
        ``(z, kl)``: z of the joint shape S of logits and prior, or ``[K, *S]``, in the dtype of logits; kl as from
        :func:`categorical_kl`, in nats.

    Raises:
        ValueError, TypeError: as :func:`categorical_kl`; also if noise has not z's shape or a generator comes with it.
    """
    named, constants = _posterior_and_prior(logits, prior_logits, dim, unimix)
    rows = _rows(named, None)
    operands = _operands(named, None, rows)
    whole = operands[0]
    assert whole is not None
    shape = whole.shape
    samples = arguments.num_samples(num_samples)
    spec = CategoricalSpec(
        (*constants, 1.0), samples, arguments.batch_dims(batch_dims, torch.Size(rows)), arguments.reduction(reduction)
    )
    axes = int(samples is not None)
    if noise is not None:
        if generator is not None:
            raise ValueError("noise and generator were both given; noise leaves nothing to draw")
        arguments.tensor("noise", noise)
        back = dim if dim < 0 else dim + axes
        expected = (*((samples,) if samples is not None else ()), *shape)
        seed, noise = None, noise.movedim(back, -1)
        if not arguments.same_shape(noise.shape, expected):
            raise ValueError(
                f"noise must have the shape of the sample, {tuple(expected)} with the classes last, got {tuple(noise.shape)}"
            )
        arguments.broadcast({"logits": whole, "noise": noise})  # for the device
    else:
        arguments.one_generator(generator)
        if autograd.in_trace():
            seed, noise = None, _noise_of_torch(whole, samples, generator)
        elif torch.compiler.is_compiling() and generator is None:
            seed = torch.ops.elbo_ext.draw_seed(whole)
        else:
            seed = latent_call.draw_seeds(whole.device, generator)
    z, kl = autograd.categorical_sample(spec, seed, noise, operands)
    return z.to(logits.dtype).movedim(-1, dim if dim < 0 else dim + axes), kl


def _posterior_and_prior(
    logits: Any, prior_logits: Any, dim: Any, unimix: Any
) -> tuple[dict[str, Tensor | float], tuple[float, float]]:
    """The operands of a KL by name, the classes last, and the constants of the two."""
    logits = arguments.classes("logits", logits, dim)
    named: dict[str, Tensor | float] = {"logits": logits.movedim(dim, -1), "prior_logits": 0.0}
    if prior_logits is not None:
        dim = dim if dim < 0 else dim - logits.dim()
        named["prior_logits"] = arguments.classes("prior_logits", prior_logits, dim).movedim(dim, -1)
    return named, (arguments.number("unimix", unimix, low=0.0, high=1.0), 0.0)


def _rows(named: Mapping[str, Any], weight: Tensor | None) -> torch.Size:
    """The joint shape of the operands without their last dimension, that of the classes; and of the weight."""
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not torch.compiler.is_compiling() and not is_tracing() and _are_alike(list(tensors.values()), weight):
        return next(iter(tensors.values())).shape[:-1]
    of_rows = {name if name == "x" else f"{name} without classes": t[..., 0] for name, t in tensors.items()}
    if weight is not None:
        of_rows["weight"] = weight
    rows = arguments.broadcast(of_rows)
    known = {name: arguments.known_shape(t.shape)[-1] for name, t in tensors.items()}
    sizes = {name: size for name, size in known.items() if size != 1}
    if len(set(sizes.values())) > 1:
        listed = " and ".join(f"{size} of {name}" for name, size in sizes.items())
        raise ValueError(f"the numbers of classes differ: {listed}")
    return rows


def _are_alike(tensors: Sequence[Tensor], weight: Tensor | None) -> bool:
    """The usual case, which needs none of the views that messages are made of: nothing repeats but the labels."""
    first = tensors[0]
    rows, device, sizes = first.shape[:-1], first.device, {t.shape[-1] for t in tensors}
    return (
        len(sizes - {1}) <= 1
        and all(t.shape[:-1] == rows and t.device == device for t in tensors[1:])
        and (weight is None or (weight.shape == rows and weight.device == device))
    )


def _operands(
    named: Mapping[str, Any], weight: Tensor | None, rows: torch.Size, labels: bool = False
) -> tuple[Tensor | None, ...]:
    """As the operators take them: the whole joint shape, whose gradients torch adds up where it repeats an operand. ``labels``:
    x has one number for all classes."""
    classes = max(arguments.known_shape(value.shape)[-1] for value in named.values() if isinstance(value, Tensor))
    whole: list[Any] = []
    for name, value in named.items():
        if isinstance(value, Tensor):
            value = _expanded(value, (*rows, 1 if labels and name == "x" else classes))
        whole.append(value)
    if weight is not None:
        weight = _expanded(weight, rows).unsqueeze(-1)
    return operands_and_constants((*whole, 1.0 if weight is None else weight), (0.0, 0.0, 0.0))[0]


def _expanded(t: Tensor, shape: Sequence[int]) -> Tensor:
    """In float32 where it is repeated, so that the parts of its gradient are added up before they are rounded."""
    if arguments.same_shape(t.shape, shape):
        return t
    return (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).expand(shape)


def _sum(
    term: Term, named: Mapping[str, Any], constants: tuple[float, float], weight: Any, batch_dims: Any, reduction: Any
) -> Tensor:
    weight = arguments.weight(weight)
    rows = _rows(named, weight)
    spec = TermSpec(
        term.number,
        (*map(float, constants), 1.0),
        0,
        arguments.batch_dims(batch_dims, rows),
        arguments.reduction(reduction),
    )
    return autograd.term_sum(spec, _operands(named, weight, rows, labels=term is likelihoods.Categorical))


def _of_rows(
    values: Tensor, named: Mapping[str, Any], weight: Tensor | None, batch_dims: int, reduction: str
) -> Tensor:
    """Values of rows, of the data alone, reduced as a term is."""
    values = values.expand(_rows(named, weight))
    if weight is not None:
        values = torch.where(weight == 0, 0.0, values * weight)
    examples = autograd.sum_of_elements(values, batch_dims)
    return examples if reduction == "none" else examples.sum() if reduction == "sum" else examples.mean()


def _noise_of_torch(like: Tensor, samples: int | None, generator: torch.Generator | None) -> Tensor:
    """By an operator that a traced program runs anew at every call."""
    if samples is not None:
        like = like.unsqueeze(0).expand(samples, *(-1,) * like.dim())
    dtype = ops.value_dtype(like)
    if generator is None:
        uniform = torch.rand_like(like, dtype=dtype)
    else:
        uniform = torch.rand(like.shape, generator=generator, dtype=dtype, device=like.device)
    tiny = torch.finfo(dtype).tiny
    return -(-uniform.clamp(min=tiny, max=1 - torch.finfo(dtype).eps / 2).log()).log()
