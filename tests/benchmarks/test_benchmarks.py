"""The benchmarks: contenders compute the same, bytes and memory are counted right, turns are fair, changes are found.

No test looks at how long anything takes.
"""

import contextlib
import csv
import dataclasses
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.cuda._utils import _get_device_index

import elbo_ext
from benchmarks import BenchmarkError, cases, check, compare, contenders, goals, measure, rows, suite, tables
from benchmarks.__main__ import OUT, _device, main
from benchmarks.cases import BOTH, FORWARD, Case
from benchmarks.contenders import CONTENDERS, FORMULAS
from benchmarks.rows import DEVICE, WALL, Row
from samples import NEEDS_GPU

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# torch.func takes some derivatives from a script that it compiles on first use.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]

EAGER = [name for name in FORMULAS if not name.endswith("-compiled")]
VARIANCES = ("fixed", "scalar", "per-channel", "per-element", "bernoulli")
DTYPES = (torch.float32, torch.bfloat16)


# ---- cases ----


def small_cases() -> list[Case]:
    """One case for each work, variance and dtype, with several samples where there may be. What is of ln q in float32:
    rounding z loses the noise that it came from."""
    found = [
        Case("small", "log_weights", latent=(64, 33)),
        Case("small", "importance", latent=(64, 33), samples=5),
        Case("small", "sampling", latent=(64, 33), samples=5),
    ]
    for dtype in DTYPES:
        found += [
            Case("small", "sampling", latent=(64, 33), dtype=dtype),
            Case("small", "kl", latent=(64, 33), dtype=dtype),
        ]
        for variance in VARIANCES:
            found.append(Case("small", "likelihood", (16, 3, 8, 9), variance=variance, dtype=dtype))
            found.append(Case("small", "step", (16, 3, 8, 9), (16, 65), variance, dtype=dtype))
    return found


def name_of(case: Case) -> str:
    samples = None if case.samples is None else f"{case.samples}-samples"
    return "-".join(filter(None, (case.work, samples, case.variance, str(case.dtype)[6:])))


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("case", small_cases(), ids=name_of)
def test_contenders_compute_what_the_reference_computes(case, direction):
    torch.manual_seed(0)
    buffers = cases.make(case, CPU)
    expected = check.Expected(case, direction, buffers)
    for name in EAGER:
        if contenders.unfit(name, case):
            continue
        with torch.set_grad_enabled(direction == BOTH):
            results = contenders.prepare(name, case, direction)(buffers)()
        expected.check(name, results)
        graded = {operand for operand, t in buffers.operands.items() if t.grad is not None}
        assert graded == (set(case.learned()) if direction == BOTH else set())
        buffers.drop_gradients()


def test_every_work_direction_variance_and_dtype_is_in_the_table():
    """What is measured, and that what the test above checks is all of it."""
    table = cases.CASES
    assert {case.work for case in table} == set(cases.RESULTS)
    assert {case.variance for case in table if case.work == "step"} == set(VARIANCES)
    assert {case.dtype for case in table} == set(DTYPES)
    assert len({case.name for case in table}) == len(table)

    def kinds(some: Sequence[Case]) -> set:
        return {(case.work, case.variance, case.dtype, case.samples is None) for case in some}

    assert kinds(table) <= kinds(small_cases())
    assert set(cases.QUICK) | set(cases.OVER_THREADS) <= {case.name for case in table}
    sampled = [case.elements for case in table if case.work == "sampling"]
    assert min(sampled) == 2560 and max(sampled) == 1 << 24
    sized = [case.elements for case in table if case.name.startswith("size-")]
    assert min(sized) == 1 << 8 and max(sized) == 1 << 26


def doctored(case: Case, direction: str, change: Callable) -> None:
    """Checks ours after `change(results, buffers)` has spoilt it."""
    torch.manual_seed(0)
    buffers = cases.make(case, CPU)
    with torch.set_grad_enabled(direction == BOTH):
        results = list(contenders.prepare("ours", case, direction)(buffers)())
    with torch.no_grad():
        change(results, buffers)
    check.Expected(case, direction, buffers).check("ours", results)


def one_sigma_off(buffers: cases.Buffers) -> torch.Tensor:
    return buffers.operands["mu"] + (buffers.operands["logvar"] / 2).exp()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda results, buffers: results[0].mul_(1.001), "loss"),
        (lambda results, buffers: results[0].fill_(math.nan), "loss"),
        (lambda results, buffers: buffers.operands["recon"].grad.mul_(1.001), "gradient of recon"),
        (lambda results, buffers: buffers.operands["recon_logvar"].grad.add_(0.01), "gradient of recon_logvar"),
        (lambda results, buffers: buffers.operands["mu"].grad.sub_(buffers.grad_z), "gradient of mu"),
        (lambda results, buffers: buffers.operands["logvar"].grad.neg_(), "gradient of logvar"),
        (lambda results, buffers: results[1].copy_(buffers.operands["mu"]), "noise"),
        (lambda results, buffers: results[1].add_(0.5), "noise"),
        (lambda results, buffers: results[1].copy_(one_sigma_off(buffers)), "noise"),  # its mean square is 1
    ],
)
def test_the_check_notices_other_numbers(change, what):
    case = Case("small", "step", (16, 300), (16, 65), "per-element")
    doctored(case, BOTH, lambda results, buffers: None)
    with pytest.raises(BenchmarkError, match=f"ours computes something else .* its {what}"):
        doctored(case, BOTH, change)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda results, buffers: results[0].sub_(math.log(5)), "loss"),  # the sum of the weights for their mean
        (lambda results, buffers: results[0].neg_(), "loss"),
        (lambda results, buffers: results[1].copy_(results[1].flip(0)), "gradient of"),  # weights of other samples
        (lambda results, buffers: buffers.operands["mu"].grad.sub_(buffers.grad_z.sum(0)), "gradient of mu"),
        (lambda results, buffers: results[1].copy_(results[1][:1].expand_as(results[1])), "loss"),
    ],
)
def test_the_check_notices_another_bound(change, what):
    case = Case("small", "importance", latent=(16, 65), samples=5)
    doctored(case, BOTH, lambda results, buffers: None)
    with pytest.raises(BenchmarkError, match=f"ours computes something else .* its {what}"):
        doctored(case, BOTH, change)


