"""From the arguments of a public function to the operands of a call."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import arguments, autograd, validation
from ..arguments import PRIOR_SCALES, SCALES
from ..autograd import TermSpec
from ..likelihoods import GAUSSIAN_KL, Likelihood, Term

Scale = Tensor | float | None
# In functions that take a list of tensors in place of one (lists.py).
TensorOrList = TypeVar("TensorOrList", Tensor, list[Tensor])
OneOrEach = Scale | Sequence[Scale]
Generators = torch.Generator | Sequence[torch.Generator] | None

_UNIT_SCALE = (0.0, 0.0, 1.0, 1.0)  # sigma = 1 in each form, in the order of SCALES


class Forms(NamedTuple):
    """How the inputs of a term are given: their forms as one number (likelihoods.py), and the floor of each, 0 for none."""

    number: int
    floors: tuple[float, ...]


def operands_and_constants(
    values: Iterable[Any], floors: Iterable[float]
) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """Tensors, with None where a number stands, and the numbers, with its floor where a tensor stands."""
    tensors: list[Tensor | None] = []
    constants: list[float] = []
    eager = not torch.compiler.is_compiling()
    for value, floor in zip(values, floors, strict=True):
        is_tensor = isinstance(value, Tensor)
        # Dynamo refuses a Function that is given one tensor twice, a scale that posterior and prior share, say.
        if not eager and is_tensor and any(value is other for other in tensors):
            value = value.view_as(value)
        # A view such as z.conj().imag keeps its minus sign apart from the memory; in a list of operands torch leaves it there.
        if is_tensor and eager and value.is_neg():
            value = value.resolve_neg()
        tensors.append(value if is_tensor else None)
        constants.append(floor if is_tensor else value)
    return tuple(tensors), tuple(constants)


def posterior_and_prior(
    mu: Any, scales: Sequence[Any], prior_mu: Any, prior_scales: Sequence[Any]
) -> tuple[dict[str, Any], Forms]:
    """The operands of a KL by name, and their forms. The prior is N(0, 1), in the posterior's own form if that has a number
    for it, where nothing else is given."""
    name, scale, form, floor = arguments.scale(SCALES, scales)
    named = {"mu": arguments.tensor("mu", mu), name: scale}
    named["prior_mu"] = 0.0 if prior_mu is None else arguments.tensor_or_number("prior_mu", prior_mu)
    for given in prior_scales:
        if given is not None:
            name, scale, prior_form, prior_floor = arguments.scale(PRIOR_SCALES, prior_scales)
            named[name] = scale
            return named, Forms(GAUSSIAN_KL.pack((0, form, 0, prior_form)), (0.0, floor, 0.0, prior_floor))
    prior_form = form if form < len(_UNIT_SCALE) else 0
    named["prior_scale"] = _UNIT_SCALE[prior_form]
    return named, Forms(GAUSSIAN_KL.pack((0, form, 0, prior_form)), (0.0, floor, 0.0, 0.0))


def named_inputs(term: Term, given: Mapping[str, Any], shown: Mapping[str, str]) -> tuple[dict[str, Any], Forms]:
    """The inputs of a term, checked, by the names that errors call them; and their forms. ``given`` has a value or None for
    the forms of the inputs; ``shown`` their names where they differ."""
    named: dict[str, Any] = {}
    chosen, floors = [], []
    given = term.with_numbers(given)
    for name, forms, positive, floors_of_input in zip(
        term.inputs, term.forms_of_inputs, term.positive_of_inputs, term.floors_of_inputs, strict=True
    ):
        floor = 0.0
        if name in term.numbers:
            label, value, form = name, given[name], 0
        elif len(forms) == 1 and name not in term.defaults:
            label, form = shown.get(name, name), 0
            if name not in given:
                raise ValueError(f"{name} must be given for the {term.name} likelihood, got none")
            check = arguments.data_tensor if name == "x" else arguments.tensor_or_number
            value = check(label, given[name])
        else:
            every = (*forms, *floors_of_input)
            names = [shown.get(form, form) for form in every] if shown else every
            values, default = [given.get(form) for form in every], term.defaults.get(name)
            if floors_of_input:
                label, value, form, floor = arguments.scale(names, values, positive, default)
            else:
                label, value, form = arguments.one_form(names, values, positive, default)
        named[label] = value
        chosen.append(form)
        floors.append(floor)
    return named, Forms(term.pack(chosen), tuple(floors))


def term_call(
    term: Term, named: dict[str, Any], forms: Forms, weight: Any, batch_dims: Any, reduction: Any
) -> tuple[TermSpec, tuple[Tensor | None, ...], torch.Size]:
    """Spec, operands (weight last) and joint shape of a term whose inputs are checked one by one."""
    weight = arguments.weight(weight)
    shape = arguments.broadcast(named if weight is None else {**named, "weight": weight})
    validation.operands(term, named, forms.number, weight)
    operands, constants = operands_and_constants(
        (*named.values(), 1.0 if weight is None else weight), (*forms.floors, 0.0)
    )
    spec = TermSpec(
        term.number, constants, forms.number, arguments.batch_dims(batch_dims, shape), arguments.reduction(reduction)
    )
    return spec, operands, shape


def sum_of_term(
    term: Term, named: dict[str, Any], forms: Forms, weight: Any, batch_dims: Any, reduction: Any
) -> Tensor:
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
