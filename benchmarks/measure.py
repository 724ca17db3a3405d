"""The clock, the order of turns, the buffers, and the memory."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .cases import Buffers

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts allocations, is not to talk about it

TURN_SECONDS = 2e-3
"""A turn repeats its call until about so much time has passed."""
SHORT_STEPS = 16
"""So many steps of a small work share a CUDA graph, that the start of a graph does not show in the time of one."""
MIN_ROUNDS, MAX_ROUNDS = 5, 400


# ---- buffers ----


def last_level_cache(device: torch.device) -> int:
    """Bytes of the machine's largest cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes) or 32 << 20


def how_many_sets(set_bytes: int, cache_bytes: int) -> int:
    """One set where it takes up an eighth of the cache at most, as a small problem of a user would stay there; else as
    many as make three times the cache, so that each is out of it when its turn comes again."""
    if set_bytes * 8 <= cache_bytes:
        return 1
    return max(1, math.ceil(3 * cache_bytes / set_bytes))


def steps_in_a_graph(sets: int, set_bytes: int, cache_bytes: int) -> int:
    """One on each set of buffers, so that a graph rotates them as the calls do; where one small set stays in the cache,
    SHORT_STEPS on it."""
    return SHORT_STEPS if set_bytes * 8 <= cache_bytes else sets


# ---- the clock ----


class Turns:
    """One contender's calls on rotating sets of buffers.

    calls: one for each set, which knows its `leaves()`. Gradients are dropped after each.
    rotation: the numbers of the sets, over and over; the contenders share it, so that none finds in the cache what the
    one before it has just read.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], sets: Sequence[Buffers], rotation: Iterator[int]) -> None:
        self._sets = [(call, buffers.leaves()) for call, buffers in zip(calls, sets, strict=True)]
        self._rotation = rotation

    def step(self) -> None:
        """One call on the next set, of which nothing is kept."""
        call, leaves = self._sets[next(self._rotation)]
        call()
        for leaf in leaves:
            leaf.grad = None

    def drop_gradients(self) -> None:
        for _, leaves in self._sets:
            for leaf in leaves:
                leaf.grad = None

    def seconds(self, calls: int, now: Callable[[], float] = time.perf_counter) -> float:
        """Seconds per call. Results and gradients are held until the clock has stopped; to free them is not timed."""
        total = 0.0
        for _ in range(calls):
            call, leaves = self._sets[next(self._rotation)]
            start = now()
            results = call()
            total += now() - start
            del results
            for leaf in leaves:
                leaf.grad = None
        return total / calls

    def cuda_seconds(self, calls: int) -> float:
        """The same by CUDA's clock around all calls: what a GPU that was idle before needs, with its launches."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            self.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


class Replays:
    """One contender's steps, captured once in a CUDA graph: what the device does in them, without Python and launches.

    Results and gradients are dropped after each step in the graph too, so that the next one gets their memory. Graphs
    with the same `pool` (torch.cuda.graph_pool_handle()) share that memory; they must not run at the same time.
    """

    def __init__(self, turns: Turns, steps: int, pool: object) -> None:
        """Raises what the contender raises under capture; a wait for the device, which a graph cannot hold, is raised
        in the warm-up already: torch need not get over a capture that failed."""
        self._steps = steps
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), _waiting_is_an_error():
            for _ in range(3):
                turns.step()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            for _ in range(steps):
                turns.step()

    def seconds(self, calls: int) -> float:
        """Seconds per step by CUDA's clock around so many replays as hold `calls` steps. One replay goes ahead, off the
        clock, so that the device has work until the others are launched."""
        replays = math.ceil(calls / self._steps)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph.replay()
        start.record()
        for _ in range(replays):
            self._graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / (replays * self._steps)


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


Timed = TypeVar("Timed", Turns, Replays)
Clock = Callable[[Timed, int], float]


def clock_of(device: torch.device) -> Clock[Turns]:
    return Turns.cuda_seconds if device.type == "cuda" else Turns.seconds


def interleave(
    turns: dict[str, Timed],
    budget: float,
    clock: Clock[Timed] = Turns.seconds,
    now: Callable[[], float] = time.perf_counter,
    min_rounds: int = MIN_ROUNDS,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call of each contender in each round, and the calls in a turn.

    In each round all take a turn, in an order drawn anew, so that what disturbs the machine disturbs all alike. A turn
    begins with a call off the clock: the caches and the memory allocator are then as the contender itself leaves them.
    Rounds go on until `budget` seconds are over.
    """
    if not turns:
        return {}, {}
    order = random.Random(0)
    calls = {}
    for name, turn in turns.items():
        clock(turn, 1)  # warm-up
        fastest = min(clock(turn, 1) for _ in range(3))
        calls[name] = max(1, round(TURN_SECONDS / max(fastest, 1e-9)))
    names = list(turns)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection() as collect:
        end = now() + budget
        for done in range(MAX_ROUNDS):
            if done >= min_rounds and now() >= end:
                break
            order.shuffle(names)
            for name in names:
                clock(turns[name], 1)
                times[name].append(clock(turns[name], calls[name]))
            collect()
    return times, calls


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[Callable[[], object]]:
    """Collects between turns only; what is there already is exempted, which makes that quick."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def summary(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, in microseconds."""
    median, low, high = (1e6 * np.percentile(seconds, (50, 20, 80))).tolist()
    return median, low, high


# ---- memory and launches ----


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held at once during a call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    del results
    changes = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def launches(call: Callable[[], object]) -> int:
    """How many kernels, copies and fills the GPU runs in a call."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type() == DeviceType.CUDA for event in profiler.profiler.kineto_results.events())
