"""The standard set: what every function is tried with, made from one row for each."""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

import elbo_ext

from .layouts import LAYOUTS, Layout, as_it_is
from .maker import Maker, number
from .sample import Sample
from .tolerances import SIZE_OF_PARTS

FORMS = ("logvar", "log_std", "std", "var", "rho")
FLOORS = ("min_std", "min_var")
REDUCTIONS = ("none", "sum", "mean")
_X = dict[str, Any]

# A scale of an operand of shape [4, 3, 2, 5], in every extent users have. None is a Python number.
SCALE_SHAPES = {"number": None, "scalar": (), "channel": (3, 1, 1), "example": (4, 1, 1, 1), "element": (4, 3, 2, 5)}

# Row lengths around every seam of the CPU kernels: a register (4 to 16 numbers), a short row (64: several rows share a
# tile), a tile (1024), a block (8192: the row is cut, its pieces are summed by several threads).
ROW_LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1023, 1024, 1025, 2049, 8191, 8192, 8193, 20_000)


@dataclass
class Case:
    """One case of the standard set, from which a function's row draws its operands, one after the other.

    ``shapes`` and ``dtypes`` are for the operands that differ from the others, by their number. A layout is for
    operands of the full shape.
    """

    m: Maker
    shape: tuple[int, ...]
    layout: Layout = as_it_is
    layout_beside: Layout = as_it_is
    form: str = "logvar"
    extent: tuple[int, ...] | str | None = None  # the scale's shape; "number" for a Python number
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[int, torch.dtype] = field(default_factory=dict)
    batch_dims: int = 1
    drawn: list[Any] = field(default_factory=list)

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...], beside: bool = False) -> Tensor:
        t = draw(*shape, dtype=self.dtypes.get(len(self.drawn)))
        if shape == self.shape:
            t = (self.layout_beside if beside else self.layout)(t)
        self.drawn.append(t)
        return t

    def draw(self, draw: Callable[..., Tensor], beside: bool = False) -> Tensor:
        """The next operand. ``beside``: contiguous where the others have a layout."""
        return self._draw(draw, self.shapes.get(len(self.drawn), self.shape), beside)

    def normal(self, beside: bool = False) -> Tensor:
        return self.draw(self.m.normal, beside)

    def unit(self, beside: bool = False) -> Tensor:
        return self.draw(self.m.unit, beside)

    def levels(self, beside: bool = False) -> Tensor:
        return self.draw(self.m.levels, beside)

    def scale(self, prefix: str = "", beside: bool = False) -> _X:
        """The next operand: a scale under the name of its form."""
        if self.extent == "number":
            self.drawn.append(number(self.form))
        else:
            shape = self.shapes.get(len(self.drawn), self.shape) if self.extent is None else self.extent
            self._draw(lambda *shape, dtype: self.m.scale(self.form, *shape, dtype=dtype), shape, beside)
        return {prefix + self.form: self.drawn[-1]}


Operands = Callable[[Case], _X]
WEIGHTS: dict[str, Callable[[Maker], Tensor]] = {
    "element": lambda m: m.unit(4, 3, 7),
    "channel": lambda m: m.unit(3, 1),
    "example": lambda m: m.unit(4, 1, 1),
    "scalar": lambda m: m.unit(),
    "holes": lambda m: m.holes(4, 3, 7),
    "zeros": lambda m: m.unit(4, 3, 7) * 0,
    "negative": lambda m: m.normal(4, 3, 7),
    "mask": lambda m: m.mask(4, 3, 7),
    "time-mask": lambda m: m.mask(4, 1, 7),
    "widening": lambda m: m.unit(2, 4, 3, 7),
}
CORE_OF_A_FUNCTION = (
    *("plain", "logvar-*", "std-*", "broadcast-*-channel", "x-over-samples", "crossed", "batch_dims-*-mean"),
    *("batch_dims-[13]-*", "weight-element", "weight-mask", "mixed-float32-*", "layout-channels_last"),
    *("layout-stepped", "empty-batch", "empty-event", "0-dim"),
)


