"""From the arguments of a public function to the operands of a call."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments, autograd, validation
from ..arguments import PRIOR_SCALES, SCALES
from ..autograd import TermSpec
from ..likelihoods import GAUSSIAN_KL, Likelihood, Term

Scale = Tensor | float | None
Generators = torch.Generator | Sequence[torch.Generator] | None

_UNIT_SCALE = (0.0, 0.0, 1.0, 1.0)  # sigma = 1 in each form, in the order of SCALES


def operands_and_constants(values: Iterable[Any]) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
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


def posterior_and_prior(
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


def named_inputs(term: Term, given: Mapping[str, Any], shown: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """The inputs of a term, checked, by the names that errors call them; and their forms. ``given`` has a value or None for
    the forms of the inputs; ``shown`` their names where they differ."""
    named: dict[str, Any] = {}
    chosen = []
    given = term.with_numbers(given)
    for name, forms, positive in zip(term.inputs, term.forms_of_inputs, term.positive_of_inputs, strict=True):
        if name in term.numbers:
            label, value, form = name, given[name], 0
        elif len(forms) == 1 and name not in term.defaults:
            label, form = shown.get(name, name), 0
            if name not in given:
                raise ValueError(f"{name} must be given for the {term.name} likelihood, got none")
            check = arguments.data if name == "x" else arguments.tensor_or_number
            value = check(label, given[name])
        else:
            names = [shown.get(form, form) for form in forms] if shown else forms
            values = [given.get(form) for form in forms]
            label, value, form = arguments.one_form(names, values, positive, term.defaults.get(name))
        named[label] = value
        chosen.append(form)
    return named, term.pack(chosen)


def term_call(
    term: Term, named: dict[str, Any], forms: int, weight: Any, batch_dims: Any, reduction: Any
) -> tuple[TermSpec, tuple[Tensor | None, ...], torch.Size]:
    """Spec, operands (weight last) and joint shape of a term whose inputs are checked one by one."""
    weight = arguments.weight(weight)
    shape = arguments.broadcast(named if weight is None else {**named, "weight": weight})
    validation.operands(term, named, forms, weight)
    operands, constants = operands_and_constants((*named.values(), 1.0 if weight is None else weight))
    spec = TermSpec(
        term.number, constants, forms, arguments.batch_dims(batch_dims, shape), arguments.reduction(reduction)
    )
    return spec, operands, shape


def sum_of_term(term: Term, named: dict[str, Any], forms: int, weight: Any, batch_dims: Any, reduction: Any) -> Tensor:
    spec, operands, _ = term_call(term, named, forms, weight, batch_dims, reduction)
    return autograd.term_sum(spec, operands)


def sum_of_log_prob(
    likelihood: Likelihood, given: Mapping[str, Any], weight: Any, batch_dims: Any, reduction: Any
) -> Tensor:
    """What every ``..._log_prob`` does: ``given`` has its arguments by name."""
    return sum_of_term(likelihood, *named_inputs(likelihood, given, {}), weight, batch_dims, reduction)


def no_use_beside(what: str, given: Mapping[str, Any]) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        verb = "has" if len(names) == 1 else "have"
        raise ValueError(f"{' and '.join(names)} {verb} no use beside {what}, which is computed already")
