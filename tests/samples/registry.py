"""Calls of the likelihoods' functions, from the registry alone: what takes its cases from here knows a new likelihood, too."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributions import constraints

import elbo_ext
from elbo_ext.likelihoods import LIKELIHOODS, Likelihood


def function_of(likelihood: Likelihood) -> Callable[..., Tensor]:
    return getattr(elbo_ext, f"{likelihood.name}_log_prob")


def tensor_inputs(likelihood: Likelihood) -> list[str]:
    """By the names of their first forms; the others are numbers alone."""
    return [name for name in likelihood.inputs if name not in likelihood.numbers]


def arguments_of(
    likelihood: Likelihood, *, x: Tensor, counts: Tensor, real: Tensor, positive: Tensor
) -> dict[str, Any]:
    """What the decoder gives in a form that takes any number, all else in one whose numbers are positive, if it has one."""
    arguments = {"x": counts if likelihood.support is constraints.nonnegative else x}
    if likelihood.support is constraints.nonnegative_integer:  # the number of a class
        arguments["x"] = counts[..., 0].long() % counts.shape[-1]
    for name in tensor_inputs(likelihood)[1:]:
        forms = likelihood.forms.get(name, (name,))
        of_reals = [form for form in forms if form not in likelihood.positive]
        of_positive = [form for form in forms if form in likelihood.positive]
        takes_reals = not of_positive or (name == likelihood.decoder and of_reals)
        arguments[(of_reals if takes_reals else of_positive)[0]] = real if takes_reals else positive
    return arguments


def calls_of_likelihoods(**numbers: Tensor) -> dict[str, tuple[Callable[..., Tensor], dict[str, Any]]]:
    """The function of each likelihood, by name, with :func:`arguments_of` these numbers."""
    return {
        f"{name}_log_prob": (function_of(likelihood), arguments_of(likelihood, **numbers))
        for name, likelihood in LIKELIHOODS.items()
    }
