"""One flat row per measurement, and the machine it was made on."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

import elbo_ext

from . import BenchmarkError

ROOT = Path(__file__).parent.parent


class Timing(NamedTuple):
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float


Clock = Callable[["Row"], Timing | None]
"""Which of a row's times is meant, `wall_time` or `device_time`."""
WALL: Clock = attrgetter("wall_time")
DEVICE: Clock = attrgetter("device_time")


@dataclass
class Row:
    """Times are of one call, by the clock on the wall, or as device_... of a GPU alone, in replays of a CUDA graph.
    Bytes are those the work cannot avoid to move. None where there is nothing to tell."""

    case: str
    work: str
    direction: str
    contender: str
    dtype: str
    variance: str | None
    data: str | None
    latent: str | None
    elements: int
    array_bytes: int
    threads: int
    samples: int | None = None
    """Of z, K; None if z has no axis of samples."""
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    rounds: int | None = None
    calls_per_round: int | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    peak_bytes: int | None = None
    """Most memory in use at once, beyond the inputs ..."""
    peak_extra_bytes: int | None = None
    """... and beyond the inputs, the gradients and z."""
    launches: int | None = None
    buffer_sets: int | None = None
    """So many sets of inputs take turns."""
    device_us: float | None = None
    device_p20_us: float | None = None
    device_p80_us: float | None = None
    device_rounds: int | None = None
    device_gb_per_s: float | None = None
    steps_in_graph: int | None = None
    device_note: str | None = None
    """Why the device's time was not measured, where the other one was."""
    note: str | None = None
    """Why there is no measurement."""
    device: str = "cpu"
    device_name: str = ""
    cpu_name: str = ""
    cores: int = 0
    torch: str = ""
    elbo_ext: str = ""
    instruction_set: str = ""
    date: str = ""

    @property
    def wall_time(self) -> Timing | None:
        if self.median_us is None:
            return None
        return Timing(self.median_us, self.p20_us, self.p80_us, self.gb_per_s)

    @property
    def device_time(self) -> Timing | None:
        if self.device_us is None:
            return None
        return Timing(self.device_us, self.device_p20_us, self.device_p80_us, self.device_gb_per_s)

    def key(self) -> tuple[Any, ...]:
        """What makes two measurements the same one."""
        return (*self.group(), self.contender)

    def group(self) -> tuple[Any, ...]:
        """What the contenders that took turns with each other have in common."""
        return (
            self.case,
            self.work,
            self.direction,
            self.dtype,
            self.variance,
            self.data,
            self.latent,
            self.samples,
            self.device,
            self.threads,
        )


OURS = "ours"


def groups(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows by contender, for each group that took turns."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.group(), {})[row.contender] = row
    return list(found.values())


FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def machine(device: torch.device) -> dict[str, Any]:
    """The fields of a row that say where and with what it was measured."""
    info = elbo_ext.build_info()
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cpu_name": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch": torch.__version__,
        "elbo_ext": _version(info["version"]),
        "instruction_set": info["instruction_set"],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_name() -> str:
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def _version(installed: Any) -> str:
    """The package's version and, where this folder is under git, its commit."""
    if not installed[:1].isdigit():  # built in place
        named = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        installed = named[1] if named else "unknown"
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return installed
    return f"{installed} ({commit})"


# ---- files ----


def to_json(rows: list[Row]) -> str:
    lines = ",\n".join(json.dumps(dataclasses.asdict(row), allow_nan=False) for row in rows)
    return f"[\n{lines}\n]\n"


def to_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, rows))
    return text.getvalue()


def read_json(path: str) -> list[Row]:
    """The rows of a results.json; raises BenchmarkError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(f"{path!r} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise BenchmarkError(f"{path!r} is not JSON") from None
    try:
        if not isinstance(content, list) or not content:
            raise TypeError
        # Fields that a later version adds are of no use to this one.
        rows = [Row(**{name: value for name, value in entry.items() if name in FIELDS}) for entry in content]
        timings = [timing for row in rows for timing in (row.wall_time, row.device_time) if timing is not None]
        times = [time for timing in timings for time in timing[:3]]
        if not all(isinstance(time, int | float) and time > 0 for time in times):
            raise TypeError
        keys = [row.key() for row in rows]
        hash(tuple(keys))
    except (AttributeError, TypeError):
        raise BenchmarkError(f"{path!r} holds no rows of measurements as python -m benchmarks writes them") from None
    if len(set(keys)) < len(keys):
        raise BenchmarkError(f"{path!r} holds the same measurement twice")
    return rows
