"""The registry: all that the package knows of each likelihood, said once; everything else reads it.

A likelihood is passed to :func:`elbo_ext.elbo_loss` by its name, or, where it has parameters that the decoder does not
give, as one of the objects here called with them::

    elbo_loss(recon, x, kl=kl, likelihood="laplace")
    elbo_loss(recon, x, kl=kl, likelihood=likelihoods.Laplace(scale=0.5))

Inputs and forms are declared here and by the C++ term of the same name (``kSignature``, csrc/terms); a test holds the two
against each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import formulas
from .ops import TERM_NUMBERS

__all__ = ["Bernoulli", "Gaussian", "Laplace", "Likelihood", "LikelihoodWithParameters", "by_name"]

_SCALES = ("logvar", "log_std", "std", "var", "rho")
_FLOORS = ("min_std", "min_var")


@dataclass(frozen=True, eq=False)
class Term:
    """A formula of one element, summed by the kernels.

    Attributes:
        name: of the C++ term and of the public function, ``name`` + ``_log_prob`` for a likelihood.
        inputs: in the order of the formula, each under the name of its first form.
        formula: in torch operations (formulas.py).
        forms: the names of the forms of each input that has several, the first one included.
        floors: the names of the floors, Python numbers, that an input of several forms may have beside its form.
        positive: forms whose Python numbers have to be above 0.
        defaults: numbers for inputs that need not be given.
        masked: for each input a number that the formula bears and that stands in for an element of weight 0.
        number: in the operator schema.
        forms_of_inputs: the names of the forms of each input.
        floors_of_inputs: the names of the floors of each input.
        numbered_forms: the names of all forms of each input, by their numbers: without a floor, with the first one
            ("rho+min_std"), and so on.
        positive_of_inputs: the numbers of those whose Python numbers have to be above 0.
    """

    name: str
    inputs: tuple[str, ...]
    formula: Callable[..., Tensor]
    forms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    floors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    masked: tuple[float, ...] = ()
    number: int = field(init=False)
    forms_of_inputs: tuple[tuple[str, ...], ...] = field(init=False)
    floors_of_inputs: tuple[tuple[str, ...], ...] = field(init=False)
    numbered_forms: tuple[tuple[str, ...], ...] = field(init=False)
    positive_of_inputs: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", TERM_NUMBERS[self.name])
        object.__setattr__(self, "masked", self.masked or (1.0,) * len(self.inputs))
        forms = tuple(self.forms.get(name, (name,)) for name in self.inputs)
        floors = tuple(self.floors.get(name, ()) for name in self.inputs)
        object.__setattr__(self, "forms_of_inputs", forms)
        object.__setattr__(self, "floors_of_inputs", floors)
        object.__setattr__(self, "numbered_forms", tuple(
            (*names, *(f"{name}+{floor}" for floor in of_input for name in names))
            for names, of_input in zip(forms, floors, strict=True)))  # fmt: skip
        object.__setattr__(self, "positive_of_inputs", tuple(
            tuple(k for k, form in enumerate(names) if form in self.positive) for names in forms))  # fmt: skip

    def pack(self, chosen: Sequence[int]) -> int:
        """The forms of all inputs as one number, four bits each (csrc/terms/forms.h)."""
        return sum(form << 4 * k for k, form in enumerate(chosen))

    def form_names(self, forms: int) -> list[str]:
        """Of the inputs that have several forms, which is what the formula takes after its inputs."""
        return [names[forms >> 4 * k & 15] for k, names in enumerate(self.numbered_forms) if len(names) > 1]

    def floors_in(self, forms: int, constants: Sequence[float]) -> list[float]:
        """Of the inputs that may have one, 0 where it has none: what the formula takes last. ``constants`` has one for each
        input."""
        return [
            constants[k] if (forms >> 4 * k & 15) >= len(self.forms_of_inputs[k]) else 0.0
            for k, names in enumerate(self.floors_of_inputs)
            if names
        ]

    def in_torch(
        self, forms: int, inputs: Sequence[Tensor], weight: Tensor | None, constants: Sequence[float]
    ) -> Tensor:
        """The formula, times the weight. ``constants`` are those of the inputs, of which the floors are taken."""
        how = (*self.form_names(forms), *self.floors_in(forms, constants))
        return formulas.weighted(lambda *tensors: self.formula(*tensors, *how), inputs, self.masked, weight)


@dataclass(frozen=True, eq=False)
class Likelihood(Term):
    """ln p(x | parameters) of one element. Call it with parameters that the decoder does not give.

    Attributes:
        decoder: the input that ``recon`` stands for in :func:`elbo_ext.elbo_loss`.
    """

    decoder: str = ""

    def __call__(self, **parameters: Any) -> "LikelihoodWithParameters":
        return LikelihoodWithParameters(self, parameters)

    @property
    def class_name(self) -> str:
        """As this module calls it."""
        return self.name.title().replace("_", "")

    def __repr__(self) -> str:
        return f"likelihoods.{self.class_name}"


@dataclass(frozen=True, eq=False)
class LikelihoodWithParameters:
    """A likelihood and the parameters that the decoder does not give: tensors that broadcast to ``recon``, or numbers."""

    likelihood: Likelihood
    parameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        term = self.likelihood
        inputs = [
            names
            for names, input in zip(term.forms_of_inputs, term.inputs, strict=True)
            if input not in ("x", term.decoder)
        ]
        floors = [floor for names in term.floors_of_inputs for floor in names]
        known = [*(form for names in inputs for form in names), *floors]
        for name, value in self.parameters.items():
            if name not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no parameters"
                raise TypeError(f"{name} is no parameter of the {term.name} likelihood, which {takes}")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name in floors:
                continue  # checked with the scale that it is the floor of
            if not is_number and not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor or a number, got {type(value).__name__}")
            if is_number and name in term.positive and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for names in inputs:
            given = [name for name in names if name in self.parameters]
            if len(given) > 1:
                raise ValueError(f"exactly one of {', '.join(names)} must be given, got {' and '.join(given)}")

    def __repr__(self) -> str:
        shown = (
            f"{k}={f'tensor of shape {tuple(v.shape)}' if isinstance(v, Tensor) else v}"
            for k, v in self.parameters.items()
        )
        return f"{self.likelihood!r}({', '.join(shown)})"


LIKELIHOODS: dict[str, Likelihood] = {}


def _register(name: str, **entry: Any) -> Likelihood:
    LIKELIHOODS[name] = Likelihood(name, **entry)
    return LIKELIHOODS[name]


Gaussian = _register(
    "gaussian",
    inputs=("x", "mean", "logvar"),
    decoder="mean",
    forms={"logvar": _SCALES},
    floors={"logvar": _FLOORS},
    positive=("std", "var"),
    defaults={"logvar": 0.0},
    formula=formulas.gaussian,
)

Bernoulli = _register("bernoulli", inputs=("x", "logits"), decoder="logits", formula=formulas.bernoulli)

Laplace = _register(
    "laplace",
    inputs=("x", "mean", "log_scale"),
    decoder="mean",
    forms={"log_scale": ("log_scale", "scale")},
    positive=("scale",),
    defaults={"log_scale": 0.0},
    formula=formulas.laplace,
)

# Not a likelihood, but a term like them.
GAUSSIAN_KL = Term(
    "gaussian_kl",
    inputs=("mu", "logvar", "prior_mu", "prior_logvar"),
    forms={"logvar": _SCALES, "prior_logvar": tuple(f"prior_{name}" for name in _SCALES)},
    floors={"logvar": _FLOORS, "prior_logvar": tuple(f"prior_{name}" for name in _FLOORS)},
    positive=("std", "var", "prior_std", "prior_var"),
    formula=formulas.gaussian_kl,
)

TERMS = {**LIKELIHOODS, GAUSSIAN_KL.name: GAUSSIAN_KL}
TERMS_BY_NUMBER = {term.number: term for term in TERMS.values()}


def by_name(value: Any) -> LikelihoodWithParameters:
    """The likelihood that the argument of that name stands for: a name, a likelihood, or one with parameters."""
    if isinstance(value, LikelihoodWithParameters):
        return value
    if isinstance(value, Likelihood):
        return value()
    if not isinstance(value, str) or value not in LIKELIHOODS:
        names = list(map(repr, LIKELIHOODS))
        raise ValueError(
            f"likelihood must be {', '.join(names[:-1])} or {names[-1]}, or an object of elbo_ext.likelihoods, got {value!r}"
        )
    return LIKELIHOODS[value]()
