"""The sample inputs of every test: values, gradients, operators, compilation. One table: :data:`STANDARD` has one row
per function, from which :func:`standard` makes what all are tried with; :data:`BY_HAND` are the cases of one alone.

``sample.make(dtype, device)`` returns the named arguments of the public function ``sample.function``, the same numbers
every time; ``differentiable`` names those that have gradients. :data:`SAMPLES` is everything, :data:`CORE` the part for
expensive tests: small, and with each function, operand and option at least once.
"""

from .classes import OVER_CLASSES, classes_shape, elements_shape
from .layouts import LAYOUTS
from .maker import Maker, from_logvar
from .sample import (
    DTYPES,
    NEEDS_GPU,
    Sample,
    devices,
    differentiable,
    in_float64,
    joint_shape,
    run,
    seeds_of_the_cpu,
)
from .standard import FLOORS, FORMS, REDUCTIONS, ROW_LENGTHS, WEIGHTS, Case, standard
from .table import CORE, SAMPLES, STANDARD, parametrize
from .tolerances import NOISE_ERROR, Tolerance, computed_in, rounding, tolerance_of

__all__ = [
    "CORE",
    "DTYPES",
    "FLOORS",
    "FORMS",
    "LAYOUTS",
    "NEEDS_GPU",
    "NOISE_ERROR",
    "OVER_CLASSES",
    "REDUCTIONS",
    "ROW_LENGTHS",
    "SAMPLES",
    "STANDARD",
    "WEIGHTS",
    "Case",
    "Maker",
    "Sample",
    "Tolerance",
    "classes_shape",
    "computed_in",
    "devices",
    "differentiable",
    "elements_shape",
    "from_logvar",
    "in_float64",
    "joint_shape",
    "parametrize",
    "rounding",
    "run",
    "seeds_of_the_cpu",
    "standard",
    "tolerance_of",
]
