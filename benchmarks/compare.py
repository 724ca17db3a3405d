"""python -m benchmarks --compare old.json new.json: what got slower.

Between two runs the machine changes too: its clock, its neighbors, its temperature. The contenders that are none of
ours are the same in both, so that how their times changed, the median within a group of turns, is the machine's drift,
and our times are divided by it. What remains counts as slower if it is beyond THRESHOLD and also beyond the spread: the
fast fifth of the new run (20th percentile) is slower than the slow fifth (80th) of the old.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .cases import BOTH
from .rows import DEVICE, WALL, Clock, Row, Timing, read_json
from .tables import microseconds, size, table

THRESHOLD = 0.10
MEMORY_THRESHOLD = 0.01
SMALL_MEMORY = 4096
"""Changes of the peak memory up to so many bytes are nothing."""


@dataclass(frozen=True)
class Change:
    """Of one measurement of ours, by one clock. drift: new / old of the others in its group; None without others."""

    old: Row
    new: Row
    clock: Clock
    drift: float | None

    @property
    def before(self) -> Timing:
        return self.clock(self.old)

    @property
    def after(self) -> Timing:
        return self.clock(self.new)

    @property
    def raw(self) -> float:
        return self.after.median_us / self.before.median_us

    @property
    def ratio(self) -> float:
        """New time over old, the machine's drift taken out."""
        return self.raw / (self.drift or 1.0)

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + THRESHOLD and self.after.p20_us / (self.drift or 1.0) > self.before.p80_us

    @property
    def faster(self) -> bool:
        return self.ratio < 1 / (1 + THRESHOLD) and self.after.p80_us / (self.drift or 1.0) < self.before.p20_us

    @property
    def takes_more_memory(self) -> bool:
        if self.clock is not WALL or self.old.peak_bytes is None or self.new.peak_bytes is None:
            return False
        grown = self.new.peak_bytes - self.old.peak_bytes
        return grown > SMALL_MEMORY and grown > MEMORY_THRESHOLD * self.old.peak_bytes


def ours(row: Row) -> bool:
    return row.contender.startswith("ours")


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Of our measurements that both runs have, by the clock on the wall and by the device's."""
    return [change for clock in (WALL, DEVICE) for change in _changes(old, new, clock)]


def _changes(old: Sequence[Row], new: Sequence[Row], clock: Clock) -> list[Change]:
    before = {row.key(): row for row in old if clock(row)}
    pairs = [(before[row.key()], row) for row in new if clock(row) and row.key() in before]
    drifts: dict[tuple, list[float]] = {}
    for a, b in pairs:
        if not ours(b):
            drifts.setdefault(b.group(), []).append(clock(b).median_us / clock(a).median_us)
    drift = {group: statistics.median(ratios) for group, ratios in drifts.items()}
    return [Change(a, b, clock, drift.get(b.group())) for a, b in pairs if ours(b)]


def lost(old: Sequence[Row], new: Sequence[Row]) -> list[tuple[Row, Clock]]:
    """Our measurements of the old run for which the new one only has a reason why there is none."""
    after = {row.key(): row for row in new}
    gone = []
    for row in filter(ours, old):
        now = after.get(row.key())
        for clock, reason in ((WALL, now and now.note), (DEVICE, now and now.device_note)):
            if reason and clock(row) and not clock(now):
                gone.append((row, clock))
    return gone


def report(old: Sequence[Row], new: Sequence[Row]) -> tuple[str, bool]:
    """What to print, and whether something got worse."""
    found = changes(old, new)
    parts = []
    for field in ("device_name", "cores", "torch", "instruction_set"):
        values = [sorted({str(getattr(row, field)) for row in run}) for run in (old, new)]
        if values[0] != values[1]:
            parts.append(f"Careful: {field} was {', '.join(values[0])} and is {', '.join(values[1])}.")
    if any(change.drift is None for change in found):
        parts.append(
            "Careful: some groups have no other contender to tell the machine's drift by; theirs is taken for 1."
        )
    slower = sorted((c for c in found if c.slower), key=lambda c: -c.ratio)
    faster = sorted((c for c in found if c.faster), key=lambda c: c.ratio)
    heavier = [c for c in found if c.takes_more_memory]
    gone = lost(old, new)
    parts.append(
        f"{len(found)} measurements compared: {len(slower)} slower, {len(faster)} faster, {len(heavier)} heavier."
    )
    for title, some in (("slower", slower), ("faster", faster)):
        if some:
            lines = [
                (*_name(c.new, c.clock), microseconds(c.before.median_us), microseconds(c.after.median_us),
                 f"{c.raw:.2f} x", "-" if c.drift is None else f"{c.drift:.2f} x", f"{c.ratio:.2f} x")
                for c in some
            ]  # fmt: skip
            parts.append(
                table((title, "contender", "old", "new", "new / old", "the others", "without drift"), lines, left=2)
            )
    if heavier:
        lines = [(*_name(c.new), size(c.old.peak_bytes), size(c.new.peak_bytes)) for c in heavier]
        parts.append(table(("more memory", "contender", "old", "new"), lines, left=2))
    parts += [f"Gone: {', '.join(_name(row, clock))}." for row, clock in gone]
    return "\n\n".join(parts), bool(slower or heavier or gone)


def _name(row: Row, clock: Clock = WALL) -> tuple[str, str]:
    direction = "" if row.direction == BOTH else f", {row.direction}"
    alone = ", device alone" if clock is DEVICE else ""
    return f"{row.case}{direction}, {row.threads} thread{'s' * (row.threads != 1)}{alone}", row.contender


def main(old: str, new: str) -> int:
    """Prints the report; returns 1 if something got worse."""
    text, worse = report(read_json(old), read_json(new))
    print(text)
    return int(worse)
