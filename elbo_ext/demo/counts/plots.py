"""The figure of python -m elbo_ext.demo counts, as PNG bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..plots import FUSED, REFERENCE, STYLE, TEST, png
from .models import LIKELIHOODS

COLORS = dict(zip(LIKELIHOODS, (TEST, FUSED, "#3a923a"), strict=True))
MARKERS = dict(zip(LIKELIHOODS, "os^", strict=True))


def comparison(results: dict[str, Any], title: str) -> bytes:
    """The bound on the test examples over epochs, and the zeros that each model predicts for each feature.

    results: counts.json's content; only models, observed_zeros, unit and num_samples are read.
    """
    import matplotlib

    observed = np.array(results["observed_zeros"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.6), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        for name, entry in results["models"].items():
            color, label = COLORS[name], LIKELIHOODS[name]
            epochs = [record["epoch"] for record in entry["curve"]]
            left.plot(epochs, [record["test"] for record in entry["curve"]], color=color, lw=1.6, label=label)
            left.plot(entry["epoch"], entry["bound"], MARKERS[name], color=color, ms=8)
            right.plot(observed, entry["predicted_zeros"], MARKERS[name], color=color, ms=4, alpha=0.6, label=label)
        right.axline((0, 0), slope=1, color=REFERENCE, lw=1, ls="--")
        values = [record["test"] for entry in results["models"].values() for record in entry["curve"]]
        low, high = np.quantile(values, 0.06), max(values)
        margin = 0.06 * (high - low) + 1e-3
        left.set(
            title=f"Bound of ln p(x), K = {results['num_samples']}, held out; the epoch that was chosen",
            xlabel="epoch",
            ylabel=results["unit"],
            ylim=(low - margin, high + margin),
        )
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend(loc="lower right")
        right.set(title="Fraction of zeros, one point a feature", xlabel="held-out data", ylabel="samples of the model")
        right.legend(loc="upper left")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return png(figure)