def test_the_check_notices_a_missing_gradient():
    def drop(results, buffers):
        buffers.operands["recon"].grad = None

    with pytest.raises(BenchmarkError, match="gives no gradient of recon"):
        doctored(Case("small", "step", (16, 30), (16, 5), "per-element"), BOTH, drop)


def test_the_reference_may_be_taken_in_chunks(monkeypatch):
    case = Case("small", "step", (7, 30), (7, 5), "scalar")
    buffers = cases.make(case, CPU)
    whole = check.Expected(case, BOTH, buffers)
    monkeypatch.setattr(check, "CHUNK", 60)
    parts = check.Expected(case, BOTH, buffers)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    for name in whole.gradients:
        torch.testing.assert_close(parts.gradients[name], whole.gradients[name])


def test_a_contender_that_differs_stops_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(contenders.Eager, "kl", lambda self, mu, logvar: (mu * mu).mean())
    code = main(
        ["--cases", "kl-2560", "--contenders", "ours,eager", "--seconds", "0.01", "--out", str(tmp_path / "out")]
    )
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and not os.listdir(tmp_path / "out")
    assert "eager computes something else than the reference in case kl-2560: its loss differs by" in errors[-1]


def test_who_takes_no_part_has_a_reason():
    def unfit(name: str, *arguments, **options) -> str | None:
        return contenders.unfit(name, Case("small", *arguments, **options))

    for variance in ("scalar", "per-channel"):
        case = Case("small", "likelihood", (2, 3, 4, 4), variance=variance)
        assert "no variance that many" in contenders.unfit("nll-loss", case)
        with pytest.raises(ValueError, match="var is of incorrect size"):  # or this reason is out of date
            contenders.prepare("nll-loss", case, FORWARD)(cases.make(case, CPU))()
    assert "Gaussians" in unfit("nll-loss", "likelihood", (2, 3), variance="bernoulli")
    assert "sampling" in unfit("nll-loss", "sampling", latent=(2, 3))
    assert unfit("nll-loss", "likelihood", (2, 3), variance="fixed") is None
    assert unfit("distributions", "likelihood", (2, 3), variance="scalar") is None


# ---- bytes ----

N, L = 2 * 16, 2 * 4


