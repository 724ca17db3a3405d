"""The figures: speed-ups, time over size, time over threads, memory. In the style of the demo's figures."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from elbo_ext.demo.plots import FUSED, REFERENCE, STYLE, TEST, png

from .cases import BOTH
from .contenders import CONTENDERS, LIMITS
from .rows import OURS, Row, groups
from .tables import label, size

COLORS = {
    "ours": FUSED,
    "ours-compiled": "#8fbce0",
    "eager": TEST,
    "eager-compiled": "#e8ac93",
    "distributions": "#6f8f5c",
    "nll-loss": "#a58bb8",
    "copy": REFERENCE,
    "empty": "#b0b0b0",
    "shipped": "#c9a227",
    "shipped-compiled": "#e6d494",
    "no-loss": "#808080",
}
NAMES = {
    "ours": "elbo_ext",
    "ours-compiled": "elbo_ext, torch.compile",
    "eager": "written by hand",
    "eager-compiled": "written by hand, torch.compile",
    "distributions": "torch.distributions",
    "nll-loss": "F.gaussian_nll_loss",
    "copy": "limit: a copy of the same bytes",
    "empty": "limit: empty autograd functions",
    "shipped": "training step as shipped",
    "shipped-compiled": "the same, its loss under torch.compile",
    "no-loss": "limit: the same step without its loss",
}

DASHES = (0, (2, 1))

Groups = Sequence[dict[str, Row]]


def all(rows: Sequence[Row], title: str) -> dict[str, bytes]:
    """PNG files by name; those for which something was measured."""
    threads = max(row.threads for row in rows)
    both = [group for group in groups(rows) if any_row(group).direction == BOTH]
    full = [group for group in both if any_row(group).threads == threads]
    sized = [group for group in full if any_row(group).case.startswith("size-")]
    named = [group for group in full if group not in sized]
    compared = [group for group in named if _measured(group, OURS) and len(_others(group)) > 0]
    weighed = [
        group
        for group in named
        if any(row.peak_extra_bytes is not None for row in group.values() if row.contender not in LIMITS)
    ]
    fewer = {any_row(group).case for group in both if any_row(group).threads < threads}
    over_threads = [group for group in both if any_row(group).case in fewer]

    files = {}
    with rc_context({**STYLE, "axes.axisbelow": True}):
        if compared:
            files["speedup.png"] = _speedup(compared, threads, title)
        if len(sized) > 1:
            files["sizes.png"] = _sizes(sized, title)
        if over_threads:
            files["threads.png"] = _threads(over_threads, title)
        if weighed:
            files["memory.png"] = _memory(weighed, threads, title)
    return files


def any_row(group: dict[str, Row]) -> Row:
    return next(iter(group.values()))


def _measured(group: dict[str, Row], name: str) -> bool:
    return name in group and group[name].median_us is not None


def _others(group: dict[str, Row]) -> list[str]:
    return [name for name in CONTENDERS if name not in (OURS, *LIMITS) and _measured(group, name)]


def _speedup(compared: Groups, threads: int, title: str) -> bytes:
    """How many times our time the others take, and the limit."""
    figure = Figure(figsize=_width_for(compared, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    names = [name for name in CONTENDERS if any(name in _others(group) for group in compared)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at, heights, errors = [], [], [[], []]
        for place, group in enumerate(compared):
            if _measured(group, name):
                row, ours = group[name], group[OURS].median_us
                at.append(place + (i - (len(names) - 1) / 2) * width)
                heights.append(row.median_us / ours)
                errors[0].append((row.median_us - row.p20_us) / ours)
                errors[1].append((row.p80_us - row.median_us) / ours)
        # A bar on a logarithmic axis starts at 1, "as fast as ours".
        axes.bar(at, [height - 1 for height in heights], width, bottom=1, color=COLORS[name], label=NAMES[name])
        axes.errorbar(at, heights, errors, fmt="none", ecolor=REFERENCE, elinewidth=0.7)
    for name in LIMITS:
        limits = [(p, g[name].median_us / g[OURS].median_us) for p, g in enumerate(compared) if _measured(g, name)]
        if limits:
            places, values = zip(*limits, strict=True)
            left, right = [place - 0.42 for place in places], [place + 0.42 for place in places]
            axes.hlines(values, left, right, color=COLORS[name], lw=1.4, ls=DASHES, label=NAMES[name])
    axes.axhline(1, color=FUSED, lw=1.4, label=NAMES[OURS])
    axes.set_yscale("log")
    _plain_ticks(axes, "x")
    _name_cases(axes, compared, threads)
    axes.set(title="Time of forward + backward as a multiple of ours, with 20th and 80th percentile")
    return _finished(figure, axes, title)


def _sizes(sized: Groups, title: str) -> bytes:
    """Time over the number of elements, the limit drawn in."""
    figure = Figure(figsize=(7.5, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    _curves(axes, sorted(sized, key=lambda group: any_row(group).elements), lambda row: row.elements)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([any_row(group).elements for group in sized]))
    axes.set_yscale("log")
    axes.set(
        title="Whole step, forward + backward: time over size, with 20th and 80th percentile",
        xlabel="elements of an array",
        ylabel="microseconds",
    )
    return _finished(figure, axes, title)


def _threads(over_threads: Groups, title: str) -> bytes:
    """Time over the number of threads, a panel for each case."""
    names = list(dict.fromkeys(any_row(group).case for group in over_threads))
    figure = Figure(figsize=(3.4 * len(names) + 1.5, 3.8), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        mine = sorted((g for g in over_threads if any_row(g).case == name), key=lambda group: any_row(group).threads)
        counts = [any_row(group).threads for group in mine]
        _curves(axes, mine, lambda row: row.threads, ".-")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(title=name, xlabel="threads", ylabel="microseconds" if axes is panels[0] else "")
    return _finished(figure, panels[0], title)


def _curves(axes: Axes, ordered: Groups, x_of, style: str = "-") -> None:
    for name in CONTENDERS:
        mine = [group[name] for group in ordered if _measured(group, name)]
        if mine:
            x = [x_of(row) for row in mine]
            line = "--" if name in LIMITS else style
            axes.plot(x, [row.median_us for row in mine], line, color=COLORS[name], lw=1.6, label=NAMES[name])
            axes.fill_between(
                x, [row.p20_us for row in mine], [row.p80_us for row in mine], color=COLORS[name], alpha=0.2, lw=0
            )


def _memory(weighed: Groups, threads: int, title: str) -> bytes:
    """The peak beyond inputs, gradients and z, by case and contender."""
    figure = Figure(figsize=_width_for(weighed, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    names = [
        name
        for name in CONTENDERS
        if name not in LIMITS and any(name in group and group[name].peak_extra_bytes is not None for group in weighed)
    ]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [(p, g[name].peak_extra_bytes) for p, g in enumerate(weighed) if name in g]
        mine = [(place, max(extra, 1)) for place, extra in mine if extra is not None]
        at = [place + (i - (len(names) - 1) / 2) * width for place, _ in mine]
        axes.bar(at, [extra for _, extra in mine], width, color=COLORS[name], label=NAMES[name])
    arrays = [any_row(group).array_bytes for group in weighed]
    left, right = [place - 0.45 for place in range(len(arrays))], [place + 0.45 for place in range(len(arrays))]
    axes.hlines(arrays, left, right, color=REFERENCE, lw=1.2, ls=DASHES, label="one array of the case's largest size")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    _name_cases(axes, weighed, threads)
    axes.set(title="Peak memory of forward + backward beyond inputs, gradients and z")
    return _finished(figure, axes, title)


def _width_for(some: Groups, height: float) -> tuple[float, float]:
    return max(7.5, 0.55 * len(some) + 1.2), height


def _name_cases(axes: Axes, some: Groups, threads: int) -> None:
    axes.grid(axis="x", visible=False)
    axes.set_xticks(range(len(some)), [label(any_row(group), threads) for group in some], rotation=35, ha="right")
    axes.set_xlim(-0.6, len(some) - 0.4)


def _plain_ticks(axes: Axes, unit: str) -> None:
    """0.5 x, 1 x, 2 x, 5 x ... in the place of powers."""
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} {unit}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finished(figure: Figure, legend_of: Axes, title: str) -> bytes:
    handles, labels = legend_of.get_legend_handles_labels()
    columns = 4 if figure.get_figwidth() > 9 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=8)
    return png(figure)
