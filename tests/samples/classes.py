"""The samples of functions over a dimension of classes, and the shapes of what they have."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .layouts import LAYOUTS, Layout, as_it_is
from .maker import Maker
from .sample import Sample, joint_shape
from .standard import REDUCTIONS
from .tolerances import SIZE_OF_PARTS

_X = dict[str, Any]

# Functions over a dimension of classes; which of their operands have none.
OVER_CLASSES = {
    "categorical_log_prob": ("x", "weight"),
    "multinomial_log_prob": ("weight",),
    "categorical_kl": ("weight",),
    "categorical_rsample_kl": (),
}


def elements_shape(function: str, arguments: dict[str, Any]) -> torch.Size:
    """The joint shape of what a function has a term for: for those over classes without their dimension."""
    if function not in OVER_CLASSES:
        return joint_shape(arguments)
    without, dim = OVER_CLASSES[function], arguments.get("dim", -1)
    dim = dim if dim < 0 else dim - arguments["logits"].dim()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    return joint_shape({name: t if name in without else t.select(dim, 0) for name, t in tensors.items()})


def classes_shape(function: str, arguments: dict[str, Any]) -> torch.Size:
    """The same with the dimension of the classes."""
    rows, logits, dim = list(elements_shape(function, arguments)), arguments["logits"], arguments.get("dim", -1)
    dim = dim if dim < 0 else dim - logits.dim()
    rows.insert(len(rows) + 1 + dim, logits.shape[dim])
    return torch.Size(rows)


SIZE_OF_PARTS |= {
    "categorical_log_prob": 3.0,  # l - max l and the logarithm of the sum
    "multinomial_log_prob": 3.0,  # x_c and N s_c
    "categorical_kl": 12.0,  # ln s_c - ln s'_c and its mean
    "categorical_rsample_kl": 16.0,  # the gradient of z and its mean, where few classes have most of the probability
}


def _classes(
    function: str, id: str, shape: tuple[int, ...], note: str, core: bool = False, layout: Layout = as_it_is,
    make: Callable[[Maker], _X] = lambda m: {}, **options: Any,
) -> Sample:  # fmt: skip
    """Logits of a shape, their layout, and what goes with them; ``make`` draws what differs."""
    dim = options.get("dim", -1) % len(shape)
    rows = (*shape[:dim], *shape[dim + 1 :])

    def build(m: Maker) -> _X:
        drawn: _X = {}
        if function == "categorical_log_prob":
            drawn["x"] = m.labels(shape[dim], *rows)
        elif function == "multinomial_log_prob":
            drawn["x"] = m.counts(*shape)
        drawn["logits"] = layout(m.normal(*shape))
        if function.startswith("categorical_") and function.endswith("kl"):
            drawn["prior_logits"] = m.normal(*shape)
        return {**drawn, **make(m), **options}

    prefix = function.removesuffix("_log_prob").replace("rsample_kl", "sample")
    return Sample(f"{prefix}-{id}", function, build, note, core)


def _over_classes(function: str) -> Iterator[Sample]:
    """The standard set of a function over classes."""

    def add(id: str, shape: tuple[int, ...], note: str, **case: Any) -> Sample:
        return _classes(function, id, shape, note, **case)

    samples, is_kl = function == "categorical_rsample_kl", function.endswith("kl")
    yield add("plain", (4, 6), "nothing special", core=True)
    yield add("dim", (4, 6, 3), "classes in the middle", core=True, dim=1)
    yield add("dim-first", (6, 4), "no batch but what is left", dim=0)
    yield add("0-dim", (6,), "one row", core=True, batch_dims=0)
    for dims, reduction in itertools.product(range(3), REDUCTIONS):
        note = "from one sum over everything to no sum at all"
        yield add(
            f"batch_dims-{dims}-{reduction}", (3, 5, 7), note, core=dims == 1, batch_dims=dims, reduction=reduction
        )
    for classes in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 127, 1024, 1025, 2047, 2048, 2049, 9000):
        yield add(f"classes-{classes}", (3, classes), "around the seams of registers and teams")
    for rows, classes in ((3000, 2), (700, 7), (300, 21), (140, 64)):
        yield add(f"rows-{rows}x{classes}", (rows, classes), "many rows", reduction="mean")
        yield add(f"strided-{rows}x{classes}", (2, classes, rows), "classes apart, rows together", dim=1)
    for name, layout in LAYOUTS.items():
        yield add(f"layout-{name}", (3, 4, 5, 17), "logits of one layout", layout=layout, core=name == "stepped")
        yield add(f"layout-dim-{name}", (3, 5, 4, 17), "the same, other classes", layout=layout, dim=1, reduction="sum")
    yield add(
        "over-samples", (3, 4, 6), "K samples", core=True, batch_dims=2, make=lambda m: _once(function, m, (4, 6))
    )
    yield add("shared", (5, 6), "logits of all examples", core=True, make=lambda m: dict(logits=m.normal(6)))
    for dtype in ("float32", "float64"):
        wide = getattr(torch, dtype)

        def mixed(m: Maker, wide: torch.dtype = wide) -> _X:
            drawn = dict(logits=m.normal(4, 70, dtype=wide))
            return drawn if is_kl else dict(drawn, weight=m.unit(4))

        note = "logits in a dtype of their own, next to a prior or a weight"
        yield add(f"mixed-{dtype}", (4, 70), note, core=dtype == "float32", make=mixed)
    yield add("empty-batch", (0, 4), "no example")
    yield add("empty-batch-sum", (0, 4), "an empty sum is 0", reduction="sum")
    yield add("empty-batch-mean", (0, 4), "an empty mean is NaN, as torch's", reduction="mean")
    yield add("empty-event", (3, 0, 4), "examples without elements have 0")
    if not samples:
        for name, weight in {
            "element": lambda m: m.unit(4, 3),
            "channel": lambda m: m.unit(3),
            "example": lambda m: m.unit(4, 1),
            "scalar": lambda m: m.unit(),
            "holes": lambda m: m.holes(4, 3),
            "zeros": lambda m: m.unit(4, 3) * 0,
            "negative": lambda m: m.normal(4, 3),
            "mask": lambda m: m.mask(4, 3),
            "widening": lambda m: m.unit(2, 4, 3),
        }.items():
            yield add(
                f"weight-{name}", (4, 3, 7), "weights and masks of the rows", core=name in ("element", "mask"),
                make=lambda m, weight=weight: dict(weight=weight(m)),
            )  # fmt: skip
    if is_kl:
        for classes in (2, 6, 33, 1025):
            yield add(
                f"unimix-{classes}", (3, classes), "mixed with the uniform distribution", unimix=0.01, core=classes == 6
            )
        yield add("unimix-mean", (40, 32), "the same, reduced", unimix=0.25, reduction="mean")
        yield add("uniform", (4, 6), "the uniform prior", core=True, make=lambda m: dict(prior_logits=None))
        yield add("prior-vector", (4, 6), "one prior for all", core=True, make=lambda m: dict(prior_logits=m.normal(6)))
    if samples:
        for count in (0, 1, 3):
            yield add(f"num_samples-{count}", (4, 3, 7), "several samples", core=count == 3, num_samples=count)
        yield add("num_samples-dim", (4, 7, 3), "the same, classes in the middle", num_samples=2, dim=1)
        yield add("num_samples-unimix", (4, 7), "the same, mixed", num_samples=5, unimix=0.01)
        yield add("many-draws", (40, 1500), "more noise than is made at once", unimix=0.01)


def _once(function: str, m: Maker, shape: tuple[int, ...]) -> _X:
    """The operand next to the logits without their first axis."""
    if function == "categorical_log_prob":
        return dict(x=m.labels(shape[-1], *shape[:-1]))
    return dict(x=m.counts(*shape)) if function == "multinomial_log_prob" else dict(prior_logits=m.normal(*shape))


CATEGORICAL = [
    *(sample for function in OVER_CLASSES for sample in _over_classes(function)),
    _classes(
        "categorical_log_prob", "ignored", (30, 6), "classes that are left out", core=True, ignore_index=2, reduction="mean"
    ),
    _classes(
        "categorical_log_prob", "many", (4, 300), "labels that take 64 bits", make=lambda m: dict(x=m.labels(300, 4))
    ),
    _classes(
        "multinomial_log_prob", "x-with-gradient", (4, 6), "counts of a floating-point dtype", core=True,
        make=lambda m: dict(x=m.counts(4, 6, dtype=m.dtype)),
    ),
    _classes("multinomial_log_prob", "coefficient", (4, 6), "with the constant of the data", core=True, coefficient=True),
    Sample(
        "elbo-categorical", "elbo_loss",
        lambda m: dict(recon=m.normal(4, 3, 7), x=m.labels(7, 4, 3), kl=m.unit(4), likelihood="categorical"),
        "logits of classes from the decoder",
    ),
]  # fmt: skip
