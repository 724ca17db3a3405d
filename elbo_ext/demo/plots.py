"""The demo's figures, drawn without a display and returned as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FUSED, REFERENCE, TEST = "#1f6fb4", "#111111", "#d1603d"
STYLE: dict[Any, Any] = {  # Any: matplotlib's names, which its stubs list one by one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def learning_curves(
    fused: list[dict[str, float]],
    plain: list[dict[str, float]],
    untrained: dict[str, float],
    differences: Sequence[float] | np.ndarray,
    limit: float,
    compared_steps: int,
    title: str,
) -> bytes:
    """ELBO and KL per epoch, fused and reference over each other, and the difference of their losses.

    fused, plain: a record per epoch (plain may end earlier); untrained: the test images' record at epoch 0;
    differences: relative, one per step, limited by `limit` over the first `compared_steps`.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1.15))
        for axes, name, label in ((left, "elbo", "ELBO"), (middle, "kl", "KL(q(z|x) || p(z))")):
            epochs = [record["epoch"] for record in fused]
            kernels = [record[name] for record in fused]
            repeated = [record[name] for record in plain]
            test = [untrained[name], *(record[f"test_{name}"] for record in fused)]
            axes.plot(epochs, kernels, color=FUSED, lw=5, alpha=0.45, label="train, fused kernels")
            if plain:
                axes.plot(
                    epochs[: len(plain)],
                    repeated,
                    color=REFERENCE,
                    lw=1.2,
                    ls=(0, (4, 3)),
                    label="train, plain PyTorch reference",
                )
            axes.plot([0, *epochs], test, color=TEST, lw=1.4, label="test, fused kernels")
            if name == "elbo":
                _trim(axes, kernels + test)
            axes.set(title=f"{label}, nats per image", xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend(loc="lower right")
        if len(differences):
            _difference_panel(right, differences, limit, compared_steps)
        else:
            right.remove()
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return png(figure)


def _difference_panel(axes: Axes, differences: Sequence[float] | np.ndarray, limit: float, compared_steps: int) -> None:
    """Relative difference per step on a log scale, the limit, and the steps to which it applies."""
    floor, top = 1e-8, max(20 * limit, 3 * max(differences, default=0))
    steps = np.arange(1, len(differences) + 1)
    size = 3.5 if len(steps) > 500 else 6
    axes.axvspan(0.5, compared_steps + 0.5, color=FUSED, alpha=0.12, lw=0)
    axes.semilogy(steps, np.maximum(differences, floor), ".", color=FUSED, ms=size, mew=0, alpha=0.5)
    axes.axhline(limit, color=TEST, lw=1.4)
    if min(differences, default=1) < floor:
        axes.text(
            0.99,
            floor / 1.3,
            f"equal, or closer than {floor:g}",
            color=FUSED,
            ha="right",
            va="top",
            transform=axes.get_yaxis_transform(),
        )
    axes.text(
        0.99,
        limit * 1.25,
        f"limit in the shaded steps: {limit:g}",
        color=TEST,
        ha="right",
        va="bottom",
        transform=axes.get_yaxis_transform(),
    )
    axes.set(
        title="Loss: |fused - reference| / max(|reference|, 1)",
        xlabel="training step",
        ylim=(floor / 3, top),
        xlim=(0, len(differences) + 1),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def reconstructions(
    originals: np.ndarray, decoded: np.ndarray, shape: tuple[int, ...], low: float, high: float, title: str
) -> bytes:
    """Originals [N, D] and, below each, its reconstruction [N, D], in bands of up to twelve."""
    columns = min(12, len(originals))
    bands = -(-len(originals) // columns)
    rows, labels = [], []
    for band in range(bands):
        part = slice(band * columns, (band + 1) * columns)
        rows += [originals[part], decoded[part]]
        labels += ["original", "reconstruction"]
    return _grid(rows, labels, shape, low, high, title)


def samples(decoded: np.ndarray, shape: tuple[int, ...], low: float, high: float, title: str) -> bytes:
    """A sheet of decoded prior samples [N, D], twelve in a row."""
    columns = min(12, len(decoded))
    rows = [decoded[start : start + columns] for start in range(0, len(decoded), columns)]
    return _grid(rows, None, shape, low, high, title)


def _grid(
    rows: list[np.ndarray],
    labels: list[str] | None,
    shape: tuple[int, ...],
    low: float,
    high: float,
    title: str,
) -> bytes:
    """Rows of examples: one mosaic where an example is an image, small line plots where it is not."""
    import matplotlib

    columns = max(len(row) for row in rows)
    tile = _as_image(rows[0][0], shape)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        if tile is None:
            figure = Figure(figsize=(1.05 * columns + 1, 0.8 * len(rows) + 0.6), dpi=110, layout="constrained")
            grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
            for line, row in enumerate(rows):
                for column in range(columns):
                    axes = grid[line][column]
                    axes.axis("off")
                    if column < len(row):
                        axes.plot(row[column], color=REFERENCE if labels and line % 2 == 0 else FUSED, lw=0.8)
                if labels:
                    grid[line][0].set_title(labels[line], fontsize=8, loc="left")
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
            return png(figure)
        height, width = tile.shape[:2]
        gap = max(1, round(0.09 * max(height, width)))
        paired = labels is not None
        tops = [line * (height + gap) + (line // 2) * 2 * gap * paired for line in range(len(rows))]
        canvas = np.ones((tops[-1] + height, columns * (width + gap) - gap, 3))
        for top, row in zip(tops, rows, strict=True):
            for column, example in enumerate(row):
                pixels = _as_image(example, shape)
                assert pixels is not None  # as that of the first one
                image = np.clip((pixels - low) / (high - low), 0, 1)
                left = column * (width + gap)
                canvas[top : top + height, left : left + width] = image if image.ndim == 3 else image[..., None]
        margin = 1.25 if labels else 0.15
        inches = 0.82 * columns
        figure = Figure(figsize=(inches + margin + 0.15, inches * canvas.shape[0] / canvas.shape[1] + 0.6), dpi=130)
        bottom = 0.12 / figure.get_figheight()
        axes = figure.add_axes(
            (
                margin / figure.get_figwidth(),
                bottom,
                inches / figure.get_figwidth(),
                1 - bottom - 0.48 / figure.get_figheight(),
            )
        )
        axes.imshow(canvas, interpolation="nearest")
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_yticks([top + height / 2 for top in tops] if labels else [], labels=labels)
        figure.text(
            0.15 / figure.get_figwidth(),
            1 - 0.15 / figure.get_figheight(),
            title,
            va="top",
            fontsize=11,
            fontweight="bold",
        )
        return png(figure)


def _as_image(example: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """[D] -> [H, W] or [H, W, 3], or None where `shape` is not an image's (square rows count as images)."""
    side = round(example.size**0.5)
    if len(shape) == 1 and side * side == example.size:
        shape = (side, side)
    image: np.ndarray
    if len(shape) == 3 and shape[-1] in (1, 3):
        image = example.reshape(shape)
    elif len(shape) == 3 and shape[0] in (1, 3):
        image = np.moveaxis(example.reshape(shape), 0, -1)
    elif len(shape) == 2:
        return example.reshape(shape)
    else:
        return None
    return image[..., 0] if image.shape[-1] == 1 else image


def _trim(axes: Axes, values: list[float]) -> None:
    """Let the first, steep values leave the axes at the bottom, so that the rest is legible."""
    low, high = np.quantile(values, 0.04), max(values)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.06 * (high - low))


def png(figure: Figure) -> bytes:
    """The figure, rendered."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
