"""Text tables that read well on a terminal and are Markdown too."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import BOTH
from .contenders import CONTENDERS, EMPTY, LIMITS
from .rows import DEVICE, OURS, WALL, Clock, Row, groups


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(parts)} |"

    rule = [("-" * w if i < left else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, lines)])


def microseconds(value: float) -> str:
    if value < 1e3:
        return f"{value:.3g} us" if value < 100 else f"{value:.0f} us"
    return f"{value / 1e3:.3g} ms" if value < 1e6 else f"{value / 1e6:.3g} s"


def size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.3g} {unit}" if value < 100 or unit != "B" else f"{value:.0f} {unit}"
        value /= 1000
    raise AssertionError


def label(row: Row, all_threads: int) -> str:
    """A group's name in a table."""
    name = row.case if row.direction == BOTH else f"{row.case}, {row.direction}"
    return name if row.threads == all_threads else f"{name}, {row.threads} thread{'s' * (row.threads != 1)}"


def speed(rows: Sequence[Row]) -> str:
    """Case by contender: our time with its spread and bandwidth (not of whole training steps), and the others' times as
    multiples of it (as such, where we were not measured)."""
    others = [name for name in CONTENDERS if name != OURS and any(row.contender == name for row in rows)]
    return _times(rows, others, WALL, launched=any(row.launches is not None for row in rows))


def device_speed(rows: Sequence[Row]) -> str:
    """The same of the time that a GPU takes by itself; empty where no such time was measured."""
    timed = [group for group in groups(rows) if any(row.device_time for row in group.values())]
    some = [row for group in timed for row in group.values()]
    others = [name for name in CONTENDERS if name not in (OURS, EMPTY) and any(row.contender == name for row in some)]
    return _times(some, others, DEVICE, launched=False) if some else ""


def _times(rows: Sequence[Row], others: Sequence[str], clock: Clock, launched: bool) -> str:
    all_threads = max(row.threads for row in rows)
    counted = any(row.bytes is not None for row in rows)
    header = ["case", "array", "ours", "20-80 %"]
    header += [*(["GB/s"] if counted else []), *(["launches"] if launched else []), *others]
    lines = []
    for group in groups(rows):
        any_row = next(iter(group.values()))
        timings = {name: clock(row) for name, row in group.items()}
        ours = timings.get(OURS)
        cells = [label(any_row, all_threads), size(any_row.array_bytes)]
        if ours:
            spread = f"{100 * (ours.p20_us / ours.median_us - 1):+.0f} {100 * (ours.p80_us / ours.median_us - 1):+.0f}"
            cells += [microseconds(ours.median_us), spread]
        else:
            cells += ["-"] * 2
        if counted:
            cells.append(f"{ours.gb_per_s:.3g}" if ours and ours.gb_per_s is not None else "-")
        if launched:
            launches = group[OURS].launches if OURS in group else None
            cells.append("-" if launches is None else str(launches))
        for name in others:
            timing = timings.get(name)
            if timing is None:
                cells.append("-")
            elif ours:
                cells.append(f"{timing.median_us / ours.median_us:.3g} x")
            else:
                cells.append(microseconds(timing.median_us))
        lines.append(cells)
    return table(header, lines)


def memory(rows: Sequence[Row]) -> str:
    """Case by contender: the peak of memory beyond inputs, gradients and z."""
    all_threads = max(row.threads for row in rows)
    names = [name for name in CONTENDERS if name not in LIMITS and any(row.contender == name for row in rows)]
    lines = []
    for group in groups(rows):
        any_row = next(iter(group.values()))
        if any_row.threads != all_threads:
            continue
        extra = [group[name].peak_extra_bytes if name in group else None for name in names]
        cells = ["-" if value is None else size(max(value, 0)) for value in extra]
        lines.append([label(any_row, all_threads), size(any_row.array_bytes), *cells])
    return table(["case", "array", *names], lines)


def notes(rows: Sequence[Row]) -> list[str]:
    """Why rows have no measurement, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for note in filter(None, (row.note, row.device_note)):
            reasons.setdefault(f"{row.contender}: {note}", []).append(row.case)
    return [f"{reason} ({', '.join(dict.fromkeys(names))})" for reason, names in reasons.items()]
