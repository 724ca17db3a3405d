"""The registry: all that the package knows of each likelihood, said once; everything else reads it.

A likelihood is passed to :func:`elbo_ext.elbo_loss` by its name, or, where it has parameters that the decoder does not
give, as one of the objects here called with them::

    elbo_loss(recon, x, kl=kl, likelihood="laplace")
    elbo_loss(recon, x, kl=kl, likelihood=likelihoods.Laplace(scale=0.5))
    elbo_loss(recon, x, kl=kl, likelihood=likelihoods.NegativeBinomial(theta=theta, recon="log_mean"))

Inputs and forms are declared here and by the C++ term of the same name (``kSignature``, csrc/terms); a test holds the two
against each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from . import formulas
from .ops import TERM_NUMBERS

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedGaussian",
    "DiscretizedLogistic",
    "Gaussian",
    "Laplace",
    "Likelihood",
    "LikelihoodWithParameters",
    "Multinomial",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "by_name",
]

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
        floors: the names of the floors, Python numbers, that an input of several forms may have with its form.
        positive: forms whose Python numbers have to be above 0.
        defaults: numbers for inputs that need not be given.
        masked: for each input a number that the formula bears and that stands in for an element of weight 0.
        numbers: inputs that are never tensors, but numbers made of ``options``, which are arguments with these defaults, by
            ``numbers_from``, which checks them and returns the numbers by name.
        over_classes: whether it is a sum over the last dimension of its inputs, that of the classes, and the constants of
            its inputs are options of the formula (csrc/terms/categorical.h).
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
    numbers: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    numbers_from: Callable[..., Mapping[str, float]] = dict
    over_classes: bool = False
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

    def with_numbers(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments by name, and the numbers that their options stand for."""
        if not self.numbers:
            return given
        options = {name: given.get(name, default) for name, default in self.options.items()}
        return {**given, **self.numbers_from(**options)}

    def in_torch(
        self, forms: int, inputs: Sequence[Tensor], weight: Tensor | None, constants: Sequence[float]
    ) -> Tensor:
        """The formula, times the weight. ``constants`` are those of the inputs, of which the floors are taken."""
        if self.over_classes:
            return formulas.weighted_rows(
                lambda *tensors: self.formula(*tensors, constants[0]), inputs, self.masked, weight
            )
        how = (*self.form_names(forms), *self.floors_in(forms, constants))
        return formulas.weighted(lambda *tensors: self.formula(*tensors, *how), inputs, self.masked, weight)


@dataclass(frozen=True, eq=False)
class Likelihood(Term):
    """ln p(x | parameters) of one element. Call it with parameters that the decoder does not give.

    Attributes:
        decoder: the input that ``recon`` stands for in :func:`elbo_ext.elbo_loss`.
        support: where x may be, which only :class:`elbo_ext.validate_values` looks at.
    """

    decoder: str = ""
    support: constraints.Constraint = constraints.real

    def __call__(self, *, recon: str = "", **parameters: Any) -> "LikelihoodWithParameters":
        return LikelihoodWithParameters(self, parameters, recon)

    @property
    def alone(self) -> "LikelihoodWithParameters":
        """Without parameters: what a name stands for. Made once, though not inside of code that is compiled."""
        alone: LikelihoodWithParameters | None = getattr(self, "_alone", None)
        if alone is None:
            alone = self()
            if not torch.compiler.is_compiling():
                object.__setattr__(self, "_alone", alone)
        return alone

    def __fx_create_arg__(self, tracer: Any) -> Any:
        return self.alone.__fx_create_arg__(tracer)

    @property
    def class_name(self) -> str:
        """As this module calls it."""
        return self.name.title().replace("_", "")

    def __repr__(self) -> str:
        return f"likelihoods.{self.class_name}"


