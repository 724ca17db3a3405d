"""Plans the measurements and makes them, one group of contenders after the other."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import BenchmarkError, cases, contenders, first_line, measure, training
from .cases import BOTH, Buffers, Case, traffic
from .check import Expected
from .contenders import CONTENDERS, EMPTY, LIMITS, WORKS
from .rows import Row
from .training import Training

SECONDS, QUICK_SECONDS = 4.0, 1.0
"""How long the contenders of one group take turns."""
DEVICE_SHARE = 0.25
"""So much of it again for replays on a GPU, whose times vary less."""


class Group(NamedTuple):
    """A case, one direction and a number of threads: what all contenders do in turns."""

    case: Case | Training
    direction: str
    threads: int
    contenders: tuple[str, ...]


ALL_CASES = (*cases.CASES, *training.CASES)


def plan(
    device: torch.device,
    threads: int,
    *,
    quick: bool = False,
    patterns: Sequence[str] = (),
    contenders: Sequence[str] = CONTENDERS,
) -> list[Group]:
    """The groups to measure, in the order of the table; raises BenchmarkError for a pattern that names no case."""
    there = [case for case in ALL_CASES if case.only_on in ("", device.type)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in there):
            names = ", ".join(case.name for case in there)
            raise BenchmarkError(f"--cases {pattern!r} names no case; there are {names}")
    if patterns:
        there = [case for case in there if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
    elif quick:
        there = [case for case in there if case.name in cases.QUICK]

    def group(case: Case | Training, direction: str, threads: int, among: Sequence[str]) -> Group:
        left_out = (EMPTY,) if direction != BOTH else ()
        fit = (name for name in contenders if name in (among or WORKS) and name not in left_out)
        return Group(case, direction, threads, tuple(fit))

    groups = [
        group(case, direction, threads, case.contenders)
        for case in there
        for direction in case.passes
        if not quick or direction == BOTH
    ]
    if device.type == "cpu" and not quick:
        fewer = [2**k for k in range(threads.bit_length()) if 2**k < threads]
        over_threads = [case for case in there if case.name in cases.OVER_THREADS]
        groups += [group(case, BOTH, few, cases.CURVES) for case in over_threads for few in fewer]
    return [group for group in groups if group.contenders]


def run(
    groups: Sequence[Group],
    device: torch.device,
    machine: dict[str, Any],
    seconds: float,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measures the groups; yields their rows."""
    threads = torch.get_num_threads()
    try:
        for group in groups:
            torch.set_num_threads(group.threads)
            yield from _measure(group, device, machine, seconds, say)
    finally:
        torch.set_num_threads(threads)


def _measure(
    group: Group, device: torch.device, machine: dict[str, Any], seconds: float, say: Callable[[str], None]
) -> list[Row]:
    case, direction = group.case, group.direction
    trained = isinstance(case, Training)
    moved = None if trained else traffic(case, direction).bytes(case.dtype)
    unfit = (training if trained else contenders).unfit
    rows = {
        name: Row(
            case=case.name,
            work=case.work,
            direction=direction,
            contender=name,
            dtype=str(case.dtype).removeprefix("torch."),
            variance=case.variance,
            data=_text(case.data),
            latent=_text(case.latent),
            samples=case.samples,
            elements=case.elements,
            array_bytes=case.array_bytes,
            threads=group.threads,
            bytes=moved,
            note=unfit(name, case),
            **machine,
        )
        for name in group.contenders
    }
    try:
        with torch.set_grad_enabled(direction == BOTH):
            _fill(rows, group, device, seconds, say)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        for row in rows.values():
            row.note = row.note or "the inputs take more memory than there is"
    return list(rows.values())


