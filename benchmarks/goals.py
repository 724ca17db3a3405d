"""What the package is to reach, and what a run measured of it. The only place where the goals stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .cases import BOTH
from .contenders import COPY, EMPTY, SHIPPED
from .rows import DEVICE, OURS, WALL, Clock, Row, groups
from .tables import table
from .training import WORK as TRAINING

Select = Callable[[Row], bool]
MEGABYTE, GIGABYTE = 1 << 20, 1 << 30


def _step(row: Row) -> bool:
    return row.work == "step" and row.variance == "per-element"


def _large_step(dtype: str) -> Select:
    return lambda row: _step(row) and row.array_bytes >= 3 * MEGABYTE and row.dtype == dtype


def _huge_step(row: Row) -> bool:
    return _step(row) and row.array_bytes >= GIGABYTE


def _case(name: str) -> Select:
    return lambda row: row.case == name


def _training(model: str) -> Select:
    return lambda row: row.work == TRAINING and row.case.startswith(f"{model}-")


def _sampling(row: Row) -> bool:
    return row.work == "sampling" and row.elements >= 1 << 14


def _any(row: Row) -> bool:
    return row.array_bytes >= 3 * MEGABYTE


# From our row, and the rows that took turns with it by contender, to a number; None if something is missing.
Measure = Callable[[Row, dict[str, Row]], float | None]


def _times(other: str, clock: Clock = WALL) -> Measure:
    """Our time as a multiple of another's."""

    def multiple(ours: Row, others: dict[str, Row]) -> float | None:
        mine, theirs = clock(ours), clock(others[other]) if other in others else None
        return mine.median_us / theirs.median_us if mine and theirs else None

    return multiple


def _faster_than(other: str, clock: Clock = WALL) -> Measure:
    def speedup(ours: Row, others: dict[str, Row]) -> float | None:
        multiple = _times(other, clock)(ours, others)
        return 1 / multiple if multiple else None

    return speedup


def _share_of_bandwidth(ours: Row, others: dict[str, Row]) -> float | None:
    speedup = _faster_than(COPY)(ours, others)
    return 100 * speedup if speedup else None


def _launches(ours: Row, others: dict[str, Row]) -> float | None:
    return ours.launches


def _extra_memory(ours: Row, others: dict[str, Row]) -> float | None:
    eager = others.get("eager")
    return 100 * ours.peak_extra_bytes / eager.peak_extra_bytes if eager and eager.peak_extra_bytes else None


@dataclass(frozen=True)
class Goal:
    """A bound on a measure, over all cases that are selected on one type of device, forward + backward."""

    what: str
    device: str
    select: Select
    measure: Measure
    bound: float
    form: str
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def text(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.form.format(self.bound)}"


def _speed(
    what: str, device: str, select: Select, eager: float, compiled: float, clock: Clock = WALL
) -> tuple[Goal, Goal]:
    return (
        Goal(f"{what}: faster than eager", device, select, _faster_than("eager", clock), eager, "{:.3g} x"),
        Goal(
            f"{what}: faster than torch.compile", device, select, _faster_than("eager-compiled", clock), compiled,
            "{:.3g} x",
        ),
    )  # fmt: skip


_LARGE = "step, variance per element, arrays of 3 MB and more"
_HUGE = "step, variance per element, arrays of 1 GB and more"


def _large(dtype: str) -> tuple[Goal, ...]:
    what = f"{_LARGE}, {dtype}"
    copy = Goal(f"{what}: time of a copy", "cpu", _large_step(dtype), _times(COPY), 1.3, "{:.3g} x", at_least=False)
    return *_speed(what, "cpu", _large_step(dtype), 10, 4), copy


_MEMORY = "memory beyond inputs, gradients and z, arrays of 3 MB and more, of eager's"

GOALS: tuple[Goal, ...] = (
    *(goal for dtype in ("float32", "bfloat16") for goal in _large(dtype)),
    *_speed("step, 128 x 784, latent 20", "cpu", _case("mlp"), 5, 5),
    *_speed("step, 2 x 16, latent 4", "cpu", _case("tiny"), 3, 3),
    *_speed("sampling, 16 k elements and more", "cpu", _sampling, 6, 20),
    Goal(_MEMORY, "cpu", _any, _extra_memory, 1, "{:.3g} %", at_least=False),
    Goal("training step of scVI's VAE: faster than as shipped", "cpu", _training("scvi"), _faster_than(SHIPPED), 3, "{:.3g} x"),
    Goal(
        "training step of a Bayesian network: faster than as shipped", "cpu", _training("bnn"), _faster_than(SHIPPED), 3,
        "{:.3g} x",
    ),
    *_speed(_HUGE, "cuda", _huge_step, 6, 1.5),
    Goal(f"{_HUGE}: of a copy's bandwidth", "cuda", _huge_step, _share_of_bandwidth, 90, "{:.3g} %"),
    *_speed("step, 128 x 784, latent 20", "cuda", _case("mlp"), 4, 2),
    Goal(
        "step, 2 x 16, latent 4: time of two empty functions", "cuda", _case("tiny"), _times(EMPTY), 2, "{:.3g} x",
        at_least=False,
    ),
    *_speed("step, variance per element, device alone", "cuda", _step, 3, 1.5, DEVICE),
    Goal(
        "step, 12 MB an array, device alone: time of a copy", "cuda", _case("image"), _times(COPY, DEVICE), 1.4,
        "{:.3g} x", at_least=False,
    ),
    Goal("step, 128 x 784, latent 20: launches", "cuda", _case("mlp"), _launches, 6, "{:.0f}", at_least=False),
    Goal(_MEMORY, "cuda", _any, _extra_memory, 1, "{:.3g} %", at_least=False),
)  # fmt: skip


def outcomes(rows: Sequence[Row]) -> Iterator[tuple[Goal, float, Row]]:
    """Each goal of which something was measured, with the worst value and the row it is from."""
    together = groups([row for row in rows if row.median_us is not None])
    # Fewer threads than the machine offers are a series of their own.
    threads = max((row.threads for row in rows), default=0)
    for goal in GOALS:
        worst: tuple[float, Row] | None = None
        for group in together:
            ours = group.get(OURS)
            if ours is None or ours.device != goal.device or ours.direction != BOTH or ours.threads != threads:
                continue
            value = goal.measure(ours, group) if goal.select(ours) else None
            if value is None or math.isnan(value):
                continue
            if worst is None or (value < worst[0]) == goal.at_least:
                worst = value, ours
        if worst:
            yield goal, *worst


def report(rows: Sequence[Row]) -> str:
    """Goals next to what was measured, as a table; empty if nothing was that has a goal."""
    lines = [
        (goal.what, goal.text(), goal.form.format(value), row.case, "yes" if goal.met(value) else "no")
        for goal, value, row in outcomes(rows)
    ]
    return table(("goal (forward + backward)", "bound", "worst", "in case", "met"), lines, left=1) if lines else ""