@dataclass(frozen=True, eq=False)
class LikelihoodWithParameters:
    """A likelihood and the parameters that the decoder does not give: tensors that broadcast to ``recon``, or numbers.

    Attributes:
        recon: what the decoder gives, one of the forms of the input ``likelihood.decoder``; the first by default.
    """

    likelihood: Likelihood
    parameters: Mapping[str, Any]
    recon: str = ""

    def __post_init__(self) -> None:
        from . import arguments  # which imports this module

        term = self.likelihood
        forms = term.forms.get(term.decoder, (term.decoder,))
        if self.recon not in ("", *forms):
            raise ValueError(f"recon must be {' or '.join(map(repr, forms))} for {term!r}, got {self.recon!r}")
        object.__setattr__(self, "recon", self.recon or forms[0])
        inputs = [
            names
            for names, input in zip(term.forms_of_inputs, term.inputs, strict=True)
            if input not in ("x", term.decoder, *term.numbers)
        ]
        floors = [floor for names in term.floors_of_inputs for floor in names]
        known = [*(form for names in inputs for form in names), *floors, *term.options]
        for name, value in self.parameters.items():
            if name not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no parameters"
                raise TypeError(f"{name} is no parameter of the {term.name} likelihood, which {takes}")
            if name in floors or name in term.options:
                continue
            is_number = arguments.is_number(value)
            if not is_number and not hasattr(value, "__torch_function__"):  # a tensor, or what stands for one
                raise TypeError(f"{name} must be a torch.Tensor or a number, got {type(value).__name__}")
            if is_number and name in term.positive and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for names in inputs:
            given = [name for name in names if name in self.parameters]
            if len(given) > 1:
                raise ValueError(f"exactly one of {', '.join(names)} must be given, got {' and '.join(given)}")
        for names, of_input in zip(term.forms_of_inputs, term.floors_of_inputs, strict=True):
            if any(self.parameters.get(floor) is not None for floor in of_input):
                every = (*names, *of_input)
                arguments.scale(every, [self.parameters.get(name) for name in every])
        term.with_numbers(self.parameters)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """In a graph of torch.fx: made anew from its parameters, which may be values of the graph."""
        parameters = {name: tracer.create_arg(value) for name, value in self.parameters.items()}
        return tracer.create_node("call_function", with_parameters, (self.likelihood.name, self.recon), parameters)

    def __repr__(self) -> str:
        shown = (
            f"{k}={f'tensor of shape {tuple(v.shape)}' if isinstance(v, Tensor) else v}"
            for k, v in self.parameters.items()
        )
        return f"{self.likelihood!r}({', '.join(shown)})"


def with_parameters(name: str, recon: str, **parameters: Any) -> LikelihoodWithParameters:
    """The likelihood of that name with its parameters: the object as a graph of torch.fx calls it."""
    return LIKELIHOODS[name](recon=recon, **parameters)


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

Bernoulli = _register(
    "bernoulli",
    inputs=("x", "logits"),
    decoder="logits",
    support=constraints.unit_interval,
    formula=formulas.bernoulli,
)

Laplace = _register(
    "laplace",
    inputs=("x", "mean", "log_scale"),
    decoder="mean",
    forms={"log_scale": ("log_scale", "scale")},
    positive=("scale",),
    defaults={"log_scale": 0.0},
    formula=formulas.laplace,
)

Poisson = _register(
    "poisson",
    inputs=("x", "log_rate"),
    decoder="log_rate",
    forms={"log_rate": ("log_rate", "rate")},
    positive=("rate",),
    support=constraints.nonnegative,
    formula=formulas.poisson,
)

_MEANS = ("mean", "log_mean", "logits")
_THETAS = ("theta", "log_theta")

NegativeBinomial = _register(
    "negative_binomial",
    inputs=("x", "mean", "theta"),
    decoder="mean",
    forms={"mean": _MEANS, "theta": _THETAS},
    positive=("mean", "theta"),
    support=constraints.nonnegative,
    formula=formulas.negative_binomial,
)

ZeroInflatedNegativeBinomial = _register(
    "zero_inflated_negative_binomial",
    inputs=("x", "mean", "theta", "gate_logits"),
    decoder="mean",
    forms={"mean": _MEANS, "theta": _THETAS},
    positive=("mean", "theta"),
    support=constraints.nonnegative,
    formula=formulas.zero_inflated_negative_binomial,
)