def standard(
    prefix: str,
    function: str,
    operands: Operands,
    *,
    core: tuple[str, ...] = CORE_OF_A_FUNCTION,
    without: tuple[str, ...] = (),
    rows: int = 3,
    forms_of_scale: tuple[str, ...] = FORMS,
    size_of_parts: float = 1.0,
    **other_operands: Operands,
) -> list[Sample]:
    """The whole standard set of a function, from the one row that says how its operands are drawn::

        standard("gaussian", "gaussian_log_prob", lambda c: dict(x=c.normal(), mean=c.normal(beside=True), **c.scale()))

    ``forms_of_scale`` are those that the function takes for its scale, if it has one, the one by position first.
    ``core`` and ``without`` are patterns of ids: the part that is for expensive tests, and what the function has not.
    Which options it has its signature says. ``rows`` is the number of rows of the cases ``row-*``. ``size_of_parts``
    is how large the parts of an element are that cancel, if not 1: absolute tolerances are that many times as large
    (tolerances.py). A name of a group of cases takes other operands for that group alone.
    """
    if size_of_parts != 1.0:
        SIZE_OF_PARTS[function] = size_of_parts
    options_of_function = inspect.signature(getattr(elbo_ext, function)).parameters
    probe = Case(Maker(torch.float32, "cpu", 0), (1,), form=forms_of_scale[0])
    arguments = operands(probe)
    names = [next(name for name, value in arguments.items() if value is t) for t in probe.drawn]
    scale = next((i for i, name in enumerate(names) if name.endswith(probe.form)), None)
    samples: list[Sample] = []
    groups: set[str] = set()

    def add(id: str, group: str, note: str, shape: tuple[int, ...], options: _X | None = None, **case: Any) -> None:
        groups.add(group)
        options = {} if options is None else options
        if not options.keys() <= options_of_function.keys() or any(fnmatchcase(id, pattern) for pattern in without):
            return
        draw, dims = other_operands.get(group, operands), options.get("batch_dims", 1)
        if case.setdefault("form", forms_of_scale[0]) not in forms_of_scale:
            case["form"] = forms_of_scale[-1]

        def build(m: Maker) -> _X:
            result = draw(Case(m, shape, batch_dims=dims, **case))
            return {**result, **{name: value(m) if callable(value) else value for name, value in options.items()}}

        is_core = any(fnmatchcase(id, pattern) for pattern in core)
        samples.append(Sample(f"{prefix}-{id}", function, build, note, is_core))

    add("plain", "plain", "nothing special", (4, 6))
    if scale is not None:
        named = names[scale].removesuffix(probe.form)  # "" or "recon_"
        for form, (extent, shape) in itertools.product(forms_of_scale, SCALE_SHAPES.items()):
            note = "the scale in each form and extent: shared by a tile, or one per element"
            own = "number" if shape is None else shape
            add(f"{named}{form}-{extent}", "forms", note, (4, 3, 2, 5), form=form, extent=own)
    for i, name in enumerate(names):
        for extent in ("scalar", "channel", "example") if i != scale else ():
            note = "one operand is broadcast: its gradient is a sum"
            add(f"broadcast-{name}-{extent}", "broadcast", note, (4, 3, 2, 5), shapes={i: SCALE_SHAPES[extent]})
    for dims, reduction in itertools.product(range(4), REDUCTIONS):
        note = "from one sum over everything to no sum at all"
        options = dict(batch_dims=dims, reduction=reduction)
        add(f"batch_dims-{dims}-{reduction}", "batch_dims", note, (2, 3, 5), options)
    for name, weight in WEIGHTS.items():
        add(f"weight-{name}", "weight", "weights and masks in every extent", (4, 3, 7), dict(weight=weight))
    for (i, name), dtype in itertools.product(enumerate(names), ("float32", "float64")):
        note = "one operand in a dtype of its own"
        add(f"mixed-{dtype}-{name}", "mixed", note, (4, 70), dtypes={i: getattr(torch, dtype)})
    for name, layout in LAYOUTS.items():
        note = "some operands of one layout, the others contiguous"
        add(f"layout-{name}", "layout", note, (3, 4, 5, 17), layout=layout)
        note = "one dense permuted layout: walked in memory order, channel scale"
        both = dict(layout=layout, layout_beside=layout, extent=(4, 1, 1))
        add(f"layout-all-{name}", "layout_all", note, (3, 4, 5, 17), dict(reduction="sum"), **both)
    for n in ROW_LENGTHS:
        add(f"row-{n}", "row", "row lengths around the seams of registers, tiles and blocks", (rows, n))
        options = dict(batch_dims=1, reduction="sum")
        add(f"sum-{n}", "sum", "one long sum, scalar scale", (n,), options, form="log_std", extent=())
    for shape in ((3000, 1), (1500, 7), (1025, 8), (300, 63), (140, 64), (40, 1000)):
        note = "many short rows: several in a tile, several tiles in a block"
        add(f"rows-{shape[0]}x{shape[1]}", "rows", note, shape, extent=shape[1:])
    for (i, name), reduction in itertools.product(enumerate(names), ("none", "mean")):
        note = "one operand is shared by all examples, as a dispersion of each gene is: its gradient is a sum over them"
        add(f"shared-{name}-{reduction}", "shared", note, (37, 2, 132), dict(reduction=reduction), shapes={i: (2, 132)})
    note = "one operand [B, D] against K = 3 of the others: its gradient is summed over K"
    add(f"{names[0]}-over-samples", "over_samples", note, (3, 4, 6), dict(batch_dims=2), shapes={0: (4, 6)})
    note = "no operand has the joint shape: every gradient is summed"
    shapes = {0: (4, 1, 5, 1), 1: (3, 1, 6), **dict.fromkeys(range(2, len(names)), (4, 1, 1, 6))}
    add("crossed", "crossed", note, (4, 3, 5, 6), dict(batch_dims=2), shapes=shapes, extent=(4, 1, 1, 6))
    add("empty-batch", "empty", "no example", (0, 4), extent=(4,))
    add("empty-batch-sum", "empty", "an empty sum is 0", (0, 4), dict(reduction="sum"))
    add("empty-batch-mean", "empty", "an empty mean is NaN, as torch's", (0, 4), dict(reduction="mean"))
    add("empty-event", "empty", "examples without elements have 0", (3, 0), extent=())
    add("empty-event-mean", "empty", "and mean 0", (3, 0), dict(reduction="mean"), extent=(3, 1))
    add("empty-elementwise", "empty", "no element to return", (3, 0), dict(batch_dims=2))
    add("0-dim", "dims", "one number", (), dict(batch_dims=0))
    add("1-dim", "dims", "one example", (7,), dict(batch_dims=0), form="std")
    add("1-dim-batch", "dims", "elements are examples", (7,), form="std")
    unknown = other_operands.keys() - groups
    assert not unknown, f"there is no group of cases {unknown}, but {groups}"
    return samples