@pytest.mark.parametrize(
    ("case", "direction", "elements"),
    [
        # x, recon, recon_logvar, mu, logvar, grad_z; z and four gradients
        (Case("c", "step", (2, 16), (2, 4), "per-element"), BOTH, 3 * N + 3 * L + L + 2 * N + 2 * L),
        (Case("c", "step", (2, 16), (2, 4), "per-element"), FORWARD, 3 * N + 2 * L + L),
        (Case("c", "step", (2, 16), (2, 4), "scalar"), BOTH, 2 * N + 1 + 3 * L + L + N + 1 + 2 * L),
        (Case("c", "step", (2, 16), (2, 4), "fixed"), BOTH, 2 * N + 3 * L + L + N + 2 * L),
        (Case("c", "step", (2, 16), (2, 4), "bernoulli"), BOTH, 2 * N + 3 * L + L + N + 2 * L),
        (Case("c", "likelihood", (2, 16), variance="per-element"), BOTH, 5 * N),
        (Case("c", "likelihood", (2, 16), variance="per-element"), FORWARD, 3 * N),
        (Case("c", "sampling", latent=(2, 4)), BOTH, 3 * L + 3 * L),
        (Case("c", "sampling", latent=(2, 4)), FORWARD, 3 * L),
        (Case("c", "sampling", latent=(2, 4), samples=3), BOTH, 2 * L + 3 * L + 3 * L + 2 * L),
        (Case("c", "sampling", latent=(2, 4), samples=3), FORWARD, 2 * L + 3 * L),
        (Case("c", "importance", latent=(2, 4), samples=3), BOTH, 2 * L + 3 * L + 3 * L + 2 * L),
        (Case("c", "importance", latent=(2, 4), samples=3), FORWARD, 2 * L + 3 * L),
        (Case("c", "kl", latent=(2, 4)), BOTH, 4 * L),
        (Case("c", "kl", latent=(2, 4)), FORWARD, 2 * L),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes(case, direction, elements, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    assert cases.traffic(case, direction).bytes(dtype) == elements * dtype.itemsize


class Ledger(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes that operators read and write, views left out."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        reduced = function.overloadpacket == torch.ops.aten.amax
        tensors = [t for t in (*args, *([] if reduced else [result])) if isinstance(t, torch.Tensor)]
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("case", small_cases(), ids=name_of)
def test_the_copy_moves_the_bytes_of_the_work(case, direction):
    """Reads and writes each, counted operator by operator; and what it writes is fresh memory."""
    buffers = cases.make(case, CPU)
    moved = cases.traffic(case, direction)
    copy = contenders.prepare("copy", case, direction)(buffers)
    with Ledger() as ledger:
        written = copy()
    assert ledger.bytes == moved.bytes(case.dtype)
    inputs = {t.data_ptr() for t in [*buffers.operands.values(), buffers.grad_z] if t is not None}
    assert not inputs & {t.data_ptr() for t in written}
    arrays = sorted(t.shape for t in written if t.dim())  # without maxima, which the work does not write
    assert arrays == sorted(shape for shape in moved.written.values() if shape)


# ---- the empty contender ----


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operators that run, views left out."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", small_cases(), ids=name_of)
def test_the_empty_functions_allocate_what_the_work_does_and_compute_nothing(case):
    buffers = cases.make(case, CPU)
    call = contenders.prepare("empty", case, BOTH)(buffers)
    with Operators() as seen:
        results = call()
    shapes = {"loss": (), "z": case.z if case.latent else None}
    assert [tuple(t.shape) for t in results] == [shapes[name] for name in cases.RESULTS[case.work]]
    for name, operand in buffers.operands.items():
        assert (operand.grad is not None and operand.grad.shape == operand.shape) == (name in case.learned())
    # One seed, and the upstream gradient of a loss, which torch makes.
    assert set(seen.names) <= {"new_empty", "empty_like", "detach", "randint", "ones_like"}
    assert seen.names.count("randint") == ("z" in cases.RESULTS[case.work])
    functions, found = [t.grad_fn for t in results], set()
    while functions:
        function = functions.pop()
        if function is not None and function not in found:
            found.add(function)
            functions += [parent for parent, _ in function.next_functions]
    empty = [function for function in found if type(function).__name__ == "_AllocationBackward"]
    assert len(empty) == (2 if case.work in ("step", "importance") else 1)


def test_the_empty_functions_take_no_part_in_evaluation():
    assert {g.direction for g in suite.plan(CPU, 1, contenders=["empty"])} == {BOTH}


# ---- the clock ----


class FakeTime:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call_that_takes(self, seconds: float, log: list | None = None, name: str = "") -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            if log is not None:
                log.append(name)

        return call


def turns(*calls: Callable, leaves: tuple = ()) -> measure.Turns:
    sets = [cases.Buffers({str(i): leaf for i, leaf in enumerate(leaves)}, None)] * len(calls)
    return measure.Turns(calls, sets, itertools.cycle(range(len(calls))))


def test_only_the_calls_are_timed():
    """And the mean is over the calls of a turn; dropping results and gradients takes long here, off the clock."""
    time = FakeTime()

    class Result:
        def __del__(self):
            time.now += 1000

    def call(seconds: float) -> Callable[[], Result]:
        def run() -> Result:
            time.now += seconds
            return Result()

        return run

    assert turns(call(1.0), call(2.0), call(6.0)).seconds(3, time) == pytest.approx(3.0)
    assert time.now == 3009


def test_gradients_are_dropped_between_calls():
    leaf, seen = torch.ones(3, requires_grad=True), []

    def call() -> None:
        seen.append(leaf.grad)
        (2 * leaf).sum().backward()

    turns(call, leaves=(leaf,)).seconds(3)
    assert seen == [None] * 3 and leaf.grad is None


def test_rounds_interleave_and_end_with_the_budget():
    time, log = FakeTime(), []
    clock = lambda turn, calls: turn.seconds(calls, time)
    durations = {"a": 0.5, "b": 1.0, "c": 0.25}
    contending = {name: turns(time.call_that_takes(d, log, name)) for name, d in durations.items()}
    times, calls = measure.interleave(contending, budget=17.5, clock=clock, now=time, min_rounds=2)
    assert calls == {"a": 1, "b": 1, "c": 1}
    # A round is two calls of each, one of them off the clock: 3.5 s, five of them in 17.5 s.
    assert dict(times) == {name: [d] * 5 for name, d in durations.items()}
    body = log[4 * 3 :]  # after the warm-up
    orders = ["".join(name for name, _ in itertools.groupby(body[i : i + 6])) for i in range(0, len(body), 6)]
    assert len(orders) == 5 and all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1  # not always in the same order


def test_short_calls_are_repeated_and_a_minimum_of_rounds_is_kept():
    time = FakeTime()
    clock = lambda turn, calls: turn.seconds(calls, time)
    contending = {
        "short": turns(time.call_that_takes(measure.TURN_SECONDS / 40)),
        "long": turns(time.call_that_takes(9.0)),
    }
    times, calls = measure.interleave(contending, budget=0.1, clock=clock, now=time, min_rounds=4)
    assert calls == {"short": 40, "long": 1}
    assert len(times["long"]) == 4 and times["short"] == pytest.approx([measure.TURN_SECONDS / 40] * 4)


def test_garbage_is_collected_between_turns_only():
    import gc

    seen = []
    measure.interleave({"a": turns(lambda: seen.append(gc.isenabled()))}, budget=0.0, min_rounds=2)
    assert seen[-1] is False and gc.isenabled() and gc.get_freeze_count() == 0


def test_contenders_share_the_rotation_of_buffers():
    """No set comes again before all others were used."""
    log: list[int] = []
    rotation = itertools.cycle(range(5))
    sets = [cases.Buffers({}, None)] * 5
    contending = {
        name: measure.Turns([lambda i=i: log.append(i) for i in range(5)], sets, rotation) for name in ("a", "b", "c")
    }
    measure.interleave(contending, budget=0.0, min_rounds=3)
    assert len(log) > 9 and log == [i % 5 for i in range(len(log))]


def test_summary_is_median_and_percentiles_in_microseconds():
    seconds = [k * 1e-6 for k in range(101)]
    random.Random(0).shuffle(seconds)
    assert measure.summary(seconds) == pytest.approx((50, 20, 80))
    assert measure.summary([2e-6]) == pytest.approx((2, 2, 2))


def test_sets_of_buffers_exceed_the_cache():
    assert measure.how_many_sets(1000, 32_000) == 1
    for set_bytes in (5_000, 31_000, 40_000, 1_000_000):
        count = measure.how_many_sets(set_bytes, 32_000)
        assert count * set_bytes >= 96_000 and (count - 1) * set_bytes < 96_000
    assert measure.last_level_cache(CPU) >= 1 << 18


# ---- the device's clock ----


class FakeGPU:
    """Stands in for torch.cuda where there is none. A call that is captured takes no time until its graph is replayed;
    the device's time passes in calls and replays alone."""

    def __init__(self) -> None:
        self.time, self.capturing, self.sync_mode = FakeTime(), None, 0
        self.graphs: list[Any] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.time.now

            def elapsed_time(self, end: "Event") -> float:
                return 1e3 * (end.at - self.at)  # milliseconds, as torch's

        class Graph:
            def __init__(self) -> None:
                self.calls, self.seconds, self.replays, self.pool = 0, 0.0, 0, None

            def replay(self) -> None:
                assert gpu.capturing is None
                self.replays += 1
                gpu.time.now += self.seconds

        self.Event, self.CUDAGraph = Event, Graph
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = lambda stream: contextlib.nullcontext()
        self.synchronize = lambda: None
        self.graph_pool_handle = lambda: (0, 1)
        self.get_sync_debug_mode = lambda: self.sync_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_mode = mode

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: object) -> Iterator[None]:
        graph.pool, self.capturing = pool, graph
        self.graphs.append(graph)
        try:
            yield
        finally:
            self.capturing = None

    def call_that_takes(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            if self.capturing:
                self.capturing.calls += 1
                self.capturing.seconds += seconds
            else:
                self.time.now += seconds

        return call

    def call_that_waits(self) -> Callable[[], None]:
        def call() -> None:
            assert not self.capturing, "a capture that fails may leave torch unusable"
            if self.sync_mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nlong story")

        return call


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGPU()
    for name in ("Event", "CUDAGraph", "Stream", "current_stream", "stream", "synchronize", "graph",
                 "graph_pool_handle", "get_sync_debug_mode", "set_sync_debug_mode"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_graph_holds_a_step_on_each_set(gpu):
    """And its time is that of a step, in whole replays, one of which goes ahead off the clock."""
    replays = measure.Replays(turns(*map(gpu.call_that_takes, (1.0, 2.0, 6.0))), 3, pool := (0, 7))
    (graph,) = gpu.graphs
    assert (graph.calls, graph.seconds, graph.pool) == (3, 9.0, pool)
    assert gpu.time.now == 9.0  # the warm-up, outside of the graph
    assert replays.seconds(7) == pytest.approx(3.0)
    assert graph.replays == 3 + 1 and gpu.sync_mode == 0


def test_small_works_share_a_graph_and_rotating_ones_fill_it():
    assert measure.steps_in_a_graph(1, 1000, 32_000) == measure.SHORT_STEPS
    for set_bytes in (5_000, 31_000, 1_000_000):
        count = measure.how_many_sets(set_bytes, 32_000)
        assert measure.steps_in_a_graph(count, set_bytes, 32_000) == count


def test_gradients_are_dropped_in_the_graph_too(gpu):
    leaf, seen = torch.ones(3, requires_grad=True), []

    def call() -> None:
        seen.append(leaf.grad)
        (2 * leaf).sum().backward()

    measure.Replays(turns(call, leaves=(leaf,)), 4, None)
    assert seen == [None] * (3 + 4) and leaf.grad is None


def test_device_times_enter_the_rows(gpu):
    contending = {
        "ours": turns(gpu.call_that_takes(2e-4)),
        "eager": turns(gpu.call_that_takes(6e-4)),
        "empty": turns(gpu.call_that_takes(1e-9)),
    }
    measured = {name: row(name) for name in contending}
    suite.time_on_device(measured, contending, 4, 0.0)
    ours, eager, empty = measured.values()
    assert ours.device_time[:3] == pytest.approx((200, 200, 200)) and ours.median_us == 100
    assert eager.device_us == pytest.approx(600) and eager.device_gb_per_s == pytest.approx(10**7 / 600 / 1e3)
    assert ours.device_rounds >= measure.MIN_ROUNDS and ours.steps_in_graph == 4
    assert [graph.calls for graph in gpu.graphs] == [4, 4] and len({graph.pool for graph in gpu.graphs}) == 1
    assert empty.device_time is None and empty.device_note is None


def test_who_cannot_be_captured_is_noted(gpu):
    leaf = torch.ones(3, requires_grad=True)
    leaf.grad = torch.ones(3)  # as a step leaves it that is broken off
    contending = {
        "distributions": turns(gpu.call_that_waits(), leaves=(leaf,)),
        "ours": turns(gpu.call_that_takes(1e-4)),
    }
    measured = {name: row(name) for name in contending}
    suite.time_on_device(measured, contending, 1, 0.0)
    note = "no CUDA graph of it: RuntimeError: called a synchronizing CUDA operation"
    assert measured["distributions"].device_note == note and measured["distributions"].device_us is None
    assert measured["ours"].device_us == pytest.approx(100)
    assert len(gpu.graphs) == 1 and gpu.sync_mode == 0 and leaf.grad is None
    assert tables.notes(list(measured.values())) == [f"distributions: {note} (conv)"]
    header, _, line = tables.device_speed(list(measured.values())).splitlines()
    assert "distributions" in header and line.rstrip(" |").endswith("-")


@NEEDS_GPU
def test_device_times_on_a_gpu():
    """Replays launch the kernels of the steps and no others; and a capture that is refused leaves torch as it was."""
    device = torch.device("cuda")
    case = next(case for case in cases.CASES if case.name == "kl-2560")
    group = suite.Group(case, BOTH, 1, ("ours", "eager", "distributions", "copy", "empty"))
    measured = {r.contender: r for r in suite.run([group], device, rows.machine(device), 0.05)}
    for name in ("ours", "eager", "copy"):
        one = measured[name]
        assert one.device_note is None and 0 < one.device_p20_us <= one.device_us <= one.device_p80_us
        assert one.steps_in_graph == measure.SHORT_STEPS and one.buffer_sets == 1
    assert "synchronizing" in measured["distributions"].device_note
    assert measured["empty"].device_us is None and measured["empty"].median_us > 0

    buffers = cases.make(case, device)
    call = contenders.prepare("eager", case, BOTH)(buffers)
    turn = measure.Turns([call], [buffers], itertools.repeat(0))
    replays = measure.Replays(turn, 5, torch.cuda.graph_pool_handle())
    turn.step()
    assert measure.launches(replays._graph.replay) == 5 * measured["eager"].launches
    assert torch.randn(5, device=device).isfinite().all()


# ---- memory ----


def test_peak_memory_of_known_allocations():
    kept = torch.empty(50_000, dtype=torch.uint8)

    def call() -> torch.Tensor:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        second = torch.empty(2_000_000, dtype=torch.uint8)
        del first
        third = torch.empty(500_000, dtype=torch.uint8)  # the peak was 3 MB before
        del second, third
        return torch.empty(100, dtype=torch.uint8)

    assert measure.peak_bytes(call, CPU) == 3_000_000
    assert measure.peak_bytes(lambda: kept.clone(), CPU) == 50_000
    assert measure.peak_bytes(lambda: None, CPU) == 0


def test_extra_memory_leaves_out_gradients_and_z():
    """The copy holds just the results; by hand, intermediate arrays of the data's size come on top."""
    case = Case("small", "step", (64, 512), (64, 32), "per-element")
    groups = [suite.Group(case, BOTH, 1, ("eager", "copy"))]
    eager, copy = suite.run(groups, CPU, rows.machine(CPU), 0.001)
    data, latent = 4 * 64 * 512, 4 * 64 * 32
    assert copy.peak_bytes == 2 * data + 3 * latent + 4 * 0 and copy.peak_extra_bytes == 0
    assert eager.peak_bytes - eager.peak_extra_bytes == 2 * data + 3 * latent
    assert eager.peak_extra_bytes >= 2 * data


# ---- the plan ----


def names(groups: list[suite.Group]) -> set[str]:
    return {group.case.name for group in groups}


def test_plan():
    full = suite.plan(CPU, 4)
    assert names(full) == {case.name for case in suite.ALL_CASES if case.only_on in ("", "cpu")}
    assert {g.threads for g in full if g.case.name == "mlp" and g.direction == BOTH} == {1, 2, 4}
    assert {g.threads for g in full if g.case.name == "wide"} == {4}
    assert {g.threads for g in suite.plan(CPU, 1)} == {1}
    quick = suite.plan(CPU, 2, quick=True)
    assert names(quick) == set(cases.QUICK) and len(quick) == len(cases.QUICK)
    assert names(suite.plan(CPU, 2, quick=True, patterns=["kl-*", "wide"])) == {"kl-2560", "kl-1M", "wide"}
    assert {"huge", "huge-bf16"} <= names(suite.plan(torch.device("cuda"), 2))
    assert all(g.contenders == ("copy",) for g in suite.plan(CPU, 2, contenders=["copy"]))


# ---- rows, tables, goals ----


def row(contender: str = "ours", median: float | None = 100.0, spread: float = 0.05, **fields) -> Row:
    """A row made by hand, with p20 and p80 by `spread` below and above the median."""
    base = dict(
        case="conv", work="step", direction=BOTH, dtype="float32", variance="per-element", data="64x12288",
        latent="64x128", elements=786432, array_bytes=3145728, threads=2, rounds=9, calls_per_round=1, bytes=10**7,
        peak_bytes=7_000_000, peak_extra_bytes=0, device_name="a CPU", cpu_name="a CPU", cores=2, torch="2.13.0",
        elbo_ext="0.1.0", instruction_set="AVX2", date="2026-01-01 00:00 UTC",
    )  # fmt: skip
    if median is not None:
        base |= {"median_us": median, "p20_us": median * (1 - spread), "p80_us": median * (1 + spread)}
        base["gb_per_s"] = base["bytes"] / median / 1e3
    return Row(contender=contender, **base | fields)


def test_rows_survive_json_and_csv(tmp_path):
    some = [with_device(row(), 50.0), row("eager", 900.0), row("nll-loss", None, note='says "no", why')]
    (tmp_path / "r.json").write_text(rows.to_json(some))
    assert rows.read_json(str(tmp_path / "r.json")) == some
    first, _, last = csv.DictReader(rows.to_csv(some).splitlines())
    assert tuple(first) == rows.FIELDS and float(first["median_us"]) == 100 and first["note"] == ""
    assert last["note"] == 'says "no", why' and last["median_us"] == ""


def test_rows_say_where_and_with_what():
    machine = rows.machine(CPU)
    assert machine["torch"] == torch.__version__ and machine["device"] == "cpu"
    assert machine["instruction_set"] == elbo_ext.build_info()["instruction_set"]
    assert machine["device_name"] == machine["cpu_name"] != ""


def test_speed_table():
    text = tables.speed([row(), row("eager", 1250.0), row("nll-loss", None, note="no"), row("copy", 50.0)])
    header, rule, line = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    assert header == ["case", "array", "ours", "20-80 %", "GB/s", "eager", "nll-loss", "copy"]
    assert line == ["conv", "3.15 MB", "100 us", "-5 +5", "100", "12.5 x", "-", "0.5 x"]
    assert set("".join(rule)) == {"-", ":"}


def with_device(one: Row, median: float, spread: float = 0.02) -> Row:
    return dataclasses.replace(
        one, device_us=median, device_p20_us=median * (1 - spread), device_p80_us=median * (1 + spread),
        device_gb_per_s=one.bytes / median / 1e3,
    )  # fmt: skip


def test_device_table():
    timed = {"ours": 50.0, "eager": 200.0, "copy": 25.0}
    some = [row("empty", 40.0), *(with_device(row(name), median) for name, median in timed.items())]
    some += [dataclasses.replace(r, case="not-captured") for r in (row(), row("eager", 300.0))]
    assert tables.device_speed([row(), row("eager", 900.0)]) == ""
    header, _, line = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in tables.device_speed(some).splitlines()
    )
    assert header == ["case", "array", "ours", "20-80 %", "GB/s", "eager", "copy"]
    assert line == ["conv", "3.15 MB", "50 us", "-2 +2", "200", "4 x", "0.5 x"]
    assert "| 0.4 x |" in tables.speed(some[:4])  # the empty functions', by the clock on the wall


def test_tables_without_ours_give_times():
    line = tables.speed([row("eager", 1250.0), row("copy", 0.5)]).splitlines()[-1]
    assert "1.25 ms" in line and "0.5 us" in line


def test_goals_report_the_worst_case():
    large = [row(), row("eager", 1250.0), row("eager-compiled", 300.0), row("copy", 90.0)]
    worse = [dataclasses.replace(r, case="image") for r in (row(), row("eager", 1100.0))]
    fewer = [dataclasses.replace(r, threads=1) for r in (row(), row("eager", 100.0))]
    small = [dataclasses.replace(r, case="little", array_bytes=1000) for r in (row(), row("eager", 200.0))]
    for some in (large + worse + fewer + small, small + fewer + worse + large):
        found = {
            goal.what.rsplit(": ")[-1]: (value, where.case, goal.met(value))
            for goal, value, where in goals.outcomes(some)
        }
        assert found["faster than eager"] == (pytest.approx(11), "image", True)
        assert found["faster than torch.compile"] == (pytest.approx(3), "conv", False)
        assert found["time of a copy"] == (pytest.approx(100 / 90), "conv", True)
    assert "12" not in goals.report(large + worse) and "11 x" in goals.report(large + worse)


def test_goals_of_the_device():
    some = [with_device(row(), 50.0), with_device(row("eager"), 160.0), with_device(row("eager-compiled"), 60.0)]
    on_gpu = [dataclasses.replace(r, device="cuda") for r in some]
    found = {goal.what: (value, goal.met(value)) for goal, value, _ in goals.outcomes(on_gpu)}
    alone = "step, variance per element, device alone: faster than "
    assert found[f"{alone}eager"] == (pytest.approx(3.2), True)
    assert found[f"{alone}torch.compile"] == (pytest.approx(1.2), False)
    tiny = [dataclasses.replace(r, case="tiny", device="cuda") for r in (row(), row("empty", 40.0))]
    (value,) = (value for goal, value, _ in goals.outcomes(tiny) if "empty functions" in goal.what)
    assert value == pytest.approx(2.5)


def test_goals_of_half_precision_stand_apart():
    half = [dataclasses.replace(r, dtype="bfloat16") for r in (row(), row("eager", 200.0))]
    found = {goal.what: value for goal, value, _ in goals.outcomes([row(), row("eager", 1250.0), *half])}
    values = {what.split(", ")[-1]: value for what, value in found.items() if what.endswith("faster than eager")}
    assert values == {"float32: faster than eager": 12.5, "bfloat16: faster than eager": 2.0}


def test_goal_of_memory():
    extra = [row(peak_extra_bytes=50_000), row("eager", 900.0, peak_extra_bytes=4_000_000)]
    values = [(value, goal.met(value)) for goal, value, _ in goals.outcomes(extra) if goal.what.startswith("memory")]
    assert values == [(pytest.approx(1.25), False)]


# ---- compare ----


def test_the_same_run_is_not_slower():
    run = [row(), row("eager", 900.0)]
    text, worse = compare.report(run, run)
    assert not worse and "1 measurements compared: 0 slower, 0 faster, 0 heavier." in text


def test_slower_beyond_the_noise():
    old, eager = row(), row("eager", 900.0)
    assert compare.report([old, eager], [row(median=130.0), eager])[1]
    assert not compare.report([old, eager], [row(median=108.0, spread=0.0), eager])[1]  # a few percent
    assert not compare.report([old, eager], [row(median=130.0, spread=0.3), eager])[1]  # within the spread
    assert compare.report([old, eager], [row(median=70.0), eager])[0].count("| conv") == 1  # faster, and said so


def test_drift_of_the_machine_is_taken_out():
    old = [row(), row("eager", 900.0), row("copy", 90.0)]
    slow_machine = [row(median=150.0), row("eager", 1350.0), row("copy", 133.0)]
    assert not compare.report(old, slow_machine)[1]
    fast_machine = [row(median=100.0), row("eager", 600.0), row("copy", 60.0)]
    text, worse = compare.report(old, fast_machine)
    assert worse and "1.00 x" in text and "0.67 x" in text and "1.50 x" in text


def test_drift_is_of_the_same_group():
    elsewhere = [dataclasses.replace(r, case="mlp") for r in (row(), row("eager", 900.0))]
    slower_elsewhere = [elsewhere[0], dataclasses.replace(elsewhere[1], median_us=1800.0)]
    assert not compare.report([row(), *elsewhere], [row(), *elsewhere])[1]
    found = compare.changes([row(), *elsewhere], [row(median=150.0), *slower_elsewhere])
    assert {change.new.case: change.drift for change in found} == {"conv": None, "mlp": 2.0}
    assert "no other contender" in compare.report([row()], [row()])[0]


def test_only_the_same_measurements_are_compared():
    for field, value in (("threads", 1), ("dtype", "bfloat16"), ("direction", FORWARD), ("data", "64x3")):
        assert compare.changes([row()], [row(**{field: value})]) == []


def test_memory_and_lost_measurements_count():
    assert compare.report([row()], [row(peak_bytes=7_100_000)])[1]
    assert not compare.report([row()], [row(peak_bytes=7_000_512)])[1]
    text, worse = compare.report([row()], [row(median=None, note="torch.compile failed")])
    assert worse and "Gone" in text


def test_the_device_is_compared_by_itself():
    """Its drift is its own; and slower kernels count where the clock on the wall sees nothing of them."""
    old = [with_device(row(), 50.0), with_device(row("eager", 900.0), 200.0)]
    slower = [with_device(row(), 60.0), old[1]]
    text, worse = compare.report(old, slower)
    assert worse and "2 measurements compared: 1 slower" in text and "2 threads, device alone" in text
    cooler = [with_device(row(), 60.0), with_device(row("eager", 900.0), 240.0)]
    assert not compare.report(old, cooler)[1]
    assert [change.clock for change in compare.changes(old, cooler)] == [WALL, DEVICE]
    assert not compare.report(old, [row(), row("eager", 900.0)])[1]  # a run that did not look
    text, worse = compare.report(old, [row(device_note="no CUDA graph of it"), old[1]])
    assert worse and "Gone: conv, 2 threads, device alone, ours." in text


def test_more_memory_is_told_once():
    heavier = with_device(row(peak_bytes=9_000_000), 50.0)
    assert "0 slower, 0 faster, 1 heavier." in compare.report([with_device(row(), 50.0)], [heavier])[0]


def test_another_machine_is_mentioned():
    text, _ = compare.report([row()], [row(device_name="another", torch="2.14.0")])
    assert "device_name was a CPU and is another" in text and "torch was 2.13.0 and is 2.14.0" in text


def test_compare_on_the_command_line(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(rows.to_json([row(), row("eager", 900.0)]))
    new.write_text(rows.to_json([row(median=200.0), row("eager", 900.0)]))
    assert main(["--compare", str(old), str(old)]) == 0
    assert main(["--compare", str(old), str(new)]) == 1
    assert "1 slower" in capsys.readouterr().out


# ---- the command line ----


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "holds no rows"),
        ('{"rows": []}', "holds no rows"),
        ('[{"case": "conv"}]', "holds no rows"),
        (rows.to_json([row()]).replace("100.0", '"fast"'), "holds no rows"),
        (rows.to_json([row(device_us=1.0)]), "holds no rows"),  # and no percentiles
        (rows.to_json([row(), row()]), "the same measurement twice"),
    ],
)
def test_bad_files_to_compare(tmp_path, capsys, content, reason):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(rows.to_json([row()]))
    if content is not None:
        bad.write_text(content)
    for files in ((good, bad), (bad, good)):
        assert main(["--compare", *map(str, files)]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and reason in printed.err and printed.err.endswith(".\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cases", "nothing"], "names no case; there are tiny, mlp"),
        (["--contenders", "ours,theirs"], "names no contenders; there are ours"),
        (["--contenders", "nll-loss", "--cases", "size-*"], "none of the --contenders takes part"),
        (["--device", "gpu"], "use cpu, cuda or cuda:N"),
        (["--device", "mps"], "use cpu, cuda or cuda:N"),
        (["--threads", "0"], "is not a whole number above 0"),
        (["--threads", "99999"], "is more than this machine's"),
        (["--seconds", "nan"], "is not a number above 0"),
        (["--compare", "one.json"], "expected 2 arguments"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, options, reason):
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("benchmarks: error: ")
    assert reason in printed.err and printed.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_gpu_may_be_named_without_its_number(monkeypatch):
    """torch.cuda.set_device refuses a device without one; its own conversion stands in for it here."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(elbo_ext, "rsample_kl", lambda mu, logvar: None)
    assert [str(_device(name)) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    assert chosen == [0, 1]


def test_a_device_without_kernels_is_refused(capsys, monkeypatch):
    """Without a GPU; and with one, but without our kernels for it."""
    if not torch.cuda.is_available():
        assert main(["--device", "cuda"]) == 2
        assert "sees no CUDA GPU" in capsys.readouterr().err

    def missing(*arguments, **options):
        raise NotImplementedError("no kernel of elbo_ext for this device.\nmore")

    monkeypatch.setattr(elbo_ext, "rsample_kl", missing)
    assert main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks: error: --device 'cpu' cannot be used: no kernel of elbo_ext for this device.\n"
    )


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--cases", "tiny", "--out", str(tmp_path / "file")]) == 2
    printed = capsys.readouterr()
    assert "cannot be written" in printed.err and printed.out == ""


@pytest.mark.parametrize("done", [0, 2])
def test_what_was_measured_before_an_interrupt_is_written(tmp_path, monkeypatch, capsys, done):
    def run(groups, *arguments):
        yield from [row(), row("eager", 900.0)][:done]
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run", run)
    out = tmp_path / "out"
    assert main(["--cases", "kl-2560", "--contenders", "ours,eager", "--out", str(out)]) == 130
    said = "4 rows were written" if done else "interrupted, nothing was written"
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert (out / "results.json").exists() == bool(done)
    if done:
        assert [r.contender for r in rows.read_json(str(out / "results.json"))] == ["ours", "eager"]


def test_a_compiler_that_fails_is_noted(monkeypatch):
    """The row stays and says why."""

    def broken(function, **options):
        def compiled(*arguments, **more):
            raise RuntimeError("no compiler\nlong story")

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    groups = suite.plan(CPU, 1, patterns=["kl-2560"], contenders=["eager", "eager-compiled"])
    measured = list(suite.run(groups[-1:], CPU, rows.machine(CPU), 0.001))
    assert [(r.contender, r.median_us is None, r.note) for r in measured] == [
        ("eager", False, None),
        ("eager-compiled", True, "torch.compile failed: RuntimeError: no compiler"),
    ]
    assert "eager-compiled: torch.compile failed" in tables.notes(measured)[0]


# ---- all of it ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run in a process of its own, in an empty folder."""
    folder = tmp_path_factory.mktemp("bench")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    eager = [name for name in CONTENDERS if not name.endswith("-compiled")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--cases", "tiny,mlp-scalar,kl-2560,size-2^8,size-2^10",
         "--contenders", ",".join(eager), "--seconds", "0.02"],
        capture_output=True, text=True, timeout=240, cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / OUT, done


def test_files(finished):
    out, done = finished
    assert sorted(os.listdir(out)) == [
        "memory.png", "results.csv", "results.json", "sizes.png", "speedup.png", "summary.md"
    ]  # fmt: skip
    for picture in out.glob("*.png"):
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    assert (out / "summary.md").read_text() in done.stdout
    assert "Traceback" not in done.stderr and "USDT" not in done.stderr


def test_measurements(finished):
    measured = rows.read_json(str(finished[0] / "results.json"))
    with open(finished[0] / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(measured)
    groups = rows.groups(measured)
    assert [(g["ours"].case, g["ours"].direction) for g in groups] == [
        ("tiny", FORWARD), ("tiny", BOTH), ("mlp-scalar", BOTH), ("kl-2560", FORWARD), ("kl-2560", BOTH),
        ("size-2^8", BOTH), ("size-2^10", BOTH),
    ]  # fmt: skip
    for one in measured:
        if one.contender == "nll-loss" and one.case in ("mlp-scalar", "kl-2560"):
            assert one.median_us is None and one.note
            continue
        assert one.note is None and one.rounds >= measure.MIN_ROUNDS and one.threads == 1
        assert 0 < one.p20_us <= one.median_us <= one.p80_us
        assert one.gb_per_s == pytest.approx(one.bytes / one.median_us / 1e3)
        assert one.peak_bytes >= one.peak_extra_bytes
    assert {(g["eager"].data, g["eager"].latent) for g in groups} >= {("2x16", "2x4"), (None, "128x20")}


def test_terminal_says_all_of_it(finished):
    out, done = finished
    for word in ("mlp-scalar", "distributions", "takes no variance", "## Goals", "20-80 %", torch.__version__):
        assert word in done.stdout
    assert str(out.parent) not in done.stdout + (out / "results.json").read_text()


def test_one_compiled_contender():
    """The compiler, for the smallest work. It fuses: no array is left beyond inputs, gradients and z."""
    case = next(case for case in cases.CASES if case.name == "kl-2560")
    (measured,) = suite.run([suite.Group(case, BOTH, 1, ("eager-compiled",))], CPU, rows.machine(CPU), 0.01)
    assert measured.note is None and measured.median_us > 0
    assert 0 <= measured.peak_extra_bytes < measured.array_bytes


def test_clean_removes_the_default_folder_and_git_ignores_it():
    makefile, ignored = (ROOT / "Makefile").read_text(), (ROOT / ".gitignore").read_text()
    assert f" {OUT}" in makefile.split("clean:\n")[1] and f"{OUT}/" in ignored.splitlines()