StudentT = _register(
    "student_t",
    inputs=("x", "df", "mean", "log_scale"),
    decoder="mean",
    forms={"df": ("df", "log_df"), "log_scale": ("log_scale", "scale")},
    positive=("df", "scale"),
    defaults={"mean": 0.0, "log_scale": 0.0},
    formula=formulas.student_t,
)

ContinuousBernoulli = _register(
    "continuous_bernoulli",
    inputs=("x", "logits"),
    decoder="logits",
    support=constraints.unit_interval,
    formula=formulas.continuous_bernoulli,
)


def _bins(**options: Any) -> Mapping[str, float]:
    from . import arguments  # which reads this registry

    return arguments.bins(**options)


_BINS: dict[str, Any] = dict(
    numbers=("low", "high", "half_bin"),
    options={"low": -1.0, "high": 1.0, "bins": 256, "width": None},
    numbers_from=_bins,
    masked=(0.0, 0.0, 1.0, -1.0, 1.0, 0.5),
)

DiscretizedLogistic = _register(
    "discretized_logistic",
    inputs=("x", "mean", "log_scale", "low", "high", "half_bin"),
    decoder="mean",
    forms={"log_scale": ("log_scale", "scale")},
    positive=("scale",),
    defaults={"log_scale": 0.0},
    formula=formulas.discretized_logistic,
    **_BINS,
)

DiscretizedGaussian = _register(
    "discretized_gaussian",
    inputs=("x", "mean", "logvar", "low", "high", "half_bin"),
    decoder="mean",
    forms={"logvar": _SCALES},
    floors={"logvar": _FLOORS},
    positive=("std", "var"),
    defaults={"logvar": 0.0},
    formula=formulas.discretized_gaussian,
    **_BINS,
)

Categorical = _register(
    "categorical",
    inputs=("x", "logits"),
    decoder="logits",
    options={"dim": -1, "ignore_index": -100},
    masked=(0, 1.0),
    support=constraints.nonnegative_integer,
    over_classes=True,
    formula=formulas.categorical,
)

Multinomial = _register(
    "multinomial",
    inputs=("x", "logits"),
    decoder="logits",
    options={"dim": -1, "coefficient": False},
    support=constraints.nonnegative,
    over_classes=True,
    formula=formulas.multinomial,
)

# No likelihoods, but terms like them.
GAUSSIAN_KL = Term(
    "gaussian_kl",
    inputs=("mu", "logvar", "prior_mu", "prior_logvar"),
    forms={"logvar": _SCALES, "prior_logvar": tuple(f"prior_{name}" for name in _SCALES)},
    floors={"logvar": _FLOORS, "prior_logvar": tuple(f"prior_{name}" for name in _FLOORS)},
    positive=("std", "var", "prior_std", "prior_var"),
    formula=formulas.gaussian_kl,
)

CATEGORICAL_KL = Term(
    "categorical_kl",
    inputs=("logits", "prior_logits"),
    over_classes=True,
    formula=formulas.categorical_kl,
)

TERMS = {**LIKELIHOODS, GAUSSIAN_KL.name: GAUSSIAN_KL, CATEGORICAL_KL.name: CATEGORICAL_KL}
TERMS_BY_NUMBER = {term.number: term for term in TERMS.values()}


def by_name(value: Any) -> LikelihoodWithParameters:
    """The likelihood that the argument of that name stands for: a name, a likelihood, or one with parameters."""
    if isinstance(value, LikelihoodWithParameters):
        return value
    if isinstance(value, Likelihood):
        return value.alone
    if not isinstance(value, str) or value not in LIKELIHOODS:
        names = list(map(repr, LIKELIHOODS))
        raise ValueError(
            f"likelihood must be {', '.join(names[:-1])} or {names[-1]}, or an object of elbo_ext.likelihoods, got {value!r}"
        )
    return LIKELIHOODS[value].alone