class Contest:
    """One case and direction, for all contenders: the sets of inputs, and what is to come out."""

    def __init__(self, case: Case, direction: str, device: torch.device) -> None:
        self.case, self.direction = case, direction
        first = cases.make(case, device)
        self.input_bytes = first.bytes
        self.sets = measure.how_many_sets(first.bytes, measure.last_level_cache(device))
        self._buffers = [first, *(first.clone() for _ in range(self.sets - 1))]
        self.rotation = itertools.cycle(range(self.sets))
        with torch.enable_grad():
            self._expected = Expected(case, direction, first)
        kept = sum(shape.numel() for shape in map(torch.Size, traffic(case, direction).written.values()))
        self.kept_bytes = kept * case.dtype.itemsize

    def bind(self, contender: str) -> tuple[list[contenders.Run], list[Buffers]]:
        """The calls that the clock sees, one for each set, and the sets."""
        bind = contenders.prepare(contender, self.case, self.direction)
        return [bind(buffers) for buffers in self._buffers], self._buffers

    def call_and_check(self, contender: str, call: contenders.Run) -> None:
        """One call on the first set, compared with the reference."""
        results = call()
        if contender not in LIMITS:
            with torch.enable_grad():
                self._expected.check(contender, results)


def _fill(rows: dict[str, Row], group: Group, device: torch.device, seconds: float, say: Callable[[str], None]) -> None:
    """Checks, weighs and times the contenders that are fit, and enters in their rows what came out."""
    case, direction = group.case, group.direction
    if all(row.note for row in rows.values()):
        return
    if any(name.endswith("-compiled") for name in rows):
        torch.compiler.reset()  # so that no call searches through the code that was compiled for other cases
    contest = (training.Contest if isinstance(case, Training) else Contest)(case, direction, device)
    turns = {}
    for name, row in rows.items():
        if row.note:
            continue
        say(f"{case.name}, {direction}, {group.threads} threads: {name}")
        turn = None
        try:
            calls, sets = contest.bind(name)
            turn = measure.Turns(calls, sets, contest.rotation)
            for _ in range(2):  # the second call is the first that compiles nothing
                contest.call_and_check(name, calls[0])
                turn.drop_gradients()
            row.peak_bytes = measure.peak_bytes(calls[0], device)
            row.peak_extra_bytes = row.peak_bytes - contest.kept_bytes
            turn.drop_gradients()
            if device.type == "cuda":
                row.launches = measure.launches(calls[0])
                turn.drop_gradients()
        except Exception as error:
            if turn is not None:
                turn.drop_gradients()
            if _out_of_memory(error):
                row.note = "takes more memory than there is"
            elif name.endswith("-compiled") and not isinstance(error, BenchmarkError):
                row.note = f"torch.compile failed: {first_line(error)}"
            else:
                raise
        else:
            turns[name] = turn

    say(f"{case.name}, {direction}, {group.threads} threads: the clock runs")
    times, calls_per_round = measure.interleave(turns, seconds, measure.clock_of(device))
    for name, values in times.items():
        row = rows[name]
        row.median_us, row.p20_us, row.p80_us = measure.summary(values)
        row.rounds, row.calls_per_round = len(values), calls_per_round[name]
        row.gb_per_s = row.bytes and row.bytes / row.median_us / 1e3
        row.buffer_sets = contest.sets
    if device.type == "cuda":
        say(f"{case.name}, {direction}: the device's clock runs")
        steps = measure.steps_in_a_graph(contest.sets, contest.input_bytes, measure.last_level_cache(device))
        time_on_device(rows, turns, steps, seconds * DEVICE_SHARE)


def time_on_device(rows: dict[str, Row], turns: dict[str, measure.Turns], steps: int, seconds: float) -> None:
    """Captures the contenders one by one, has the replays take turns, and enters in their rows what came out; or why a
    contender cannot be captured. What is empty has no work for a device."""
    pool = torch.cuda.graph_pool_handle()
    replays = {}
    for name, turn in turns.items():
        if name == EMPTY:
            continue
        try:
            replays[name] = measure.Replays(turn, steps, pool)
        except Exception as error:
            rows[name].device_note = f"no CUDA graph of it: {first_line(error)}"
            turn.drop_gradients()
    times, _ = measure.interleave(replays, seconds, measure.Replays.seconds)
    for name, values in times.items():
        row = rows[name]
        row.device_us, row.device_p20_us, row.device_p80_us = measure.summary(values)
        row.device_rounds, row.steps_in_graph = len(values), steps
        row.device_gb_per_s = row.bytes and row.bytes / row.device_us / 1e3


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _text(shape: tuple[int, ...] | None) -> str | None:
    return None if shape is None else "x".join(map(str, shape))
